"""Plot the curves of a training run from the trainer's log.

Needs matplotlib: ``pip install 'dylora-moe[plots]'``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

matplotlib.use("agg")

Curve = tuple[list[int], list[float]]
"""Steps, and the value at each step."""


def training_curves(log_history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot held-out loss per domain, usage per expert and gradient norms over the steps, one panel each.

    Args:
        log_history: ``trainer.state.log_history``, or ``log_history`` of a checkpoint's ``trainer_state.json``, with
            the names of ``docs/training.md``. The panel of a metric that was not logged stays empty.
        path: The image file; its suffix sets the format.
    """
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained", sharex=True)
    panels = (
        ("Held-out loss, nats per token", curves(log_history, "eval_loss")),
        ("Usage, share of the routing weight", curves(log_history, "expert_usage")),
        ("Gradient norm, before clipping", curves(log_history, "grad_norm")),
    )
    for axis, (title, lines) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        for name, (steps, values) in lines.items():
            axis.plot(steps, values, label=name, linewidth=1.4, marker="." if len(steps) < 40 else None)
        if lines:
            axis.legend(frameon=False, fontsize=8)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_ylim(bottom=0)
    if panels[2][1]:
        axes[2].set_yscale("log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curves(log_history: Iterable[Mapping[str, float]], group: str) -> dict[str, Curve]:
    """Return the curves of ``group/<name>``, by name; leave out longer names, such as usage per domain."""
    by_name: dict[str, Curve] = {}
    for entry in log_history:
        for key, value in entry.items():
            prefix, _, name = key.rpartition("/")
            if prefix == group:
                steps, values = by_name.setdefault(name, ([], []))
                steps.append(int(entry["step"]))
                values.append(float(value))
    return by_name
