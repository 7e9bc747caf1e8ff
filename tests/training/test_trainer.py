"""The real HF Trainer on a tiny model: what is summed, what moves, what is saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.losses import causal_lm_loss, load_balance_loss, router_z_loss
from dylo_moe.training.trainer import DyLoRATrainer
from tiny_folder import tiny_tokenizer, write_tiny_folder

ROUTINGS = ["final", "prefix:1", "per_layer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def rows(count: int = 8) -> Dataset:
    """Rows of unequal lengths with masked prompts, in two domains."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        ids = torch.randint(3, 250, (4 + 3 * index,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "domain": index % 2})
    return Dataset.from_list(made)


def trainer_of(folder: Path, output: Path, routing: str = "prefix:1", **arguments: Any) -> DyLoRATrainer:
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
    )


def trained_parameters(trainer: DyLoRATrainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_loss_is_the_sum_of_its_parts_with_and_without_smoothing(
    folder: Path, tmp_path: Path, routing: str, smoothing: float
) -> None:
    trainer = trainer_of(folder, tmp_path, routing, label_smoothing_factor=smoothing)
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["attention_mask"]
    trainer.model.train()
    loss, output = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    expected = (
        causal_lm_loss(output.logits, batch["labels"], label_smoothing=smoothing)
        + 0.5 * load_balance_loss(output.router_logits, mask, 2)
        + 0.1 * router_z_loss(output.router_logits, mask)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert load_balance_loss(output.router_logits, mask, 2) > 0


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_eight_batches_of_one_train_as_one_batch_of_eight(
    folder: Path, tmp_path: Path, routing: str, smoothing: float
) -> None:
    common = {"max_steps": 3, "label_smoothing_factor": smoothing}
    whole = trained_parameters(
        trainer_of(folder, tmp_path, routing, per_device_train_batch_size=8, gradient_accumulation_steps=1, **common)
    )
    parts = trained_parameters(
        trainer_of(folder, tmp_path, routing, per_device_train_batch_size=1, gradient_accumulation_steps=8, **common)
    )
    assert whole.keys() == parts.keys()
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_expert_and_the_router_move_and_the_base_does_not(folder: Path, tmp_path: Path, routing: str) -> None:
    trainer = trainer_of(folder, tmp_path, routing, max_steps=2, per_device_train_batch_size=4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert moved == adapters | {name for name in before if name.startswith("router.gates")}
    for expert in trainer.model.experts.names:
        assert any(f".{expert}." in name for name in moved)


def test_gradient_checkpointing_trains_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    for routing in ROUTINGS:
        plain = trained_parameters(trainer_of(folder, tmp_path, routing, max_steps=2))
        saving = trained_parameters(trainer_of(folder, tmp_path, routing, max_steps=2, activation_checkpointing=True))
        for name, parameter in plain.items():
            torch.testing.assert_close(saving[name], parameter, rtol=1e-12, atol=0, msg=f"{routing} {name}")


def test_evaluation_counts_tokens_and_not_batches(folder: Path, tmp_path: Path) -> None:
    def metrics(batch_size: int) -> dict[str, float]:
        trainer = trainer_of(folder, tmp_path, per_device_eval_batch_size=batch_size)
        return {key: value for key, value in trainer.evaluate().items() if "loss" in key or "usage" in key}

    one, three = metrics(1), metrics(3)
    assert one.keys() == three.keys() >= {"eval_loss", "eval_loss/even", "eval_loss/odd", "eval_mean_domain_loss"}
    assert one == pytest.approx(three, rel=1e-9)
    assert sum(value for key, value in one.items() if key.startswith("eval_usage/odd/")) == pytest.approx(1)


def test_the_base_is_evaluated_as_the_base(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    with trainer.model.base_only():
        base = trainer.evaluate()
    with trainer.model.model.disable_adapter():
        plain = trainer.evaluate()
    assert base["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-12)
    assert base["eval_loss"] != pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-3)
    assert not any("usage" in key for key in base)


def test_a_run_that_is_resumed_ends_where_an_uninterrupted_one_does(folder: Path, tmp_path: Path) -> None:
    common = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained_parameters(trainer_of(folder, tmp_path / "whole", max_steps=4, **common))
    trainer_of(folder, tmp_path / "parts", max_steps=2, **common).train()
    resumed = trainer_of(folder, tmp_path / "parts", max_steps=4, **common)
    for parameter in resumed.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)  # everything has to come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), whole[name], rtol=1e-6, atol=1e-8, msg=name)


def test_a_training_step_makes_no_logits(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, max_steps=1)
    made: list[int] = []
    head = trainer.model.experts.base_model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: made.append(output.numel()))
    trainer.train()
    assert made == [0]


def test_the_given_order_is_the_order_of_training(folder: Path, tmp_path: Path) -> None:
    order = [5, 0, 3, 1, 7, 2]
    trainer = trainer_of(folder, tmp_path, per_device_train_batch_size=2)
    trainer.train_sampler = order  # type: ignore[assignment]
    lengths = [int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader()]
    sizes = [len(row["input_ids"]) for row in rows()]
    assert lengths == [sizes[one] + sizes[other] for one, other in (order[:2], order[2:4], order[4:])]


class Epochs(list[int]):
    """A sampler that notes the epoch in which it is asked."""

    def __init__(self) -> None:
        super().__init__(range(8))
        self.epoch, self.asked = 0, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.asked.append(self.epoch)
        return super().__iter__()


def test_the_sampler_is_told_the_epoch_also_when_a_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as it is with several processes, whose loader of a resumed run does not pass it on
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    seen = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_of(folder, tmp_path, **options)
        trainer.train_sampler = Epochs()  # type: ignore[assignment]
        trainer.train(resume_from_checkpoint=resumed)
        seen.append(trainer.train_sampler.asked)
    assert seen == [[0, 1, 2], [1, 2]], "step 3 of 2 a epoch is in the middle of the second one"
