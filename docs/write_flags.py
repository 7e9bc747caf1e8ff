"""Writes ``docs/flags.md`` from the dataclasses that are the flags; ``make docs`` runs it, a test compares."""

import dataclasses
from pathlib import Path

from dylo_moe.config import (
    ACQUIRE_GROUPS,
    BENCHMARK_GROUPS,
    DATASETS_GROUPS,
    EXPERTS_GROUPS,
    GENERATE_GROUPS,
    SUBMIT_GROUPS,
    TRAIN_GROUPS,
)
from dylo_moe.trainer_fields import REFUSED, PassedOn

PROGRAMS = {
    "train": TRAIN_GROUPS,
    "acquire": ACQUIRE_GROUPS[:1],
    "experts": EXPERTS_GROUPS,
    "benchmark": BENCHMARK_GROUPS,
    "generate": GENERATE_GROUPS,
    "datasets": DATASETS_GROUPS,
    "submit": SUBMIT_GROUPS,
}
PAGE = Path(__file__).with_name("flags.md")


def page() -> str:
    """The whole page as Markdown."""
    parts = ["# Flags\n", "Written by `make docs` from the code. Each flag may be written with `-` or `_`.\n"]
    for program, groups in PROGRAMS.items():
        parts.append(f"## `dylora-moe {program}`\n")
        for group in groups:
            if issubclass(group, PassedOn):
                parts.append(_passed_on(group))
                continue
            parts.append(f"### {group._argument_group_name}\n\n| flag | default | |\n| --- | --- | --- |")
            parts.extend(_row(field) for field in dataclasses.fields(group))
            parts.append("")
    return "\n".join(parts)


def _passed_on(group: type[PassedOn]) -> str:
    rows = [f"| `--{name}` | {reason} |" for name, reason in REFUSED.items()]
    about = str(PassedOn.__doc__).replace("``", "`")
    return (
        f"### {group._argument_group_name}\n\n{about}\nIt is passed on as it is, as in "
        "`--adam_beta2 0.95`. Either of `--eval_steps` and `--save_steps` alone means both. Refused are:\n\n"
        "| flag | because |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _row(field: "dataclasses.Field[object]") -> str:
    aliases = [alias for alias in field.metadata.get("aliases", ()) if "-" not in alias[2:]]
    names = list(dict.fromkeys([f"--{field.name.rstrip('_')}", *aliases]))
    default = "" if field.default is None else f"`{field.default}`"
    return f"| {', '.join(f'`{name}`' for name in names)} | {default} | {field.metadata['help']} |"


if __name__ == "__main__":
    PAGE.write_text(page())
