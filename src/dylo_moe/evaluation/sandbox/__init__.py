"""Processes in which an answer can reach nothing but its own problem."""
