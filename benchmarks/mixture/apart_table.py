"""Tables of the study of adapters that were trained apart."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

Rows = Sequence[Sequence[float]]
Result = Mapping[str, Any]
ORACLE, BASE = "oracle", "base"


class Cell(NamedTuple):
    """What the seeds of one arm found on one set.

    Attributes:
        losses: Mean held-out loss over the tasks, one for each seed, in nats per token.
        right: Mean share of answer tokens that are routed right; None for an arm without routes.
        options: The options that were chosen for the arm, of the first seed.
    """

    losses: list[float]
    right: float | None
    options: dict[str, float]


def task_loss(rows: Rows) -> float:
    """Return the loss of a task's rows, in nats per answer token."""
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def routed_right(rows: Rows) -> float:
    """Return the share of a task's answer tokens that went to the task's own adapter."""
    return sum(row[3] for row in rows) / sum(row[1] for row in rows)


def table(result: Result) -> str:
    """Return all tables, each after its title."""
    return "\n\n".join(f"#### {title}\n\n{write(result)}" for title, write in TABLES.items())


def sets_table(name: str) -> Callable[[Result], str]:
    """Return the writer of the table of all arms on one set, with all its adapters."""

    def write(result: Result) -> str:
        found = {number: arms for (one, number), arms in _cells(result).items() if one == name}
        if not found:
            return "Not measured yet."
        arms = found[max(found)]
        oracle = mean(arms[ORACLE].losses) if ORACLE in arms else None
        lines = []
        for arm, cell in sorted(arms.items(), key=lambda item: mean(item[1].losses)):
            options = ", ".join(f"{option} {value:g}" for option, value in cell.options.items())
            lines.append(
                [
                    f"{arm} ({options})" if options else arm,
                    _with_range(cell.losses),
                    "" if oracle is None else f"{mean(cell.losses) / oracle - 1:+.1%}",
                    "" if cell.right is None else f"{cell.right:.1%}",
                ]
            )
        head = ["one model of all adapters", "loss", "against each task's own adapter", "answer tokens routed right"]
        seeds = max(len(cell.losses) for cell in arms.values())
        note = f"Loss in nats per answer token, mean of {max(found)} tasks; up to {seeds} seeds, lowest to highest."
        return f"{_markdown(head, lines)}\n\n{note}"

    return write


def growth_table(result: Result) -> str:
    """Return the losses of the arms as the number of adapters grows, against each task's own adapter."""
    cells = {number: arms for (name, number), arms in _cells(result).items() if name == "superni"}
    numbers = sorted(cells)
    names = sorted(
        {arm for arms in cells.values() for arm in arms if len(numbers) == sum(arm in a for a in cells.values())}
    )

    def against(arm: str, number: int) -> float:
        return cells[number][arm].losses[0] / cells[number][ORACLE].losses[0] - 1

    names = sorted((name for name in names if name != ORACLE), key=lambda name: against(name, numbers[-1]))
    lines = [[name, *(f"{against(name, number):+.1%}" for number in numbers)] for name in names]
    return _markdown(["against each task's own adapter", *(f"{number} adapters" for number in numbers)], lines)


def switching_table(result: Result) -> str:
    """Return the losses on answers that stand after an example of another task."""
    return _arms_table(result, "switching", lambda run: {"loss": _mean(task_loss, run), "routed right": _right(run)})


def answers_table(result: Result) -> str:
    """Return ROUGE-L and exact answers."""

    def scores(run: Any) -> dict[str, str]:
        tasks = run["tasks"].values()
        rouge, exact = (mean(mean(row[place] for row in rows) for rows in tasks) for place in (0, 1))
        return {"ROUGE-L": f"{rouge:.3f}", "exactly right": f"{exact:.1%}"}

    return _arms_table(result, "answers", scores)


def unknown_table(result: Result) -> str:
    """Return the losses on tasks that no adapter learned, beside the base's on the same rows."""
    lines = []
    for key, found in _runs(result, "unknown"):
        name, number, seed = key
        base = result["runs"].get(f"{name}/{number}/{seed}/{BASE}") or {"tasks": {}}
        for task, rows in found.items():
            if task in base["tasks"]:
                own, alone = task_loss(rows), task_loss(base["tasks"][task])
                lines.append([name, task, f"{alone:.3f}", f"{own:.3f}", f"{own / alone - 1:+.1%}"])
    return _markdown(["set", "task without its adapter", "base", "compose of the others", "change"], lines)


