"""``train``: train a mixture, save it, and report its held-out loss next to that of the base model."""

import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence, Sized
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import transformers
from rich.console import Console
from transformers import TrainingArguments, set_seed

from dylo_moe.config import TrainConfig, parse, to_yaml
from dylo_moe.core import load_tokenizer
from dylo_moe.data import PreparedData
from dylo_moe.durable import atomic_file
from dylo_moe.errors import EXIT_STOPPED
from dylo_moe.reports import TrainingReport, training_table
from dylo_moe.runs import (
    LiveBenchmark,
    build_model,
    build_trainer,
    check_inputs,
    check_packing,
    first_batches,
    make_trainer_arguments,
    prepare,
    resume_folder,
    run_training,
    teach,
)
from dylo_moe.training import ArtifactCallback, BaseEvaluation, DyLoRATrainer, broadcast_from_main, wandb_store

BEST_MODEL = "best_model"
REPORT_FILE = "report.json"
_REPORTED_PACKAGES = ("dylora-moe", "torch", "transformers", "peft")


def main(arguments: Sequence[str], program: str = "dylora-moe train") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    description = (
        "Train a mixture of LoRA experts on a frozen language model. Every other field of "
        "transformers.TrainingArguments is a flag too: --adam_beta2 0.95, --save_steps 100, ..."
    )
    flags = parse(TrainConfig, program, description, arguments)
    if flags.run.dry_run:
        sys.stdout.write(to_yaml(flags))
        return 0
    report = train(flags, Console())
    return EXIT_STOPPED if report is None else 0


def train(flags: TrainConfig, console: Console) -> TrainingReport | None:
    """Train, evaluate and save a mixture. Every process of a launch runs this.

    Args:
        flags: The flags of the program.
        console: Receives the progress messages and the report.

    Returns:
        The report; None if a signal stopped the run, which left a checkpoint to resume from.

    Raises:
        DyLoRAError: The user can fix it.
    """
    check_inputs(flags)
    arguments = make_trainer_arguments(flags)
    first = arguments.process_index == 0
    if not first:
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
        console = Console(quiet=True)
    if first and flags.uses_wandb:
        wandb_store.check_access()
    resume_from = broadcast_from_main(partial(resume_folder, flags, console))
    uploads = _start_wandb(flags, console, resumes=resume_from is not None) if first else None
    live = LiveBenchmark(flags, console)
    trainer, data = _build(flags, arguments, console)
    live.attach(trainer)
    if flags.experts.init == "eva" and resume_from is None:
        console.print("Initializing the experts from the first training batches", highlight=False)
        trainer.model.initialize_eva(first_batches(trainer, data))
    if flags.experts.taught and resume_from is None:
        teach(trainer.model, flags, console)
    base = BaseEvaluation(partial(_evaluate_base, trainer, console))
    trainer.add_callback(base)
    if uploads is not None:
        trainer.add_callback(uploads)
    if not run_training(trainer, flags, resume_from, console):
        # a process group that is still open can abort the process at its exit, with another exit code
        trainer.accelerator.end_training()
        return None
    seconds = time.monotonic() - base.ended
    report = _evaluate_mixture(trainer, data, base.metrics, seconds, console)
    _save_and_show(trainer, report, flags, uploads, console)
    live.score_final()
    trainer.accelerator.end_training()
    return report


def _start_wandb(flags: TrainConfig, console: Console, *, resumes: bool) -> ArtifactCallback | None:
    """Start the W&B run if the flags ask for one; return the callback that uploads artifacts, if wanted."""
    if not flags.uses_wandb:
        return None
    output, args = flags.training.output_dir, flags.wandb
    run = wandb_store.start_run(
        Path(output), project=args.wandb_project, entity=args.wandb_entity, name=args.wandb_run_name, continues=resumes
    )
    if wandb_store.is_offline():
        console.print(
            f"W&B is offline: metrics and uploads stay in {output}/wandb until `wandb sync`; only "
            "--wandb_checkpoint_artifact needs the network",
            highlight=False,
            soft_wrap=True,
        )
    return ArtifactCallback(wandb_store.WandbStore(run), run.id) if args.wandb_log_model else None


def _build(flags: TrainConfig, arguments: TrainingArguments, console: Console) -> tuple[DyLoRATrainer, PreparedData]:
    """Prepare the data, then build the model and its trainer."""
    transformers.logging.disable_progress_bar()
    seed = flags.training.seed
    with arguments.main_process_first(desc="preparing the data"):
        tokenizer = load_tokenizer(flags.model.model_name, revision=flags.model.revision)
        data = prepare(flags.data, tokenizer, seed)
    for note in data.notes:
        console.print(note, highlight=False, soft_wrap=True)
    set_seed(seed)
    model = build_model(flags)
    model.prompt_template = data.template.name
    if flags.data.packing:
        check_packing(model, data, console)
    return build_trainer(flags, model, tokenizer, data, arguments), data


def _evaluate_base(trainer: DyLoRATrainer, console: Console) -> dict[str, float]:
    assert isinstance(trainer.eval_dataset, Sized)
    console.print(f"Evaluating the base model on {len(trainer.eval_dataset):,} held-out rows", highlight=False)
    with trainer.model.base_only():
        return trainer.evaluate_without_logging("base")


def _evaluate_mixture(
    trainer: DyLoRATrainer, data: PreparedData, base: dict[str, float], seconds: float, console: Console
) -> TrainingReport:
    model = trainer.model
    model.set_maturity()
    routed = f"top-{model.router.top_k} of {len(model.experts.names)} experts"
    console.print(f"Evaluating the trained mixture, {routed}", highlight=False)
    mixture = trainer.evaluate_without_logging("mixture")
    return TrainingReport(
        domains=data.domains,
        experts=model.experts.names,
        base=_without_prefix(base, "base_"),
        mixture=_without_prefix(mixture, "mixture_"),
        trainable_parameters=model.num_trainable_parameters(),
        base_parameters=model.num_base_parameters(),
        checkpoint=str(Path(trainer.args.output_dir or ".") / BEST_MODEL),
        steps=trainer.state.global_step,
        train_tokens=trainer.state.num_input_tokens_seen,
        train_seconds=seconds,
        routing=model.routing,
        held_out_rows=len(data.validation),
        versions={"python": platform.python_version()} | {name: version(name) for name in _REPORTED_PACKAGES},
        seed=trainer.args.seed,
        data=data.record(),
    )


def _save_and_show(
    trainer: DyLoRATrainer,
    report: TrainingReport,
    flags: TrainConfig,
    uploads: ArtifactCallback | None,
    console: Console,
) -> None:
    trainer.save_model(report.checkpoint)
    if trainer.args.process_index == 0:
        with atomic_file(Path(flags.training.output_dir) / REPORT_FILE) as file:
            file.write(report.model_dump_json(indent=2) + "\n")
        if uploads is not None:
            uploads.finish(Path(report.checkpoint), report.steps)
    console.print(training_table(report))
    # the environment's commands need not be on PATH
    program = ["dylora-moe"] if shutil.which("dylora-moe") else [sys.executable, "-m", "dylo_moe"]
    command = [*program, "generate", "--trained_model", report.checkpoint, "--prompt", "def reverse(text):"]
    console.print(f"\nGenerate with it:\n  {shlex.join(command)}", soft_wrap=True, highlight=False)


def _without_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
