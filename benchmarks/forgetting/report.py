"""Tables and figure of the result of ``benchmarks.forgetting``. The figure needs matplotlib."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dylo_moe.skills.continual_metrics import backward_transfer, relative_forgetting

STREAMS = {"ours": "ours, one expert a skill", "sequential": "one LoRA, in sequence", "replay": "the same, 1 % replay"}
ENOUGH, SHOWN = 0.95, 8
"""AUROC below which a pair of skills is listed, and how many pairs are listed, the lowest first."""
COLOURS = {"ours": "C0", "sequential": "C1", "replay": "C2", "base": "0.75", "oracle": "C3", "joint": "C4"}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return all tables by name, as Markdown."""
    return {"arms": arms_table(result), "gates": gates_table(result), "novelty": novelty_table(result)}


def arms_table(result: dict[str, Any]) -> str:
    """Return the table of the loss after the whole stream and the forgetting of older skills."""
    seeds, skills = seeds_of(result), list(result["settings"]["skills"])
    oracle = [statistics.fmean(run(result, "ours", seed)["oracle"]) for seed in seeds]
    titles = [
        "",
        "mean loss at the end",
        "relative to the oracle",
        "forgetting, mean",
        "worst skill",
        "backward transfer",
    ]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    base = [statistics.fmean(run(result, "ours", seed)["base"]) for seed in seeds]
    lines.append(_row("base, untrained", base, oracle))
    for arm, title in STREAMS.items():
        matrices = [square(run(result, arm, seed)["losses"]) for seed in seeds]
        relative = [relative_forgetting(matrix, lower_is_better=True) for matrix in matrices]
        worst = int(np.mean(relative, axis=0).argmax())
        transfer = [backward_transfer(matrix, lower_is_better=True) for matrix in matrices]
        rest = [
            _percent([statistics.fmean(one) for one in relative]),
            f"{_percent([one[worst] for one in relative])} ({skills[worst]})",
            spread(transfer, "+.4f"),
        ]
        lines.append(_row(title, [float(matrix[-1].mean()) for matrix in matrices], oracle, rest))
    lines.append(_row("each skill's own expert (oracle)", oracle, oracle))
    joint = [statistics.fmean(run(result, "joint", seed)["losses"][-1]) for seed in seeds]
    lines.append(_row("one LoRA, all skills mixed (joint)", joint, oracle))
    return "\n".join([*lines, "", _setting(result)])


