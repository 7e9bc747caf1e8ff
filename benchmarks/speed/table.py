"""Markdown tables of a speed result: targets with their measurements, and the contenders side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.contenders import BASE, REFERENCE, label

NOTHING = "-"
TARGETS_HEADING, PEERS_HEADING = "#### Targets", "#### Compared with others"
PEERS = (
    *(BASE, REFERENCE, "lora_r64", "peft_4", "peft_8", "peft_16", "arrow_4", "xlora_4", "xlora_8"),
    *("mixlora_4", "mixlora_8", "naive_4", "ours_prefix_4", "ours_per_layer_4", "ours_final_4"),
    *("ours_prefix_8", "ours_per_layer_8", "ours_per_layer_16"),
)


Path = tuple[str, ...]


@dataclass
class Row:
    """Row of the table of targets.

    Attributes:
        text: The measured ratio, in words.
        paths: Path of each figure in the result's sections, by the figure's name.
        limit: Target of each figure; None for figures without one.
        at_least: Whether the target is a lower bound.
    """

    text: str
    paths: Mapping[str, Path]
    limit: float | None = None
    at_least: bool = False


def _single_pass(text: str, before: Path, limit: float, experts: int = 4, *, at_least: bool = False) -> Row:
    """Return a row with a figure for each routing mode of one pass."""
    modes = {"prefix": "ours_prefix", "per layer": "ours_per_layer"}
    return Row(text, {mode: (*before, f"{name}_{experts}") for mode, name in modes.items()}, limit, at_least)


def _train(name: str, limit: float) -> Row:
    return Row(f"train step relative to LoRA: {label(name)}", {"": ("train", "ratios", name)}, limit)


def _generation(batch: int) -> Row:
    text = f"generation speed relative to the base: 4 experts, batch {batch}"
    return _single_pass(text, ("generate", "batches", str(batch), "ratios"), 0.85, at_least=True)


def _layer(what: str, text: str) -> Row:
    paths = {f"{count} experts": ("codegemma", what, "ratios", f"ours_per_layer_{count}") for count in (4, 16)}
    return Row(f"{text} of a CodeGemma-2B layer relative to LoRA: ours, per layer", paths)


LOSS = "loss over {vocabulary} words"
ROWS = (
    _train("ours_prefix_4", 0.85),
    _train("ours_per_layer_4", 1.05),
    _train("ours_final_4", 1.45),
    _train("ours_per_layer_16", 1.25),
    _single_pass("forward relative to LoRA: 4 experts", ("forward", "ratios"), 1.0),
    _single_pass("forward with 64 experts relative to 4", ("experts", "ratios"), 1.25, 64),
    _single_pass("forward with 256 experts relative to 4", ("experts", "ratios"), 1.6, 256),
    _generation(1),
    _generation(8),
    _single_pass("peak memory of a train step relative to LoRA: 4 experts", ("memory", "ratios"), 1.05),
    Row(
        "train step of a shared expert + one routed relative to LoRA of as many parameters",
        {"": ("mixtures", "train", "ratios", "shared")},
        1.0,
    ),
    Row(
        "generation speed relative to the base: shared expert + one routed",
        {"": ("mixtures", "generate", "ratios", "shared")},
        0.85,
        at_least=True,
    ),
    Row(
        "forward of 9 composed adapters in all layers relative to PEFT with one of them",
        {"": ("mixtures", "forward", "ratios", "composed")},
    ),
    Row(
        "generation speed of 9 composed adapters in all layers relative to PEFT with one of them",
        {"": ("mixtures", "generate", "to_adapter", "composed")},
    ),
    Row(f"peak memory of the {LOSS} relative to plain cross-entropy", {"": ("loss", "ratios", "peak_mib")}, 0.15),
    Row(
        f"time of the {LOSS} relative to plain cross-entropy",
        {"4096 tokens": ("loss", "ratios", "seconds"), "512 tokens": ("codegemma", "head", "ratios", "chunked")},
    ),
    _layer("forward", "forward"),
    _layer("train", "train step"),
)


def tables(result: dict[str, Any]) -> str:
    """Return both tables, each after its heading."""
    return f"{TARGETS_HEADING}\n\n{targets_table(result)}\n\n{PEERS_HEADING}\n\n{peers_table(result)}"


def targets_table(result: dict[str, Any]) -> str:
    """Return the table of targets and measurements; rows of sections that were not run are left out."""
    lines = ["| ratio | target | measured | reached |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        found = {which: _find(result["sections"], path) for which, path in row.paths.items()}
        measured = [f"{which} {_with_spread(figure)}".strip() for which, figure in found.items() if figure is not None]
        if not measured:
            continue
        text = row.text.format(vocabulary=f"{result['setup']['vocabulary']:,}")
        target = NOTHING if row.limit is None else f"{'≥' if row.at_least else '≤'} {row.limit:.2f}"
        lines.append(_line([text, target, "; ".join(measured), _reached(row, list(found.values()))]))
    return "\n".join(lines)


def _reached(row: Row, found: list[Any]) -> str:
    """Return whether all figures of a row reach the target, compared without rounding."""
    if row.limit is None or None in found:
        return NOTHING
    values = [_median(figure) for figure in found]
    return "yes" if all(value >= row.limit if row.at_least else value <= row.limit for value in values) else "no"


def peers_table(result: dict[str, Any]) -> str:
    """Return the table of all contenders, with the conditions of the measurement."""
    columns: list[tuple[str, tuple[str, ...]]] = [
        ("forward", ("forward", "ratios")),
        ("train step", ("train", "ratios")),
        ("train memory", ("memory", "ratios")),
    ]
    batches = _find(result["sections"], ("generate", "batches")) or {}
    columns.extend((f"generation, batch {batch}", ("generate", "batches", batch, "ratios")) for batch in batches)
    titles = [title for title, _ in columns]
    lines = [_line(["", *titles]), _line(["---"] * (len(titles) + 1))]
    for name in PEERS:
        cells = [_find(result["sections"], (*path, name)) for _, path in columns]
        reason = result["not_run"].get(name)
        texts = [NOTHING if cell is None else f"{_median(cell):.2f}" for cell in cells]
        if reason is not None and all(cell is None for cell in cells):
            texts = [reason.replace("|", "/"), *[NOTHING] * (len(cells) - 1)]
        lines.append(_line([label(name), *texts]))
    return "\n".join([*lines, "", _conditions(result)])


def _conditions(result: dict[str, Any]) -> str:
    """Return the meaning and the conditions of the figures, in two paragraphs."""
    setup, machine = result["setup"], result["environment"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    generation = result["sections"].get("generate")
    meaning = (
        "Forward, train step and memory are relative to PEFT LoRA of rank 16 (lower is better), generation is speed "
        "relative to the base (higher is better). Times are medians of ratios within interleaved rounds. Ours routes a "
        "token to 2 experts in the forward, to all in training, to 1 in generation."
    )
    conditions = (
        f"{setup['model']}, {setup['dtype']}, {setup['batch']} x {setup['length']} tokens, rank {setup['rank']} on the "
        "attention projections. "
    )
    if generation:
        few = sorted(set(generation["new_tokens"].values()))
        conditions += f"Generation is greedy, {few[-1]} tokens after {generation['prompt']}"
        conditions += f" (X-LoRA, which has no cache: {few[0]}). " if len(few) > 1 else ". "
    return f"{meaning}\n\n{conditions}{machine['processor']}, {machine['threads']} threads; {versions}."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _find(tree: Any, path: Sequence[str]) -> Any:
    """Return the entry at a path of the result; None if there is none."""
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _median(found: Any) -> float:
    return float(found["median"] if isinstance(found, dict) else found)


def _with_spread(found: Any) -> str:
    if not isinstance(found, dict) or found["rounds"] == 1:
        return f"{_median(found):.2f}"
    low, high = found["quartiles"]
    return f"{_median(found):.2f} ({low:.2f} to {high:.2f})"
