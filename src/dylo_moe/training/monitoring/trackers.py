"""The experiment trackers that a run writes to; transformers does the writing."""

from collections.abc import Callable, Sequence

from transformers.integrations.integration_utils import (
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from dylo_moe.errors import ConfigError

INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
    "trackio": is_trackio_available,
}
_TO_INSTALL = {"tensorboard": "'dylora-moe[tensorboard]'", "wandb": "'dylora-moe[wandb]'"}
"""Argument of ``pip install``, if it is not the tracker's own name."""


def resolve_trackers(report_to: Sequence[str]) -> list[str]:
    """Return the trackers to use, as ``TrainingArguments`` takes them.

    Args:
        report_to: Names of trackers; or only ``none``; or only ``auto``, which is TensorBoard if it is installed.

    Raises:
        ConfigError: One of them is not installed.
    """
    names = list(report_to)
    if names == ["none"]:
        return []
    if names == ["auto"]:
        return ["tensorboard"] if INSTALLED["tensorboard"]() else []
    missing = [name for name in names if not INSTALLED[name]()]
    if missing:
        packages = " ".join(_TO_INSTALL.get(name, name) for name in missing)
        raise ConfigError(f"`report_to` {','.join(names)}: not installed; run: pip install {packages}")
    return names
