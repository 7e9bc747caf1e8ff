"""Stores of checkpoints and mixtures: a folder, or W&B."""
