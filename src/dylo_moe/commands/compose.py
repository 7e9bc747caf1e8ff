"""``compose``: make one mixture of PEFT adapters that exist, routed by a few examples of each; nothing is trained.

OUTPUT_DIR                 the mixture, with the sums that the router was solved from
OUTPUT_DIR/report.json     where the examples of each adapter are sent, and the seconds that it took
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from dylo_moe.config import DEFAULT_ROUTING, ComposeArgs, parse
from dylo_moe.core import DESCRIPTION_FILE, DyLoRA_MoE, load_tokenizer
from dylo_moe.durable import atomic_file
from dylo_moe.errors import ConfigError
from dylo_moe.runs import RouteSamples, finetune_router, load_mixture, read_route_samples, to_device
from dylo_moe.skills import SkillLibrary, is_as_solved, learn_routes, mixture_of, routes_of, save_with_skills

REPORT_FILE = "report.json"


def main(arguments: Sequence[str], program: str = "dylora-moe compose") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    description = "Make one mixture of PEFT adapters of one base model. A few examples of each say what it is for."
    args, console = parse(ComposeArgs, program, description, arguments), Console()
    output = Path(args.output_dir)
    if output.exists() and not (output / DESCRIPTION_FILE).is_file() and any(output.iterdir()):
        raise ConfigError(f"--output_dir must be a new folder or a mixture, got {output}, which holds other files")
    transformers.logging.disable_progress_bar()
    set_seed(args.seed)
    started = time.monotonic()
    model, library, tokenizer = _open(args)
    to_device(model)
    if args.mixture is not None and not is_as_solved(model, library):
        console.print(
            f"The router of {args.mixture} was trained after it was solved; it is solved again, without that training",
            highlight=False,
            soft_wrap=True,
        )
    samples = read_route_samples(args, tokenizer)
    model.prompt_template, model.tokenizer = samples.template, tokenizer
    learn_routes(model, library, samples.batches)
    report = {"seconds_to_solve": time.monotonic() - started, "solved": _print_routes(model, samples, console)}
    if args.finetune_router:
        finetune_router(model, samples, args)
        report |= {"seconds": time.monotonic() - started, "finetuned": _print_routes(model, samples, console)}
    save_with_skills(model, library, output)
    with atomic_file(output / REPORT_FILE) as file:
        file.write(json.dumps(report, indent=2) + "\n")
    console.print(
        f"{len(model.experts)} adapters on {model.base_name}, routing {model.routing}: {output} "
        f"({time.monotonic() - started:.1f} s)",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _open(args: ComposeArgs) -> tuple[DyLoRA_MoE, SkillLibrary, PreTrainedTokenizerBase]:
    """Return the mixture with all adapters, what is known of their examples so far, and the tokenizer."""
    if args.mixture is None:
        routing, top_k = args.routing or DEFAULT_ROUTING, args.top_k or 1
        model = mixture_of(args.adapters, args.base_model, routing=routing, top_k=top_k, revision=args.revision)
        tokenizer = load_tokenizer(model.base_name, revision=model.revision)
        return model, SkillLibrary(model.router.hidden_size), tokenizer
    model, tokenizer = load_mixture(args.mixture, args.base_model)
    library = SkillLibrary.load(Path(args.mixture), model.experts.names)
    for name, source in args.adapters.items():
        model.experts.freeze(model.import_expert(source, name))
    return model, library, tokenizer


def _print_routes(model: DyLoRA_MoE, samples: RouteSamples, console: Console) -> dict[str, dict[str, float]]:
    """Print and return the share of each adapter's example tokens that each expert gets."""
    shares = {name: routes_of(model, batches) for name, batches in samples.batches.items()}
    table = Table(title="Tokens of the examples", title_justify="left")
    for column in ("examples", "own adapter", "others"):
        table.add_column(column, overflow="fold")
    for name, found in shares.items():
        others = sorted(((share, other) for other, share in found.items() if other != name), reverse=True)
        listed = ", ".join(f"{other} {share:.1%}" for share, other in others if share >= 0.001)
        table.add_row(name, f"{found[name]:.1%}", listed)
    console.print(table)
    return shares
