"""Neural networks: features and tokens in, representations and logits out. No losses, no search, no data."""
