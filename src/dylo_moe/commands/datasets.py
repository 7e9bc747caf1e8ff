"""``datasets``: list the known datasets, or show how ``train`` reads some of them."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dylo_moe.config import DatasetsArgs, parse
from dylo_moe.data import (
    FORMATS,
    REGISTRY,
    SPLITS,
    DatasetSpec,
    PlainTemplate,
    decontaminate,
    read_examples,
    resolve,
    splits_of,
)

_SHOWN_CHARACTERS = 400


def main(arguments: Sequence[str], program: str = "dylora-moe datasets") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    description = "List the datasets that train knows, or read some and show what is in them."
    args = parse(DatasetsArgs, program, description, arguments)
    console = Console()
    if not args.names:
        _list(console)
    for name in args.names:
        _show(name, args, console)
    return 0


def _list(console: Console) -> None:
    table = Table()
    for column in ("name", "source", "revision", "license", "columns"):
        table.add_column(column, overflow="fold")
    for name, spec in REGISTRY.items():
        source = spec.on_hub or "this machine"
        table.add_row(
            name, source, spec.revision[:8] if spec.on_hub else "", _license(spec), Text(", ".join(spec.columns))
        )
    console.print(table)
    console.print("Any file is a dataset too: --datasets my=path/to/file.jsonl. These columns are recognized:")
    for title, (columns, _) in FORMATS.items():
        console.print(f"  {title}: {', '.join(columns)}", highlight=False)


def _license(spec: DatasetSpec) -> Text:
    text = Text(spec.license)
    if spec.non_commercial:
        text.append(" (not for commercial use)", style="yellow")
    if spec.evaluation_only:
        text.append(" (evaluation only)", style="yellow")
    return text


def _show(name: str, args: DatasetsArgs, console: Console) -> None:
    entry = resolve(name, args.data_dir)
    examples = read_examples(entry, PlainTemplate(), skip_bad_rows=args.skip_bad_rows)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("license", _license(entry.spec))
    splits = splits_of(examples.rows)
    for index, split in enumerate(SPLITS):
        facts.add_row(split, f"{int((splits == index).sum()):,} rows")
    if examples.skipped:
        facts.add_row("left out", Text(f"{examples.skipped:,} rows; the first: {examples.first_skipped}"))
    if not entry.spec.evaluation_only:
        _, overlap = decontaminate(examples.rows, entry.name)
        facts.add_row("benchmark tasks", f"{overlap.dropped:,} rows, which train leaves out; {overlap.near:,} similar")
    console.print(Text(entry.name, style="bold"), facts)
    if len(examples.rows):
        row = examples.rows[0]
        for part in ("prompt", "response"):
            console.print(Text(f"{part} of the first row", style="dim"))
            console.print(Text(row[part][:_SHOWN_CHARACTERS].rstrip()))
