"""Checkpoints that are complete or absent, and runs that resume from them bit for bit."""
