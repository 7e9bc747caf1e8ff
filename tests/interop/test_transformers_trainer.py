"""The unmodified Trainer of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from dylo_moe import DyLoRA_MoE
from tests.support.saved_mixture import QUIET, moved, tensors
from tests.support.tiny_folder import tiny_tokenizer

LENGTHS = (7, 9, 5, 8, 6, 9, 4, 7)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, *ids[1:]]})
    return made


def trainer_of(folder: Path, output: Path, model: DyLoRA_MoE | None = None, **arguments: Any) -> Trainer:
    return Trainer(
        DyLoRA_MoE.from_pretrained(folder) if model is None else model,
        args=TrainingArguments(
            output_dir=str(output), **{**QUIET, "max_steps": 2, "save_strategy": "no", "seed": 3, **arguments}
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )


def cross_entropies(model: DyLoRA_MoE) -> list[tuple[Tensor, Tensor]]:
    """Return the log-probabilities at each labelled token, and the labels, row by row and without padding."""
    pairs = []
    with torch.no_grad():
        for row in rows():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"][1:])
            pairs.append((logits[:-1].log_softmax(-1), labels))
    return pairs


def test_training_moves_experts_and_router_and_leaves_the_base(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    before = tensors(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == {"experts", "router"}


def test_eval_loss_is_the_cross_entropy_of_the_labelled_tokens(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, per_device_eval_batch_size=1)
    pairs = cross_entropies(trainer.model.eval())
    # with batches of one row, the Trainer averages over rows
    wanted = torch.stack([F.nll_loss(logs, labels) for logs, labels in pairs]).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_eval_loss_of_one_padded_batch_is_a_mean_over_tokens(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, per_device_eval_batch_size=len(LENGTHS))
    pairs = cross_entropies(trainer.model.eval())
    wanted = F.nll_loss(torch.cat([logs for logs, _ in pairs]), torch.cat([labels for _, labels in pairs]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_predictions_are_the_logits_and_the_labels(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, per_device_eval_batch_size=4)
    output = trainer.predict(rows())
    shape = (len(LENGTHS), max(LENGTHS))
    assert output.predictions.shape == (*shape, trainer.model.config.vocab_size)
    assert output.label_ids.shape == shape
    with torch.no_grad():
        first = trainer.model.eval()(torch.tensor([rows()[0]["input_ids"]])).logits[0]
    assert torch.allclose(torch.from_numpy(output.predictions[0, : LENGTHS[0]]), first, atol=1e-5)


def test_label_smoothing_compares_each_token_with_the_next_one(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, per_device_eval_batch_size=len(LENGTHS), label_smoothing_factor=0.1)
    pairs = cross_entropies(trainer.model.eval())
    logs, labels = torch.cat([logs for logs, _ in pairs]), torch.cat([labels for _, labels in pairs])
    wanted = 0.9 * F.nll_loss(logs, labels) - 0.1 * logs.mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(folder: Path, tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(folder, tmp_path / "whole", **saving)
    whole.train()
    resumed = trainer_of(folder, tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert moved(tensors(whole.model), resumed.model) == set()


def test_the_best_checkpoint_is_loaded_at_the_end(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(
        folder,
        tmp_path,
        max_steps=3,
        greater_is_better=True,  # the loss falls, so the best checkpoint is not the last
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).name == "checkpoint-1"
    assert moved(tensors(DyLoRA_MoE.from_pretrained(best)), trainer.model) == set()


def test_a_checkpoint_is_a_mixture_without_its_base(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    base = sum(value.numel() * 4 for value in trainer.model.experts.base_model.state_dict().values())
    weights = list(checkpoint.rglob("*.safetensors"))
    assert not (checkpoint / "model.safetensors").exists()
    assert sum(file.stat().st_size for file in weights) < base / 2
    assert moved(tensors(DyLoRA_MoE.from_pretrained(checkpoint)), trainer.model) == set()


def test_saving_into_the_output_folder_keeps_its_checkpoints(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-2" / "dylo_moe.json").is_file()
    assert moved(tensors(DyLoRA_MoE.from_pretrained(tmp_path)), trainer.model) == set()
