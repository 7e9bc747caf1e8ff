"""Verdicts: the answers' outputs compared with those of the reference solutions."""

from dylo_moe.evaluation.judging.judge import Judge, Verdict

__all__ = [
    "Judge",
    "Verdict",
]
