"""From corpora on disk to batches of log-mel features and BPE tokens."""
