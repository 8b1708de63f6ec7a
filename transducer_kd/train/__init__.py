"""The one training loop and what it stands on: optimiser, checkpoints, metrics, processes."""
