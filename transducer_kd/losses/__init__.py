"""Losses: tensors in, one scalar per utterance out. They know no model, no data and no trainer."""
