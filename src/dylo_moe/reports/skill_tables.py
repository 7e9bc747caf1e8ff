"""Skills and experts as tables for a terminal. Every figure comes from the checkpoint or its model."""

from rich.table import Table

from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.skills.acquisition import Judgement
from dylo_moe.skills.library import SkillLibrary


def novelty_line(name: str, judgement: Judgement, expert: str) -> str:
    """What was judged of a skill, in one line."""
    report = judgement.report
    if report.nearest is None:
        return f"{name}: the first skill; {expert} learns it"
    similar = ", ".join(f"{known} {value:.3f}" for known, value in report.similarity.items())
    unsure = "" if judgement.entropy is None else f"; router entropy {judgement.entropy:.2f}"
    kind = "new" if report.novel else f"known, as {report.nearest}"
    return (
        f"{name}: {kind} ({report.beyond:.0%} of its examples beyond every known skill by {report.measure}; "
        f"cosine to {similar}{unsure}); {expert} learns it"
    )


def skills_table(model: DyLoRA_MoE, library: SkillLibrary) -> Table:
    """Each expert with its skills, rank, size and maturity, and its share of each skill's tokens at the last look."""
    rows = {
        name: (
            str(model.experts.peft_model.peft_config[name].r),
            f"{model.experts.num_parameters(name):,}",
            model.router.maturity[index],
        )
        for index, name in enumerate(model.experts.names)
    }
    return experts_table(rows, library)


def experts_table(rows: dict[str, tuple[str, str, int]], library: SkillLibrary | None) -> Table:
    """The same from rank, size and maturity of each expert; without a library, no skills and no usage."""
    table = Table(title="Experts", title_justify="left")
    for column in ("expert", "skills", "rank", "parameters", "maturity", "usage"):
        table.add_column(column, overflow="fold")
    last = library.skills[-1].usage if library and library.skills else {}
    for name, (rank, size, maturity) in rows.items():
        skills = [skill.name for skill in library.skills if skill.expert == name] if library else []
        usage = [f"{skill} {shares.get(name, 0.0):.1%}" for skill, shares in last.items()]
        table.add_row(name, ", ".join(skills), rank, size, "mature" if maturity else "young", ", ".join(usage))
    return table


def loss_table(library: SkillLibrary) -> Table:
    """Held-out loss of each skill (a column), right after each was learned (a row)."""
    table = Table(title="Held-out loss, nats per token", title_justify="left")
    table.add_column("after")
    for name in library.names:
        table.add_column(name, justify="right")
    for skill in library.skills:
        cells = (f"{skill.losses[name]:.3f}" if name in skill.losses else "" for name in library.names)
        table.add_row(skill.name, *cells)
    return table
