"""Plain LoRA by PEFT and the Trainer of transformers alone: the adapters of the tasks, and one LoRA for all."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from typing_extensions import override

from benchmarks.mixture.setting import answer_losses, answers_only, load_base
from dylo_moe.data import TokenCollator

RANK, STEPS, ROWS = 8, 30, 4
"""Rank and steps of a task's adapter, and rows of a step."""

DTYPE = torch.bfloat16
"""Type of the base in the study of adapters; adapters are float32."""


class AnswerTrainer(Trainer):  # type: ignore[misc]  # transformers leaves its class untyped
    """A Trainer whose loss is computed from the logits of answers alone."""

    @override
    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        with answers_only(model, batch):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return answer_losses(logits, batch).mean()


def train(
    model: nn.Module,
    rows: Dataset[Any],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    rate: float,
    seed: int,
    steps: int,
) -> None:
    """Train what has gradients, with AdamW, a cosine schedule and the Trainer's defaults otherwise."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
    )
    AnswerTrainer(model, arguments, train_dataset=rows, data_collator=TokenCollator(tokenizer.pad_token_id)).train()


def train_adapter(
    rows: Dataset[Any], tokenizer: PreTrainedTokenizerBase, folder: Path, *, rate: float, seed: int, steps: int
) -> Path:
    """Train a LoRA of all linear modules, unless its folder is there already, and return the folder."""
    if not (folder / "adapter_config.json").is_file():
        set_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = get_peft_model(load_base(DTYPE), config)
        train(model, rows, tokenizer, folder.with_suffix(".run"), rate=rate, seed=seed, steps=steps)
        model.save_pretrained(folder)
    return folder
