"""Which experiment trackers a run writes to; the writing is transformers' own."""

from collections.abc import Callable

from transformers.integrations.integration_utils import (
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from dylo_moe.errors import ConfigError
from dylo_moe.flags import split_names

INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
    "trackio": is_trackio_available,
}
_TO_INSTALL = {"tensorboard": "'dylora-moe[tensorboard]'", "wandb": "'dylora-moe[wandb]'"}
"""What pip is told, where it is not the tracker's own name."""


def resolve_trackers(report_to: str) -> list[str]:
    """The trackers of ``--report_to``, as ``TrainingArguments`` takes them.

    Args:
        report_to: Names, comma-separated; ``none``; or ``auto``, which is TensorBoard where it is installed.

    Raises:
        ConfigError: One is not installed.
    """
    if report_to == "none":
        return []
    if report_to == "auto":
        return ["tensorboard"] if INSTALLED["tensorboard"]() else []
    names = split_names(report_to)
    missing = [name for name in names if not INSTALLED[name]()]
    if missing:
        packages = " ".join(_TO_INSTALL.get(name, name) for name in missing)
        raise ConfigError(f"--report_to {report_to}: not installed; run: pip install {packages}")
    return names
