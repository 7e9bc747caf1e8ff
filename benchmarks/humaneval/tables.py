"""Markdown tables of the result of ``benchmarks.humaneval``."""

from typing import Any


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return all tables by name."""
    return {"humaneval": scores_table(result), "humaneval batches": batches_table(result)}


def scores_table(result: dict[str, Any]) -> str:
    """Return the tables of pass@1 of the base and the mixture in each style, and of their speed."""
    lines = [
        "| benchmark | prompt style | tasks | base | mixture | difference | gained | lost |",
        "| --- " * 8 + "|",
    ]
    for style, run in result["styles"].items():
        for name, found in run["differences"].items():
            cells = [
                f"`{name}`",
                f"`{style}`",
                f"{found['tasks']:,}",
                *(f"{found[one]['value']:.3f} ({_interval(found[one]['interval'])})" for one in ("before", "after")),
                f"{found['difference']:+.3f} ({_interval(found['interval'], '+.3f')})",
                *(f"{len(found[key])}" for key in ("gained", "lost")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    first, machine = next(iter(result["styles"].values())), result["environment"]
    lines += [
        "",
        "SmolLM2-135M-Instruct and the demo's mixture on it, float32, greedy, at most "
        f"{first['settings']['max_new_tokens']} tokens; pass@1 with 95% intervals (Wilson's for a score, paired "
        f"bootstrap for the difference). Sandbox: {first['base']['sandbox']}. {machine['processor']}, "
        f"{machine['threads']} threads; {_versions(first['base']['versions'])}.",
        "",
        "| run | answers | tokens | tokens/s | minutes, with judging | truncated |",
        "| --- " * 6 + "|",
        *(_cost(who, style, run[who]) for style, run in result["styles"].items() for who in ("base", "mixture")),
    ]
    return "\n".join(lines)


def batches_table(result: dict[str, Any]) -> str:
    """Return the table of the speed of batches, with the number of answers that they change."""
    found = result["batching"]
    lines = ["| answers | tokens/s, each round |", "| --- | --- |"]
    for name, speeds in found["tokens_per_second"].items():
        lines.append(f"| {name} | {', '.join(f'{speed:.0f}' for speed in speeds)} |")
    ratio = found["ratio"]
    lines += [
        "",
        f"Batches of {found['batch_size']}: {ratio['median']:.1f} times as many tokens per second "
        f"({ratio['quartiles'][0]:.1f} to {ratio['quartiles'][1]:.1f} over {ratio['rounds']} rounds), and "
        f"{len(found['different'])} of {found['answers']} greedy answers differ from those generated alone.",
    ]
    return "\n".join(lines)


def _interval(interval: list[float], form: str = ".3f") -> str:
    return " to ".join(format(end, form) for end in interval)


def _cost(who: str, style: str, run: dict[str, Any]) -> str:
    speed = run["generated_tokens"] / run["generation_seconds"]
    return (
        f"| {who}, `{style}` | {run['samples']:,} | {run['tokens']:,} | {speed:.0f} | {run['seconds'] / 60:.1f} | "
        f"{run['cut_off']:,} |"
    )


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "evalplus"))
