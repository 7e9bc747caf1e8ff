"""``train``: from flags to a saved mixture and a table of what it bought."""

import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from dylo_moe.config import (
    LATEST,
    TRAIN_GROUPS,
    DataArguments,
    ExpertArguments,
    LiveBenchmarkArguments,
    ModelArguments,
    TrainingArgumentsGroup,
    parse,
    to_yaml,
)
from dylo_moe.core.base_model import check_base_model, load_tokenizer
from dylo_moe.core.checkpoint import read_description
from dylo_moe.core.expert import count_parameters
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.core.packed import keeps_examples_apart
from dylo_moe.data.packing import TokenCollator
from dylo_moe.data.prepare_data import PreparedData, prepare_data
from dylo_moe.data.registry import refuse_for_training, resolve
from dylo_moe.data.templates import template_of
from dylo_moe.errors import ConfigError, ModelError
from dylo_moe.programs.live_benchmark import LiveBenchmark
from dylo_moe.reports.tables import TrainingReport, training_table
from dylo_moe.training.callbacks import TokenProgressCallback
from dylo_moe.training.trainer import DyLoRATrainer

BEST_MODEL = "best_model"
REPORT_FILE = "report.json"
_RECORDED = ("dylora-moe", "torch", "transformers", "peft")


def main(arguments: Sequence[str], program: str = "dylora-moe train") -> int:
    """Runs the program; returns its exit code.

    Raises:
        DyLoRAError: The user can mend it.
    """
    description = "Train a mixture of LoRA experts on a frozen language model."
    groups = parse(TRAIN_GROUPS, program, description, arguments)
    model_args, expert_args, data_args, training_args, live_args, run_args = groups
    if run_args.dry_run:
        sys.stdout.write(to_yaml(groups))
        return 0
    train(model_args, expert_args, data_args, training_args, live_args, Console())
    return 0


def train(
    model_args: ModelArguments,
    expert_args: ExpertArguments,
    data_args: DataArguments,
    training_args: TrainingArgumentsGroup,
    live_args: LiveBenchmarkArguments,
    console: Console,
) -> TrainingReport:
    """Trains, evaluates and saves; tells ``console`` what it does.

    Raises:
        DyLoRAError: The user can mend it.
    """
    resume_from = _resume_folder(training_args)
    _check_inputs(model_args, data_args, training_args)
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(model_args.model_name, revision=model_args.revision)
    live = LiveBenchmark(live_args, tokenizer, training_args.seed, console)
    data = _prepare(data_args, tokenizer, training_args.seed)
    for note in data.notes:
        console.print(note, highlight=False, soft_wrap=True)
    set_seed(training_args.seed)
    model = _build_model(model_args, expert_args, training_args)
    model.prompt_template = data.template.name
    if data_args.packing:
        _check_packing(model, data, console)
    trainer = _build_trainer(model, tokenizer, data, data_args, training_args)
    live.attach(trainer)

    console.print(f"Evaluating the base model on {len(data.validation):,} held-out rows", highlight=False)
    with model.base_only():
        base = trainer.evaluate(metric_key_prefix="base")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume_from)
    seconds = time.monotonic() - started
    model.set_maturity()
    routed = f"top-{model.router.top_k} of {len(model.experts.names)} experts"
    console.print(f"Evaluating the trained mixture, {routed}", highlight=False)
    mixture = trainer.evaluate(metric_key_prefix="mixture")

    output = Path(training_args.output_dir)
    model.save_pretrained(output / BEST_MODEL)
    report = TrainingReport(
        domains=data.domains,
        experts=model.experts.names,
        base=_without_prefix(base, "base_"),
        mixture=_without_prefix(mixture, "mixture_"),
        trainable_parameters=count_parameters(model, trainable=True),
        base_parameters=model.num_base_parameters(),
        checkpoint=str(output / BEST_MODEL),
        steps=trainer.state.global_step,
        train_tokens=trainer.state.num_input_tokens_seen,
        train_seconds=seconds,
        routing=model.routing,
        held_out_rows=len(data.validation),
        versions={"python": platform.python_version()} | {name: version(name) for name in _RECORDED},
        seed=training_args.seed,
        data=data.record(),
    )
    (output / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n")
    console.print(training_table(report))
    live.score_final()
    # as it can be typed here: the environment's commands need not be on the path
    program = ["dylora-moe"] if shutil.which("dylora-moe") else [sys.executable, "-m", "dylo_moe"]
    command = [*program, "generate", "--trained_model", report.checkpoint, "--prompt", "def reverse(text):"]
    console.print(f"\nGenerate with it:\n  {shlex.join(command)}", soft_wrap=True, highlight=False)
    return report


def _resume_folder(args: TrainingArgumentsGroup) -> str | None:
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == LATEST:
        latest = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if latest is None:
            raise ConfigError(f"--resume_from_checkpoint: {args.output_dir} holds no checkpoint yet; name its folder")
        wanted = latest
    read_description(Path(wanted))
    return wanted


def _check_inputs(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArgumentsGroup) -> None:
    """What can be known to fail, fails before anything is read or computed."""
    for name in data_args.names:
        refuse_for_training(resolve(name, data_args.data_dir))
    check_base_model(model_args.model_name, revision=model_args.revision)
    try:
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=training_args.output_dir):
            pass
    except OSError as error:
        raise ConfigError(f"--output_dir {training_args.output_dir} cannot be written: {error.strerror}") from error


