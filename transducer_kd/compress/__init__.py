"""From a larger model's weights to a smaller model's: what to keep, and what counts."""
