"""The real Trainer on the model of ``tiny_folder``, in float64, with rows of different lengths in two domains."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from dylo_moe import DyLoRA_MoE
from dylo_moe.training.trainer import DyLoRATrainer
from tests.support.tiny_folder import tiny_tokenizer


def rows(count: int = 8) -> Dataset:
    """Return rows of different lengths with masked prompts, in two domains."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        ids = torch.randint(3, 250, (4 + 3 * index,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "domain": index % 2})
    return Dataset.from_list(made)


def trainer_of(
    folder: Path, output: Path, routing: str = "prefix:1", ours: dict[str, Any] | None = None, **arguments: Any
) -> DyLoRATrainer:
    torch.manual_seed(0)
    model = DyLoRA_MoE(
        str(folder), 3, rank=4, routing=routing, balance_coefficient=0.5, z_loss_coefficient=0.1, dtype=torch.float64
    )
    model.router.double()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.double()
            torch.nn.init.normal_(parameter, std=0.1)
    options = {
        "output_dir": str(output),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        **arguments,
    }
    return DyLoRATrainer(
        model,
        ["even", "odd"],
        args=TrainingArguments(**options),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        **(ours or {}),
    )
