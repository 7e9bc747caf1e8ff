"""The parts of a training run, built as its flags say."""

import tempfile
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dylo_moe.config import DataArguments, TrainFlags
from dylo_moe.core.base_model import check_base_model
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.core.packed import supports_packing
from dylo_moe.core.quantised import check_quantisation
from dylo_moe.data.packing import TokenCollator
from dylo_moe.data.prepare_data import PreparedData, prepare_data
from dylo_moe.data.registry import refuse_for_training, resolve
from dylo_moe.data.templates import template_of
from dylo_moe.errors import ConfigError, ModelError, first_line
from dylo_moe.flags import split_names
from dylo_moe.training.fetching import store_of
from dylo_moe.training.monitoring import monitoring_callbacks
from dylo_moe.training.trackers import resolve_trackers
from dylo_moe.training.trainer import DyLoRATrainer

EVA_BATCHES = 16
"""To look for principal directions in; PEFT goes through them until the directions settle."""


def check_inputs(flags: TrainFlags) -> None:
    """What can be known to fail, fails before anything is read or computed.

    Raises:
        DyLoRAError: It will.
    """
    resolve_trackers(split_names(flags.training.report_to))
    if flags.experts.init == "pissa" and flags.training.weight_decay:
        raise ConfigError(
            "--weight_decay must be 0 with --init pissa, got "
            f"{flags.training.weight_decay}: it would wear away the constant that the experts begin with"
        )
    if flags.model.bits is not None:
        check_quantisation(flags.model.bits)
    if flags.wandb.wandb_checkpoint_artifact is not None:
        store_of(flags.wandb.wandb_checkpoint_artifact)
    for name in flags.data.names:
        refuse_for_training(resolve(name, flags.data.data_dir))
    check_base_model(flags.model.model_name, revision=flags.model.revision)
    output = flags.training.output_dir
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"--output_dir {output} cannot be written: {error.strerror}") from error


def prepare(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    """The data of a run."""
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


def check_packing(model: DyLoRA_MoE, data: PreparedData, console: Console) -> None:
    """Makes sure that the examples of a packed row do not see each other."""
    with model.base_only():
        apart = supports_packing(model.experts.base_model)
    if not apart:
        raise ModelError(
            f"--packing: {type(model.experts.base_model).__name__} lets the examples of a packed row see each other; "
            "train it with --no_packing"
        )
    share = data.packing_efficiency or 0.0
    console.print(f"Packed into {len(data.train):,} rows, {1 - share:.1%} padding", highlight=False)


def build_model(flags: TrainFlags) -> DyLoRA_MoE:
    """The base model with its experts and router."""
    model, experts = flags.model, flags.experts
    return DyLoRA_MoE(
        model.model_name,
        experts.num_experts,
        rank=experts.lora_r,
        alpha=experts.lora_alpha,
        dropout=experts.lora_dropout,
        target_modules=experts.targets,
        use_rslora=experts.use_rslora,
        # EVA needs data, and follows
        init="default" if experts.init == "eva" else experts.init,
        experts_per_layer=experts.blocks,
        routing=experts.routing,
        top_k=experts.experts_per_token,
        temperature=experts.router_temperature,
        balance_coefficient=experts.balance_weight,
        z_loss_coefficient=experts.z_loss_coefficient,
        revision=model.revision,
        dtype=torch.bfloat16 if flags.training.bf16 else torch.float32,
        attn_implementation=model.attn_implementation,
        bits=model.bits,
    )


def build_trainer(
    flags: TrainFlags,
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    arguments: TrainingArguments,
) -> DyLoRATrainer:
    """The Trainer, with the callbacks that every run has.

    Raises:
        ConfigError: The Trainer refuses the flags.
    """
    experts, args = flags.experts, flags.training
    flash = "flash" in str(model.config._attn_implementation)
    try:
        trainer = DyLoRATrainer(
            model,
            data.domains,
            train_sampler=data.sampler(
                temperature=flags.data.temperature,
                seed=args.seed,
                batch_size=arguments.train_batch_size,
                processes=arguments.world_size,
            ),
            data_identity=data.identity(temperature=flags.data.temperature, seed=args.seed),
            save_in_place=args.save_in_place,
            router_learning_rate=args.router_learning_rate,
            warm_restarts=args.schedule == "cosine_restarts",
            balance_update_rate=experts.balance_update_rate if experts.balance == "bias" else None,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            data_collator=TokenCollator(tokenizer.pad_token_id, flatten=flash),
            callbacks=monitoring_callbacks(data.domains),
        )
    except (ValueError, ImportError, RuntimeError) as error:  # of what only the Trainer checks
        raise ConfigError(f"the training flags cannot be used: {first_line(error)}") from error
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
    return trainer


def first_batches(trainer: DyLoRATrainer) -> list[dict[str, torch.Tensor]]:
    """The batches that training begins with, the same in every process."""
    loader = DataLoader(
        trainer.train_dataset,  # type: ignore[arg-type]
        batch_size=trainer.args.train_batch_size,
        sampler=trainer.train_sampler,
        collate_fn=trainer.data_collator,
    )
    return list(islice(loader, EVA_BATCHES))