def merges_table(result: Result) -> str:
    """Return how far one adapter at weight 1 is from itself after each merge."""
    lines = [[kind, f"{value:.2g}"] for _, found in _runs(result, "merges") for kind, value in found.items()]
    return _markdown(["merge of one adapter at weight 1", "largest change of a logit, as a share of the effect"], lines)


def costs_table(result: Result) -> str:
    """Return generation speed relative to the base, memory, and the time that making the model took."""
    lines = []
    for _, found in _runs(result, "costs"):
        for arm, cost in found.items():
            speed, (low, high) = 1 / cost["generation"]["median"], cost["generation"]["quartiles"]
            lines.append(
                [
                    arm,
                    f"{speed:.2f} ({1 / high:.2f} to {1 / low:.2f})",
                    f"{cost['megabytes']:.1f}",
                    f"{cost['seconds']:.1f}",
                ]
            )
    return _markdown(["", "generation, relative to the base", "MB beside the base", "seconds to make"], lines)


def lost_table(result: Result) -> str:
    """Return where ``compose`` loses against each task's own adapter: by task, route and first token."""
    lines = []
    for name in ("superni", "hard", "mbxp"):
        cells = {number for (one, number) in _cells(result) if one == name}
        if not cells:
            continue
        place = f"{name}/{max(cells)}/0"
        composed, oracle = (result["runs"].get(f"{place}/{arm}") for arm in ("compose", ORACLE))
        if composed is None or oracle is None:
            continue
        for task, rows in composed["tasks"].items():
            own = oracle["tasks"][task]
            lost = task_loss(rows) - task_loss(own)
            first = sum(row[2] - other[2] for row, other in zip(rows, own, strict=True)) / sum(row[1] for row in rows)
            lines.append([name, task, f"{routed_right(rows):.1%}", f"{lost:+.3f}", f"{first:+.3f}"])
    lines.sort(key=lambda line: -float(line[3]))
    head = ["set", "task", "answer tokens routed right", "lost, nats per token", "of it at the first token"]
    return _markdown(head, lines[:12])


TABLES: dict[str, Callable[[Result], str]] = {
    "SuperNI, prompts with the definition of their task": sets_table("superni"),
    "SuperNI, inputs alone": sets_table("hard"),
    "MBXP": sets_table("mbxp"),
    "More adapters": growth_table,
    "Where the token's route loses": lost_table,
    "Texts that change their task": switching_table,
    "A task that no adapter learned": unknown_table,
    "Generated answers": answers_table,
    "Costs": costs_table,
    "PEFT's merges of one adapter": merges_table,
}


def _cells(result: Result) -> dict[tuple[str, int], dict[str, Cell]]:
    """Return what was found, by set and number of adapters, then by arm."""
    found: dict[tuple[str, int], dict[str, list[Any]]] = {}
    for key, run in result["runs"].items():
        name, number, seed, arm = [*key.split("/", 3), "", "", ""][:4]
        if number.isdigit() and seed.isdigit():
            found.setdefault((name, int(number)), {}).setdefault(arm, []).append(run)
    return {place: {arm: _cell(seeds) for arm, seeds in arms.items()} for place, arms in sorted(found.items())}


def _cell(seeds: Sequence[Any]) -> Cell:
    options = {name: value for name, value in seeds[0].items() if name not in ("tasks", "seconds")}
    routed = all(len(rows[0]) > 3 for run in seeds for rows in run["tasks"].values())
    right = mean(routed_right(rows) for run in seeds for rows in run["tasks"].values()) if routed else None
    return Cell([mean(map(task_loss, run["tasks"].values())) for run in seeds], right, options)


def _runs(result: Result, part: str) -> Iterable[tuple[list[str], Any]]:
    return [(key.split("/")[1:], run) for key, run in result["runs"].items() if key.startswith(f"{part}/")]


def _arms_table(result: Result, part: str, values: Callable[[Any], Mapping[str, str]]) -> str:
    found = [(*key, values(run)) for key, run in _runs(result, part)]
    columns = [*(found[0][-1] if found else {})]
    return _markdown(["set", "one model", *columns], [[name, arm, *cells.values()] for name, _, arm, cells in found])


def _mean(measure: Callable[[Rows], float], run: Any) -> str:
    return f"{mean(map(measure, run['tasks'].values())):.3f}"


def _right(run: Any) -> str:
    return "" if len(next(iter(run["tasks"].values()))[0]) < 4 else f"{float(_mean(routed_right, run)):.1%}"


def _with_range(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
