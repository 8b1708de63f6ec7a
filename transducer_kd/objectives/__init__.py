"""Training objectives: what a phase minimises. One class a way of training, one trainer for all."""
