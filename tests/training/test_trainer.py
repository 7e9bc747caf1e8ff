"""The real HF Trainer on a tiny model: sums of losses, parameters that train, and checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from dylo_moe.core.losses import causal_lm_loss
from dylo_moe.core.routing.balance import load_balance_loss, router_z_loss
from dylo_moe.runs.trainer_arguments import CHECKPOINTING
from dylo_moe.training.trainer import DyLoRATrainer
from tests.support.tiny_folder import tiny_tokenizer, write_tiny_folder
from tests.support.tiny_trainer import rows, trainer_of

ROUTINGS = ["final", "prefix:1", "context:1", "per_layer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


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
        saving = trained_parameters(trainer_of(folder, tmp_path, routing, max_steps=2, **{CHECKPOINTING: True}))
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


def test_base_only_evaluates_the_base_model(folder: Path, tmp_path: Path) -> None:
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
    base = trainer.model.experts.base_model
    base.register_forward_hook(lambda module, args, output: made.append(output.logits.numel()))
    trainer.train()
    assert made == [0]


def test_a_given_sampler_sets_the_order_of_training(folder: Path, tmp_path: Path) -> None:
    order = [5, 0, 3, 1, 7, 2]
    trainer = trainer_of(folder, tmp_path, per_device_train_batch_size=2)
    trainer.train_sampler = order  # type: ignore[assignment]
    lengths = [int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader()]
    sizes = [len(row["input_ids"]) for row in rows()]
    assert lengths == [sizes[one] + sizes[other] for one, other in (order[:2], order[2:4], order[4:])]


class Epochs(list[int]):
    """Sampler that records its epoch each time it is iterated."""

    def __init__(self) -> None:
        super().__init__(range(8))
        self.epoch, self.iterated = 0, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.iterated.append(self.epoch)
        return super().__iter__()


def test_the_sampler_gets_the_epoch_in_a_resumed_run_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # like the loader of a resumed run with several processes, which does not pass the epoch on
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    seen = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_of(folder, tmp_path, **options)
        trainer.train_sampler = Epochs()  # type: ignore[assignment]
        trainer.train(resume_from_checkpoint=resumed)
        seen.append(trainer.train_sampler.iterated)
    assert seen == [[0, 1, 2], [1, 2]], "with two steps an epoch, step 3 is in the middle of the second one"


def test_the_router_has_its_own_rate_in_the_optimizer(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, max_steps=1, learning_rate=1e-3, ours={"router_learning_rate": 0.25})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    rates = {
        id(parameter): group["initial_lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            wanted = 0.25 if name.startswith("router.") else 1e-3
            assert rates.pop(id(parameter)) == wanted
            # Adam's first step equals the rate for any gradient
            step = (parameter.detach() - before[name]).abs().max().item()
            assert step == pytest.approx(wanted, rel=1e-3)
    assert not rates, "each parameter trains once"


def test_without_its_own_rate_the_router_has_the_rate_of_the_experts(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, learning_rate=1e-3)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-3}


def test_warm_restarts_are_the_schedule_of_both_rates(folder: Path, tmp_path: Path) -> None:
    ours = {"warm_restarts": True, "router_learning_rate": 1e-2}
    trainer = trainer_of(folder, tmp_path, warmup_steps=0.2, learning_rate=1e-3, ours=ours)
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(14):
        rates.append({group["lr"] for group in trainer.optimizer.param_groups})
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[2] == rates[12] == {1e-3, 1e-2}
    assert rates[10] == {0.0} and sorted(rates[11]) == pytest.approx([5e-4, 5e-3])


def biased(folder: Path, output: Path, routing: str = "per_layer", **arguments: Any) -> DyLoRATrainer:
    """Return a trainer that moves the bias, while experts and gates stand still."""
    trainer = trainer_of(folder, output, routing, learning_rate=0.0, ours={"balance_update_rate": 0.25}, **arguments)
    with torch.no_grad():
        for gate in trainer.model.router.gates:
            gate[0] = gate[0] * 0.1 + gate[1]  # close to the second gate: an uneven choice
    return trainer


@pytest.mark.parametrize("batch_size", [8, 2])
def test_the_bias_moves_once_a_step_by_the_load_of_the_global_batch(
    folder: Path, tmp_path: Path, batch_size: int
) -> None:
    parts = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
    trainer = biased(folder, tmp_path, max_steps=3, **parts)
    model = trainer.model
    batch = DataCollatorForSeq2Seq(tiny_tokenizer())(
        [{k: v for k, v in row.items() if k != "domain"} for row in rows()]
    )
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).router_logits
    wanted = torch.zeros_like(model.router.selection_bias)
    for _ in range(3):
        load = torch.zeros_like(wanted)
        for gate, example, position in torch.cartesian_prod(*map(torch.arange, logits.shape[:3])).tolist():
            if batch["attention_mask"][example, position]:
                load[gate, (logits[gate, example, position] + wanted[gate]).topk(2).indices] += 1
        wanted = wanted + 0.25 * torch.sign(load.mean(dim=1, keepdim=True) - load)
    trainer.train()
    torch.testing.assert_close(model.router.selection_bias, wanted)
    assert wanted.abs().max() > 0.2


def test_the_bias_evens_the_load_and_leaves_weights_and_gradients_alone(folder: Path, tmp_path: Path) -> None:
    trainer = biased(folder, tmp_path, "prefix:1", max_steps=60, per_device_train_batch_size=8)
    trainer.balance_update_rate = 0.02
    with torch.no_grad():
        trainer.model.router.gates[0][0] *= 4
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def unevenness() -> float:
        load = trainer.model.router.expert_load
        return (load.max() / load.mean()).item() - 1

    trainer.model.eval()
    before = trainer.model(**inputs).routing_weights
    trainer.train()
    trainer.model.eval()
    assert torch.equal(trainer.model(**inputs).routing_weights, before), "young experts are mixed without the bias"
    assert unevenness() < 0.1
    trainer.model.set_maturity()
    shares = (trainer.model(**inputs).routing_weights > 0)[0][batch["attention_mask"] == 1].float().mean(dim=0)
    assert shares.max() / shares.mean() < 1.1, "once routing is sparse, the bias decides"
    trainer.model.router.selection_bias.zero_()
    shares = (trainer.model(**inputs).routing_weights > 0)[0][batch["attention_mask"] == 1].float().mean(dim=0)
    assert shares.max() / shares.mean() > 1.3, "without it the load is uneven"


def test_the_bias_is_saved_with_the_router(folder: Path, tmp_path: Path) -> None:
    trainer = biased(folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    again = biased(folder, tmp_path)
    again.model.load_weights(tmp_path / "checkpoint-1")
    assert torch.equal(again.model.router.selection_bias, trainer.model.router.selection_bias)
    assert trainer.model.router.selection_bias.abs().sum() > 0


def test_evaluating_draws_none_of_the_random_numbers_of_training(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    before = torch.get_rng_state()
    trainer.evaluate()
    trainer.evaluate_without_logging("apart")
    assert torch.equal(torch.get_rng_state(), before)
