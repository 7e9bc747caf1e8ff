"""Format the scores of a benchmark run, or the difference between two runs, as tables for a terminal."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dylo_moe.evaluation import BenchmarkResult, Difference, Estimate, ModelRecord


def result_table(result: BenchmarkResult) -> RenderableType:
    """Return a table of pass@k for every benchmark, with standard error, 95% interval, tokens and time."""
    table = Table(title=f"{result.model.name} ({result.model.kind} {result.model.digest[:8]})", title_justify="left")
    table.add_column("benchmark")
    for column in ("tasks", "pass@k", "score", "95% interval"):
        table.add_column(column, justify="right")
    for name, record in result.benchmarks.items():
        for k, estimate in record.pass_at.items():
            table.add_row(
                name, f"{len(record.verdicts):,}", f"pass@{k}", _score(estimate), _interval(estimate.interval)
            )
    facts = Table.grid(padding=(0, 2))
    speed = f", {result.generated_tokens / result.generation_seconds:.0f} tokens/s" if result.generated_tokens else ""
    facts.add_row("Samples", f"{result.samples:,} with {result.tokens:,} tokens{speed}, {result.cut_off:,} cut off")
    facts.add_row("Prompts", f"{result.settings.prompt_style}, {result.prompts_hash[:8]}")
    facts.add_row("Time", f"{result.seconds / 60:.1f} min")
    return Group(table, facts)


def comparison_table(differences: Mapping[str, Difference], before: ModelRecord, after: ModelRecord) -> RenderableType:
    """Return a table of both pass@1 scores per benchmark, their difference with its interval, and the changed tasks."""
    table = Table(title=f"{before.name} → {after.name}, pass@1", title_justify="left")
    table.add_column("benchmark")
    for column in ("tasks", "before", "after", "difference", "95% interval"):
        table.add_column(column, justify="right")
    lines: list[Text] = []
    for name, change in differences.items():
        table.add_row(
            name,
            f"{change.tasks:,}",
            _score(change.before),
            _score(change.after),
            f"{change.difference:+.3f}",
            _interval(change.interval, "+.3f"),
        )
        lines += [
            Text(f"{name}, {title}: {', '.join(tasks) or 'none'}")
            for title, tasks in (("gained", change.gained), ("lost", change.lost))
        ]
    return Group(table, *lines)


def _score(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {estimate.standard_error:.3f}"


def _interval(interval: tuple[float, float], form: str = ".3f") -> str:
    return " to ".join(format(end, form) for end in interval)
