"""Losses of the maths alone: tensors in, scalars (one per utterance) out. They know no model, no data and no trainer."""
