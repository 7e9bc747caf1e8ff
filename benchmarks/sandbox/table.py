"""Markdown table of the result of ``benchmarks.sandbox``."""

from typing import Any

_GOOD_ENDS = ("wrong", "error", "timeout", "killed", "output", "fail", "failed", "timed out")


def table(result: dict[str, Any]) -> str:
    """Return a table with a row per program: each judge's verdict, its time, and what was left behind."""
    judges = [*result["sandboxes"], *result["versions"]]
    titles = [f"here, {name}" for name in result["sandboxes"]]
    titles += [f"{name} {number}" for name, number in result["versions"].items()]
    lines = ["| it tries | " + " | ".join(titles) + " |", "| --- " * (len(judges) + 1) + "|"]
    for found in result["programs"].values():
        cells = [_cell(found["verdicts"][judge]) for judge in judges]
        lines.append("| " + " | ".join([found["tries"], *cells]) + " |")
    counts = [sum(_harmed(found["verdicts"][judge]) for found in result["programs"].values()) for judge in judges]
    cells = [f"**{count} of {len(result['programs'])}**" for count in counts]
    lines += ["| " + " | ".join(["**got through**", *cells]) + " |", "", _machine(result)]
    return "\n".join(lines)


def _harmed(verdict: dict[str, Any]) -> bool:
    return verdict["status"] not in _GOOD_ENDS or bool(verdict["processes"] or verdict["harm"])


def _cell(verdict: dict[str, Any]) -> str:
    parts = [verdict["status"]]
    parts += [f"processes that stay: {verdict['processes']:,}"] if verdict["processes"] else []
    parts += [f"files changed: {len(verdict['harm'])}"] if verdict["harm"] else []
    text = ", ".join(parts)
    return (f"**{text}**" if _harmed(verdict) else text) + f" ({verdict['seconds']:.1f} s)"


def _machine(result: dict[str, Any]) -> str:
    machine = result["environment"]
    sandboxes = "; ".join(result["sandboxes"].values())
    return f"{machine['processor']}, Python {machine['python']}. Sandboxes: {sandboxes}."
