"""Report a training run as a table for people and a file for programs. Every figure comes from the run."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


class TrainingReport(BaseModel):
    """The figures of one training run.

    Attributes:
        domains: Names of the domains.
        experts: Names of the experts.
        base: Metrics of the base model on the held-out rows, named as by ``training.domain_metrics.domain_metrics``.
        mixture: The same metrics of the trained mixture, as saved.
        trainable_parameters: Number of parameters that were trained.
        base_parameters: Number of parameters of the base model.
        checkpoint: Folder of the saved mixture.
        steps: Number of optimizer steps.
        train_tokens: Number of training tokens, without padding.
        train_seconds: Wall-clock time of the training, evaluations included.
        routing: The routing mode.
        held_out_rows: Number of rows that the losses are measured on.
        versions: Versions of Python and the main packages.
        seed: Seed of the run.
        data: Number of rows used and left out per dataset, and the rows that match a benchmark task.
    """

    domains: list[str]
    experts: list[str]
    base: dict[str, float]
    mixture: dict[str, float]
    trainable_parameters: int
    base_parameters: int
    checkpoint: str
    steps: int
    train_tokens: int
    train_seconds: float
    routing: str
    held_out_rows: int
    versions: dict[str, str]
    seed: int
    data: dict[str, object] = {}


def training_table(report: TrainingReport) -> RenderableType:
    """Return the report as tables for a terminal."""
    share = report.trainable_parameters / report.base_parameters
    facts = Table.grid(padding=(0, 2))
    share_of_base = f"{share:.2%} of the base's {report.base_parameters:,}"
    minutes = report.train_seconds / 60
    facts.add_row("Trainable", f"{report.trainable_parameters:,} parameters, {share_of_base}")
    facts.add_row("Trained", f"{report.steps:,} steps, {report.train_tokens:,} tokens, {minutes:.1f} min")
    facts.add_row("Checkpoint", Text(report.checkpoint))
    return Group(_loss_table(report), _usage_table(report.domains, report.experts, report.mixture), facts)


def _loss_table(report: TrainingReport) -> Table:
    table = Table(title=f"Held-out loss, nats per token ({report.held_out_rows:,} rows)", title_justify="left")
    table.add_column("domain")
    for column in ("base", "mixture", "change"):
        table.add_column(column, justify="right")
    for domain in report.domains:
        before, after = report.base[f"loss/{domain}"], report.mixture[f"loss/{domain}"]
        table.add_row(domain, f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    return table


def _usage_table(domains: Sequence[str], experts: Sequence[str], metrics: Mapping[str, float]) -> Table:
    table = Table(title="Router usage, share of the routing weight", title_justify="left")
    table.add_column("expert")
    for domain in domains:
        table.add_column(domain, justify="right")
    for expert in experts:
        table.add_row(expert, *(f"{metrics[f'usage/{domain}/{expert}']:.1%}" for domain in domains))
    return table