def _prepare(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    return prepare_data(
        args.names,
        tokenizer,
        max_length=args.max_seq_length,
        training_percent=args.training_subset,
        validation_percent=args.eval_subset,
        packing=args.packing,
        overlong="drop" if args.overlong == "drop" else "cut",
        template=template_of(args.template, tokenizer),
        data_dir=args.data_dir,
        decontaminated=args.decontaminate,
        skip_bad_rows=args.skip_bad_rows,
        workers=args.workers,
        seed=seed,
    )


def _check_packing(model: DyLoRA_MoE, data: PreparedData, console: Console) -> None:
    with model.base_only():
        apart = keeps_examples_apart(model.experts.base_model)
    if not apart:
        raise ModelError(
            f"--packing: {type(model.experts.base_model).__name__} lets the examples of a packed row see each other; "
            "train it with --no_packing"
        )
    share = data.packing_efficiency or 0.0
    console.print(f"Packed into {len(data.train):,} rows, {1 - share:.1%} padding", highlight=False)


def _build_model(
    model_args: ModelArguments, expert_args: ExpertArguments, training_args: TrainingArgumentsGroup
) -> DyLoRA_MoE:
    return DyLoRA_MoE(
        model_args.model_name,
        expert_args.num_experts,
        rank=expert_args.lora_r,
        alpha=expert_args.lora_alpha,
        dropout=expert_args.lora_dropout,
        target_modules=expert_args.targets,
        use_rslora=expert_args.use_rslora,
        routing=expert_args.routing,
        top_k=expert_args.experts_per_token,
        temperature=expert_args.router_temperature,
        balance_coefficient=expert_args.balance_coefficient,
        z_loss_coefficient=expert_args.z_loss_coefficient,
        revision=model_args.revision,
        dtype=torch.bfloat16 if training_args.bf16 else torch.float32,
    )


def _build_trainer(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    data_args: DataArguments,
    args: TrainingArgumentsGroup,
) -> DyLoRATrainer:
    arguments = _trainer_arguments(args)
    flash = "flash" in str(model.config._attn_implementation)
    trainer = DyLoRATrainer(
        model,
        data.domains,
        train_sampler=data.sampler(
            temperature=data_args.temperature,
            seed=args.seed,
            batch_size=arguments.train_batch_size,
            processes=arguments.world_size,
        ),
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        data_collator=TokenCollator(tokenizer.pad_token_id, flatten=flash),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TokenProgressCallback)
    return trainer


def _trainer_arguments(args: TrainingArgumentsGroup) -> TrainingArguments:
    accelerated = torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.train_batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_restarts" if args.cosine_restarts else "cosine",
        lr_scheduler_kwargs={"num_cycles": 2} if args.cosine_restarts else {},
        warmup_steps=args.warmup_ratio,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        label_smoothing_factor=args.label_smoothing,
        bf16=args.bf16,
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated,
        activation_checkpointing=args.gradient_checkpointing,
        logging_steps=args.logging_steps,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=args.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model="mean_domain_loss",
        greater_is_better=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        seed=args.seed,
    )


def _without_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
