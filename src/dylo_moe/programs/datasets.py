"""``datasets``: what there is to train on, and what a dataset of the user's looks like to ``train``."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dylo_moe.config import DATASETS_GROUPS, DatasetsArguments
from dylo_moe.data.decontaminate import decontaminate
from dylo_moe.data.examples import SPLITS, read_examples, splits_of
from dylo_moe.data.registry import REGISTRY, DatasetSpec, resolve
from dylo_moe.data.rows import FORMATS
from dylo_moe.data.templates import PlainTemplate
from dylo_moe.flags import parse

_SHOWN_CHARACTERS = 400


def main(arguments: Sequence[str], program: str = "dylora-moe datasets") -> int:
    """Runs the program; returns its exit code.

    Raises:
        DyLoRAError: The user can mend it.
    """
    description = "List the datasets that train knows, or read some and show what is in them."
    (args,) = parse(DATASETS_GROUPS, program, description, arguments)
    assert isinstance(args, DatasetsArguments)
    console = Console()
    if not args.names:
        _list(console)
    for name in args.names:
        _show(name, args, console)
    return 0


def _list(console: Console) -> None:
    table = Table()
    for column in ("name", "source", "revision", "licence", "columns"):
        table.add_column(column, overflow="fold")
    for name, spec in REGISTRY.items():
        source = spec.on_hub or "this machine"
        table.add_row(
            name, source, spec.revision[:8] if spec.on_hub else "", _licence(spec), Text(", ".join(spec.columns))
        )
    console.print(table)
    console.print("Any file of yours is a dataset too: --datasets my=path/to/file.jsonl. Known by their columns are:")
    for title, (columns, _) in FORMATS.items():
        console.print(f"  {title}: {', '.join(columns)}", highlight=False)


def _licence(spec: DatasetSpec) -> Text:
    text = Text(spec.license)
    if spec.non_commercial:
        text.append(" (not for commercial use)", style="yellow")
    if spec.evaluation_only:
        text.append(" (evaluation only)", style="yellow")
    return text


def _show(name: str, args: DatasetsArguments, console: Console) -> None:
    entry = resolve(name, args.data_dir)
    examples = read_examples(entry, PlainTemplate(), skip_bad_rows=args.skip_bad_rows)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("licence", _licence(entry.spec))
    splits = splits_of(examples.rows)
    for index, split in enumerate(SPLITS):
        facts.add_row(split, f"{int((splits == index).sum()):,} rows")
    if examples.skipped:
        facts.add_row("left out", Text(f"{examples.skipped:,} rows; the first: {examples.first_skipped}"))
    if not entry.spec.evaluation_only:
        _, found = decontaminate(examples.rows, entry.name)
        facts.add_row("benchmark tasks", f"{found.dropped:,} rows, which train leaves out; {found.near:,} come near")
    console.print(Text(entry.name, style="bold"), facts)
    if len(examples.rows):
        row = examples.rows[0]
        for part in ("prompt", "response"):
            console.print(Text(f"{part} of the first row", style="dim"))
            console.print(Text(row[part][:_SHOWN_CHARACTERS].rstrip()))
