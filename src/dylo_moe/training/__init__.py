"""Training: the Trainer, checkpoints that survive interruptions, monitoring and artifacts."""
