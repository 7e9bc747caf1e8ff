"""Tables and figures of results, for the terminal and for files."""

from dylo_moe.reports.benchmark_tables import comparison_table, result_table
from dylo_moe.reports.skill_tables import (
    experts_table,
    exported_line,
    kept_table,
    loss_table,
    novelty_line,
    stream_metrics_line,
)
from dylo_moe.reports.training_report import TrainingReport, training_table

__all__ = [
    "TrainingReport",
    "comparison_table",
    "experts_table",
    "exported_line",
    "kept_table",
    "loss_table",
    "novelty_line",
    "result_table",
    "stream_metrics_line",
    "training_table",
]
