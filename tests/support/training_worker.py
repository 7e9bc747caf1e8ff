"""Trains the tiny model, alone or as one of several processes, and writes the results to files; started by tests.

``python training_worker.py BASE OUTPUT 'CASES'``, where CASES is a JSON object from a name to options of ``train``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainingArguments

from dylo_moe import DyLoRA_MoE
from dylo_moe.data.mixing import MixingSampler
from dylo_moe.data.packing import TokenCollator, TokenRows
from dylo_moe.training.callbacks import BaseEvaluation
from dylo_moe.training.distributed import full_state_dict
from dylo_moe.training.trainer import DyLoRATrainer

ROWS, BATCH = 22, 2
CAPACITY = 40


def rows(packed: bool, count: int = ROWS) -> TokenRows:
    """Return rows of different lengths in two domains; they do not fill the last batch of an epoch."""
    generator = torch.Generator().manual_seed(5)
    lengths = [4 + (7 * index) % 27 for index in range(count)]
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    examples = Dataset.from_list(
        [{"input_ids": row, "prompt_length": 2, "length": len(row), "domain": i % 2} for i, row in enumerate(ids)]
    )
    domains = np.array([index % 2 for index in range(count)])
    return TokenRows(examples, domains, np.array(lengths), CAPACITY if packed else None)


def model_of(base: str, routing: str) -> DyLoRA_MoE:
    """Return a mixture in float64, so that only differences in the sums are visible."""
    torch.manual_seed(0)
    model = DyLoRA_MoE(
        base, 3, rank=4, routing=routing, balance_coefficient=0.5, z_loss_coefficient=0.1, dtype=torch.float64
    )
    model.router.double()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.double()
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def trainer_of(
    base: str, output: str, *, routing: str = "prefix:1", packed: bool = False, processes: int = 1, **options: Any
) -> DyLoRATrainer:
    """Return a trainer of four rows a step: two processes with two rows, or one with two times two."""
    data = rows(packed)
    arguments = TrainingArguments(
        output_dir=output,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2 // processes,
        include_num_input_tokens_seen="non_padding",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        **{"save_strategy": "no", "use_cpu": True, **options},
    )
    return DyLoRATrainer(
        model_of(base, routing),
        ["even", "odd"],
        train_sampler=MixingSampler(data.domains, batch_size=BATCH, processes=processes),
        args=arguments,
        train_dataset=data,
        eval_dataset=rows(False, 7),
        data_collator=TokenCollator(0),
    )


def train(base: str, output: Path, *, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Train one case; return its losses, its evaluations and the number of tokens seen."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = trainer_of(base, str(output), processes=processes, **options)
    evaluated = BaseEvaluation(lambda: evaluate_base(trainer))
    trainer.add_callback(evaluated)
    trainer.train(resume_from_checkpoint=resume)
    log = trainer.state.log_history
    weights = full_state_dict(trainer.model, ("lora_", "router."))
    mixture = trainer.evaluate()
    trainer.save_model(str(output / "saved"))
    if trainer.is_world_process_zero():
        save_file({name: value.contiguous() for name, value in weights.items()}, output / "weights.safetensors")
    return {
        "loss": [entry["loss"] for entry in log if "loss" in entry],
        "grad_norm": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "base": evaluated.metrics["base_loss"],
        "mixture": {key: value for key, value in mixture.items() if "loss" in key or "usage" in key},
        "tokens": trainer.state.num_input_tokens_seen,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def evaluate_base(trainer: DyLoRATrainer) -> dict[str, float]:
    with trainer.model.base_only():
        return trainer.evaluate_without_logging("base")


def main(base: str, output: str, cases: str) -> None:
    torch.set_num_threads(1)
    for name, options in json.loads(cases).items():
        folder = Path(output) / name
        folder.mkdir(parents=True, exist_ok=True)
        result = train(base, folder, **options)
        if os.environ.get("RANK", "0") == "0":
            (folder / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if os.environ.get("SHARD_ON_CPU"):
        # accelerate shards on accelerators only; taking the CPU for one, it shards over gloo
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    main(*sys.argv[1:])
