"""Writes ``docs/flags.md`` from the dataclasses of the flags; ``make docs`` runs it, a test compares."""

import dataclasses
from pathlib import Path

from dylo_moe.config.commands import COMMANDS
from dylo_moe.config.parser import Group, flag_of, groups_of
from dylo_moe.config.trainer_fields import REFUSED, PassthroughArgs

PROGRAMS = ("train", "acquire", "experts", "benchmark", "generate", "datasets", "submit")
PAGE = Path(__file__).parents[1] / "docs" / "flags.md"


def page() -> str:
    """Return the whole page as Markdown."""
    parts = ["# Flags\n", "Written by `make docs` from the code. Each flag may be written with `-` or `_`.\n"]
    for program in PROGRAMS:
        parts.append(f"## `dylora-moe {program}`\n")
        groups = groups_of(COMMANDS[program][0])
        # acquire takes the flags of train too
        for group in groups[:1] if program == "acquire" else groups:
            if issubclass(group, PassthroughArgs):
                parts.append(_other_fields(group))
                continue
            parts.append(f"### {group.title}\n\n| flag | default | |\n| --- | --- | --- |")
            parts.extend(_row(field) for field in dataclasses.fields(group))
            parts.append("")
    return "\n".join(parts)


def _other_fields(group: type[Group]) -> str:
    rows = [f"| `--{name}` | {reason} |" for name, reason in REFUSED.items()]
    about = str(PassthroughArgs.__doc__).replace("``", "`")
    return (
        f"### {group.title}\n\n{about}\nIt is passed on unchanged, as in "
        "`--adam_beta2 0.95`. Either of `--eval_steps` and `--save_steps` alone means both. Refused are:\n\n"
        "| flag | because |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _row(field: "dataclasses.Field[object]") -> str:
    flag = flag_of(field)
    names = dict.fromkeys([field.name.rstrip("_"), *flag.aliases])
    default = "" if field.default is None else f"`{field.default}`"
    return f"| {', '.join(f'`--{name}`' for name in names)} | {default} | {flag.help} |"


if __name__ == "__main__":
    PAGE.write_text(page())
