"""Build the parts of a training run from its flags: data, model and trainer."""

from itertools import islice

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dylo_moe.config import DataArgs, TrainConfig, split_names
from dylo_moe.core import DyLoRA_MoE, check_base_model, check_quantization, supports_packing
from dylo_moe.data import PreparedData, TokenCollator, prepare_data, refuse_for_training, resolve, template_of
from dylo_moe.errors import ConfigError, ModelError, first_line
from dylo_moe.runs.output_folder import check_writable
from dylo_moe.skills import check_clustering
from dylo_moe.training import DyLoRATrainer, monitoring_callbacks, resolve_trackers, store_of

_EVA_BATCHES = 16
"""Number of batches for the EVA initialization; PEFT stops early once the principal directions converge."""


def check_inputs(flags: TrainConfig) -> None:
    """Check all that can be checked without reading data or loading a model, and create the output folder.

    Raises:
        DyLoRAError: The run would fail later.
    """
    resolve_trackers(split_names(flags.training.report_to))
    if flags.experts.init == "pissa" and flags.training.weight_decay:
        raise ConfigError(
            "--weight_decay must be 0 with --init pissa, got "
            f"{flags.training.weight_decay}: it would shrink the constant part that PiSSA gives each expert"
        )
    if flags.model.bits is not None:
        check_quantization(flags.model.bits)
    if flags.experts.num_clusters is not None:
        check_clustering()
    if flags.wandb.wandb_checkpoint_artifact is not None:
        store_of(flags.wandb.wandb_checkpoint_artifact)
    for name in flags.data.names:
        refuse_for_training(resolve(name, flags.data.data_dir))
    check_base_model(flags.model.model_name, revision=flags.model.revision)
    check_writable(flags.training.output_dir, "--output_dir")


def prepare(args: DataArgs, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    """Read, tokenize, split and pack the datasets of a run, as the flags say."""
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
    """Check that the base model keeps the examples of a packed row apart, and print how full the rows are.

    Raises:
        ModelError: Attention of the base model crosses the examples of a row.
    """
    with model.base_only():
        supported = supports_packing(model.experts.base_model)
    if not supported:
        raise ModelError(
            f"--packing: {type(model.experts.base_model).__name__} lets the examples of a packed row see each other; "
            "train it with --no_packing"
        )
    share = data.packing_efficiency or 0.0
    console.print(f"Packed into {len(data.train):,} rows, {1 - share:.1%} padding", highlight=False)


def build_model(flags: TrainConfig) -> DyLoRA_MoE:
    """Build the base model with new experts and a new router."""
    model, experts = flags.model, flags.experts
    mixture = DyLoRA_MoE(
        model.model_name,
        experts.expert_count,
        expert_names=flags.data.plain_names if experts.teach_router == "domains" else None,
        rank=experts.lora_r,
        alpha=experts.lora_alpha,
        dropout=experts.lora_dropout,
        target_modules=experts.targets,
        use_rslora=experts.use_rslora,
        # EVA needs batches, so it runs once the trainer has them
        init="default" if experts.init == "eva" else experts.init,
        experts_per_layer=experts.blocks,
        routing=experts.routing,
        top_k=experts.experts_per_token,
        temperature=experts.router_temperature,
        shared_rank=experts.shared_rank,
        expert_scale=experts.expert_scale,
        balance_coefficient=experts.balance_weight,
        z_loss_coefficient=experts.z_loss_coefficient,
        revision=model.revision,
        dtype=torch.bfloat16 if flags.training.bf16 else torch.float32,
        attn_implementation=model.attn_implementation,
        bits=model.bits,
    )
    mixture.router.sparse_training = experts.sparse_training
    if experts.taught and not experts.train_router:
        mixture.router.requires_grad_(False)
    return mixture


def build_trainer(
    flags: TrainConfig,
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    arguments: TrainingArguments,
) -> DyLoRATrainer:
    """Build the trainer, with the callbacks that every run needs.

    Raises:
        ConfigError: The trainer refuses the flags.
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
    except (ValueError, ImportError, RuntimeError) as error:  # from checks that only the Trainer makes
        raise ConfigError(f"the training flags cannot be used: {first_line(error)}") from error
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
    return trainer


def first_batches(trainer: DyLoRATrainer, data: PreparedData) -> list[dict[str, torch.Tensor]]:
    """Return the first ``_EVA_BATCHES`` training batches, the same in every process."""
    loader = DataLoader(
        data.train,
        batch_size=trainer.args.train_batch_size,
        sampler=trainer.train_sampler,
        collate_fn=trainer.data_collator,
    )
    return list(islice(loader, _EVA_BATCHES))
