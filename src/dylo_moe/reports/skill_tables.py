"""Format skills and experts as tables for a terminal. Every figure comes from the checkpoint or its model."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from dylo_moe.skills import ExpertFacts, ExportedAdapter, KeptLoss, NoveltyReport, SkillLibrary


def novelty_line(name: str, report: NoveltyReport, expert: str, rank: int) -> str:
    """Return one line about the novelty of a skill and the expert that learns it."""
    learns = f"{expert} of rank {rank} learns it"
    if report.nearest is None:
        return f"{name}: the first skill; {learns}"
    similar = ", ".join(f"{known} {value:.3f}" for known, value in report.similarity.items())
    kind = "new" if report.novel else f"known, as {report.nearest}"
    share = report.high_entropy_share
    entropy = "" if share is None else f", the router unsure of {share:.0%}"
    return (
        f"{name}: {kind} by {report.measure} ({report.outlier_share:.0%} of its examples beyond every known skill"
        f"{entropy}; cosine to {similar}); {learns}"
    )


def exported_line(name: str, folder: str, exported: ExportedAdapter) -> str:
    """Return one line about an expert that was exported."""
    line = f"Exported {name} to {folder}: rank {exported.rank}, lora_alpha {exported.alpha:g}"
    if exported.trained_rank is None:
        return line
    return f"{line}; twice the {exported.trained_rank} that are trained, as the other half holds PiSSA's constant part"


def experts_table(experts: Sequence[ExpertFacts], library: SkillLibrary | None) -> Table:
    """Return a table of the experts: skills, rank, size, maturity, and newest share of the tokens of each skill."""
    table = Table(title="Experts", title_justify="left")
    for column in ("expert", "skills", "rank", "parameters", "maturity", "usage"):
        table.add_column(column, overflow="fold")
    newest = library.skills[-1].usage if library and library.skills else {}
    for expert in experts:
        skills = [skill.name for skill in library.skills if skill.expert == expert.name] if library else []
        usage = [f"{skill} {shares.get(expert.name, 0.0):.1%}" for skill, shares in newest.items()]
        state = "shared" if expert.maturity is None else "mature" if expert.maturity else "young"
        maturity = state + (", frozen" if expert.frozen else "")
        table.add_row(
            *(expert.name, ", ".join(skills), str(expert.rank), f"{expert.parameters:,}", maturity, ", ".join(usage))
        )
    return table


def kept_table(losses: Mapping[str, KeptLoss]) -> Table:
    """Return a table of what a distilled LoRA kept of a mixture's loss on each kind of text."""
    table = Table(title="Held-out loss, nats per token", title_justify="left")
    for column in ("sample", "base", "mixture", "mean update", "distilled"):
        table.add_column(column, justify="left" if column == "sample" else "right")
    for name, found in losses.items():
        table.add_row(name, *(f"{loss:.3f}" for loss in found))
    return table


def loss_table(library: SkillLibrary) -> Table:
    """Return a table of held-out losses: a column for each skill, a row for the state after learning each skill."""
    table = Table(title="Held-out loss, nats per token", title_justify="left")
    table.add_column("after")
    for name in library.names:
        table.add_column(name, justify="right")
    for skill in library.skills:
        cells = (f"{skill.losses[name]:.3f}" if name in skill.losses else "" for name in library.names)
        table.add_row(skill.name, *cells)
    return table


def stream_metrics_line(library: SkillLibrary) -> str | None:
    """Return one line with forgetting and backward transfer, or None for a library without the losses for them."""
    metrics = library.stream_metrics()
    if metrics is None:
        return None
    return (
        f"Skills before the last, mean: forgetting {metrics.forgetting:+.3f}, backward transfer "
        f"{metrics.backward_transfer:+.3f} nats per token"
    )
