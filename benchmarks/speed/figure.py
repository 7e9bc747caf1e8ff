"""Figure of a speed result: cost compared with other methods, growth with the experts, and generation.

Needs matplotlib.
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from benchmarks.speed.contenders import BASE, REFERENCE, label
from benchmarks.speed.table import PEERS

matplotlib.use("agg")

OURS, OTHERS, GUIDE = "#1f6fb4", "#b0b0b0", "#404040"
MODES = {"per_layer": ("#1f6fb4", "o"), "prefix": ("#e07b00", "s")}
GENERATION = (BASE, REFERENCE, "ours_prefix_4", "ours_per_layer_4", "ours_final_4")


def write_figure(result: dict[str, Any], path: Path) -> None:
    """Draw the sections of the result; a section that was not run leaves its panel empty."""
    sections = result["sections"]
    figure, axes = pyplot.subplots(2, 2, figsize=(12.5, 9.5), layout="constrained", height_ratios=(1.5, 1))
    for axis, section, title in ((axes[0, 0], "train", "Train step"), (axes[0, 1], "forward", "Forward (evaluation)")):
        _bars(axis, sections.get(section), f"{title}: time, LoRA of rank 16 = 1")
    _growth(axes[1, 0], sections.get("experts"))
    _generation(axes[1, 1], sections.get("generate"))
    setup = result["setup"]
    figure.suptitle(f"{setup['model']} on the CPU, {setup['dtype']}, {setup['batch']} x {setup['length']} tokens")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, section: dict[str, Any] | None, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    if section is None:
        return
    names = [name for name in PEERS if name in section["ratios"]]
    names.sort(key=lambda name: -section["ratios"][name]["median"])
    for place, name in enumerate(names):
        ratio = section["ratios"][name]
        low, high = ratio["quartiles"]
        axis.barh(place, ratio["median"], color=OURS if name.startswith("ours_") else OTHERS)
        axis.plot([low, high], [place, place], color=GUIDE, linewidth=1.5)
        axis.annotate(
            f"{ratio['median']:.2f}",
            (max(high, ratio["median"]), place),
            (4, 0),
            fontsize=8,
            va="center",
            textcoords="offset points",
        )
    axis.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    axis.margins(x=0.08, y=0.01)
    axis.axvline(1, color=GUIDE, linewidth=0.8, linestyle=":")


def _growth(axis: Any, section: dict[str, Any] | None) -> None:
    axis.set_title("Forward with 2 experts a token: time, 4 experts = 1", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    if section is None:
        return
    counts: list[int] = []
    for mode, (colour, marker) in MODES.items():
        prefix = f"ours_{mode}_"
        points = {
            int(name.removeprefix(prefix)): ratio
            for name, ratio in section["ratios"].items()
            if name.startswith(prefix)
        }
        counts = sorted(points)
        medians = [points[count]["median"] for count in counts]
        errors = [
            [abs(points[count]["quartiles"][side] - points[count]["median"]) for count in counts] for side in (0, 1)
        ]
        axis.errorbar(counts, medians, errors, color=colour, marker=marker, capsize=3, label=mode.replace("_", " "))
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("experts")
    axis.axhline(1, color=GUIDE, linewidth=0.8, linestyle=":")
    axis.legend(title="routing", frameon=False, fontsize=9)


def _generation(axis: Any, section: dict[str, Any] | None) -> None:
    axis.set_title("Greedy generation, 1 expert a token: speed", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    if section is None:
        return
    colours = ("#d9d9d9", "#969696", "#e07b00", "#1f6fb4", "#7fb2dd")
    width = 0.16
    axis.set_ylabel("base = 1")
    batches = list(section["batches"])
    for index, (name, colour) in enumerate(zip(GENERATION, colours, strict=True)):
        found = [section["batches"][batch]["ratios"].get(name) for batch in batches]
        places = [place + (index - 2) * width for place, ratio in enumerate(found) if ratio is not None]
        axis.bar(
            places, [ratio["median"] for ratio in found if ratio is not None], width, color=colour, label=label(name)
        )
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2)
