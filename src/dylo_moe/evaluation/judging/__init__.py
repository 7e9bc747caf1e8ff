"""Verdicts: the answers' outputs compared with those of the reference solutions."""