def gates_table(result: dict[str, Any]) -> str:
    """Return the table of each gate's routing accuracy after the whole stream, and the experts' loss with it."""
    seeds = seeds_of(result)
    oracle = [statistics.fmean(run(result, "ours", seed)["oracle"]) for seed in seeds]
    lines = ["| gate | tokens | examples | mean loss | relative to the oracle |", "| --- " * 5 + "|"]
    for gate in run(result, "ours", seeds[0])["gates"]:
        found = [run(result, "ours", seed)["gates"][gate] for seed in seeds]
        losses = [statistics.fmean(one["losses"]) for one in found if "losses" in one]
        shares = [spread([one[what] for one in found], ".1%") for what in ("tokens", "examples")]
        cells = ["", ""]  # no router of the study had this gate
        if losses:
            relative = [loss / best - 1 for loss, best in zip(losses, oracle, strict=True)]
            cells = [spread(losses, ".4f"), _percent(relative)]
        lines.append(f"| {gate} | {shares[0]} | {shares[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def novelty_table(result: dict[str, Any]) -> str:
    """Return the table of AUROC by measure, with the pairs of skills that it separates badly."""
    seeds, skills = seeds_of(result), list(result["settings"]["skills"])
    lines = ["| novelty by | mean AUROC | lowest | below 0.95 |", "| --- " * 4 + "|"]
    for measure in run(result, "ours", seeds[0])["auroc"]:
        values = np.mean([np.array(run(result, "ours", seed)["auroc"][measure], dtype=float) for seed in seeds], axis=0)
        if values.ndim == 1:
            named = {name: value for name, value in zip(skills, values, strict=True)}
        else:
            named = {
                f"{new} after {known}": values[one, other]
                for one, known in enumerate(skills)
                for other, new in enumerate(skills)
                if one != other
            }
        low = sorted((value, name) for name, value in named.items() if value < ENOUGH)
        shown = ", ".join(f"{name} {value:.3f}" for value, name in low[:SHOWN]) or "none"
        shown += f", and {len(low) - SHOWN} more" if len(low) > SHOWN else ""
        every = list(named.values())
        lines.append(f"| {measure} | {statistics.fmean(every):.3f} | {min(every):.3f} | {shown} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the loss of the older skills along the stream, and every skill's loss at its end."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    seeds, skills = seeds_of(result), list(result["settings"]["skills"])
    figure, (along, end) = pyplot.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
    for arm, title in STREAMS.items():
        matrix = np.mean([square(run(result, arm, seed)["losses"]) for seed in seeds], axis=0)
        worse = [
            float((matrix[stage, :stage] / matrix.diagonal()[:stage] - 1).mean()) for stage in range(1, len(skills))
        ]
        along.plot(range(2, len(skills) + 1), [100 * one for one in worse], label=title, color=COLOURS[arm], marker="o")
    along.set_title("Loss of the older skills against when they were learned, %", fontsize=10)
    along.set_xlabel("skills learned")
    along.set_xticks(range(2, len(skills) + 1))
    last = {
        "base": [run(result, "ours", seed)["base"] for seed in seeds],
        **{arm: [run(result, arm, seed)["losses"][-1] for seed in seeds] for arm in STREAMS},
        "oracle": [run(result, "ours", seed)["oracle"] for seed in seeds],
        "joint": [run(result, "joint", seed)["losses"][-1] for seed in seeds],
    }
    for place, (arm, losses) in enumerate(last.items()):
        middles = np.arange(len(skills)) + (place - (len(last) - 1) / 2) * 0.13
        end.bar(middles, np.mean(losses, axis=0), 0.12, label=STREAMS.get(arm, arm), color=COLOURS[arm])
    end.set_xticks(range(len(skills)), skills, fontsize=8)
    end.set_title("Held-out loss after the whole stream, nats per token", fontsize=10)
    for axis in (along, end):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(result: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """Return one run of a result."""
    found: dict[str, Any] = result["runs"][f"{arm} {seed}"]
    return found


def seeds_of(result: dict[str, Any]) -> list[int]:
    """Return the seeds for which every arm has a run."""
    arms = {name.split()[0] for name in result["runs"]}
    seeds = sorted({int(name.split()[1]) for name in result["runs"]})
    return [seed for seed in seeds if all(f"{arm} {seed}" in result["runs"] for arm in arms)]


def square(losses: Sequence[Sequence[float]]) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return a (skills learned, skill) matrix of losses, NaN for skills not learned yet."""
    matrix = np.full((len(losses), len(losses)), np.nan)
    for stage, row in enumerate(losses):
        matrix[stage, : len(row)] = row
    return matrix


def _row(title: str, losses: list[float], oracle: list[float], rest: Sequence[str] = ("", "", "")) -> str:
    relative = _percent([loss / best - 1 for loss, best in zip(losses, oracle, strict=True)])
    return "| " + " | ".join([title, spread(losses, ".4f"), relative, *rest]) + " |"


def _percent(values: list[float]) -> str:
    return spread(values, "+.2%")


def spread(values: list[float], form: str) -> str:
    """Format the mean and the standard deviation."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def _setting(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["environment"]
    skills = ", ".join(f"`{name}` ({train:,} rows)" for name, (train, _) in settings["skills"].items())
    return (
        f"Held-out loss in nats per labelled token, mean ± standard deviation over {len(seeds_of(result))} seeds; "
        f"at most {settings['held_out']} held-out rows per skill. Skills in order: {skills}. "
        f"{settings['steps']} steps of {settings['batch_size']} rows of at most {settings['max_length']} tokens "
        f"for each; rank {settings['rank']}; SmolLM2-135M-Instruct in bfloat16; torch {machine['versions']['torch']}."
    )
