"""Processes in which an answer can reach nothing but its own problem."""

from dylo_moe.evaluation.sandbox.runner import ResourceLimits, Sandbox, start_arguments
from dylo_moe.evaluation.sandbox.self_check import choose_sandbox

__all__ = [
    "ResourceLimits",
    "Sandbox",
    "choose_sandbox",
    "start_arguments",
]
