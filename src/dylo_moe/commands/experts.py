"""``experts``: show the experts of a checkpoint and their skills, or change, import and export experts."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dylo_moe.config import ExpertsArgs, parse
from dylo_moe.reports import experts_table, exported_line, kept_table, loss_table, stream_metrics_line
from dylo_moe.runs import distill
from dylo_moe.skills import (
    export_expert,
    freeze_expert,
    import_expert,
    list_experts,
    merge_experts,
    read_library,
    remove_expert,
    rename_expert,
)


def main(arguments: Sequence[str], program: str = "dylora-moe experts") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--checkpoint")
    description = "Show the experts of a checkpoint, or change them: dylora-moe experts CHECKPOINT."
    args = parse(ExpertsArgs, program, description, arguments)
    path, console = Path(args.checkpoint), Console()
    if args.rename is not None:
        old, new = (part.strip() for part in args.rename.split("="))
        rename_expert(path, old, new, args.base_model)
    if args.freeze is not None:
        freeze_expert(path, args.freeze)
    if args.unfreeze is not None:
        freeze_expert(path, args.unfreeze, frozen=False)
    if args.remove is not None:
        remove_expert(path, args.remove)
    if args.merge is not None:
        merge_experts(path, *(part.strip() for part in args.merge.split(",")))
    if args.export is not None:
        name, folder = args.export
        exported = export_expert(path, name, Path(folder))
        console.print(exported_line(name, folder, exported), highlight=False, soft_wrap=True)
    if args.import_ is not None:
        import_expert(path, args.import_, args.as_, revision=args.revision, base_model=args.base_model)
    if args.distill is not None:
        options = args.distill_steps, args.rank, args.base_model
        kept = distill(path, Path(args.distill), args.samples, *options)
        console.print(kept_table(kept))
    library = read_library(path)
    console.print(experts_table(list_experts(path), library))
    if library is not None:
        console.print(loss_table(library))
        if line := stream_metrics_line(library):
            console.print(line, highlight=False, soft_wrap=True)
    return 0
