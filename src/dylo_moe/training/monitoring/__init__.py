"""What a run reports while it trains: usage, balance, gradients and trackers."""

from dylo_moe.training.monitoring.callbacks import MonitoringCallback, monitoring_callbacks
from dylo_moe.training.monitoring.trackers import resolve_trackers

__all__ = [
    "MonitoringCallback",
    "monitoring_callbacks",
    "resolve_trackers",
]
