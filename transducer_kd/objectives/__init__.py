"""Training objectives: what a phase minimises. One class a way of training, all called by the same trainer."""
