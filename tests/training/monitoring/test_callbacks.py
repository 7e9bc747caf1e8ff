"""Log entries of real Trainer runs against a slow and obvious computation; warnings; and the end at NaN."""

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from dylo_moe import DyLoRA_MoE
from dylo_moe.data.packing import Item, TokenCollator
from dylo_moe.errors import TrainingError
from dylo_moe.training.monitoring.callbacks import (
    DyLoRAMonitoringCallback,
    GradientMonitoringCallback,
    monitoring_callbacks,
)
from dylo_moe.training.monitoring.gradients import parameter_groups
from dylo_moe.training.trainer import DyLoRATrainer
from tests.support.tiny_folder import tiny_tokenizer, write_tiny_folder
from tests.support.tiny_trainer import rows, trainer_of

DOMAINS = ["even", "odd"]
PAGE = Path(__file__).parents[3] / "docs" / "training.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def monitored(folder: Path, output: Path, routing: str = "prefix:1", **arguments: Any) -> DyLoRATrainer:
    options = {"logging_steps": 1, "logging_nan_inf_filter": False, **arguments}
    trainer = trainer_of(folder, output, routing, **options)
    for callback in monitoring_callbacks(DOMAINS):
        trainer.add_callback(callback)
    return trainer


def entries_of(trainer: DyLoRATrainer) -> list[dict[str, Any]]:
    """Return the log entries of the training, without those of evaluations and of the end."""
    return [entry for entry in trainer.state.log_history if "learning_rate" in entry]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("dylo_moe")]


class Witness:
    """Record of each part of a run: its inputs, and the arguments and output of its forward."""

    def __init__(self, trainer: DyLoRATrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[tuple[int, dict[str, Any], dict[str, Any], Any]] = []
        self._inputs: dict[str, Any] = {}
        compute_loss = trainer.compute_loss

        def spy(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
            self._inputs = dict(inputs)
            return compute_loss(model, inputs, **options)

        monkeypatch.setattr(trainer, "compute_loss", spy)

        def remember(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if module.training:
                self.parts.append((trainer.state.global_step, self._inputs, kwargs, output))

        trainer.model.register_forward_hook(remember, with_kwargs=True)

    def expected(self, steps: range, experts: list[str]) -> dict[str, float]:
        """Return the log entry over these steps, computed token by token."""
        parts = [part for part in self.parts if part[0] in steps]
        weights_of: dict[str | None, list[list[float]]] = defaultdict(list)
        entropies, chosen = [], []
        for _, inputs, _, output in parts:
            for row, column in inputs["attention_mask"].nonzero().tolist():
                gates = output.routing_weights[:, row, column].tolist()
                mean = [sum(gate[e] for gate in gates) / len(gates) for e in range(len(experts))]
                weights_of[None].append(mean)
                weights_of[DOMAINS[inputs["domain"][row]]].append(mean)
                entropies.append(sum(-w * math.log(w) for gate in gates for w in gate) / len(gates))
                chosen.append([sorted(range(len(experts)), key=lambda e: -gate[e])[:2] for gate in gates])
        entries = {}
        for domain, weights in weights_of.items():
            prefix = "expert_usage/" if domain is None else f"expert_usage/{domain}/"
            for e, expert in enumerate(experts):
                entries[prefix + expert] = sum(weight[e] for weight in weights) / len(weights)
        entries["router/entropy"] = sum(entropies) / len(entropies)
        entries["router/normalised_entropy"] = entries["router/entropy"] / math.log(len(experts))
        gates = range(len(chosen[0]))
        counts = [sum(e in token[gate] for token in chosen) for gate in gates for e in range(len(experts))]
        even = 2 * len(chosen) / len(experts)
        entries["router/dead_experts"] = sum(count < even / 10 for count in counts) / len(counts)
        losses = [_router_losses([part for part in parts if part[0] == step]) for step in steps]
        entries["router/balance_loss"] = sum(balance for balance, _ in losses) / len(steps)
        entries["router/z_loss"] = sum(z for _, z in losses) / len(steps)
        return entries


def _router_losses(parts: list[Any]) -> tuple[float, float]:
    """Return balance and z loss of one global batch, by their definitions."""
    logits = torch.cat([output.router_logits[:, inputs["attention_mask"].bool()] for _, inputs, _, output in parts], 1)
    logits = logits.detach()
    load = parts[0][2]["expert_load"]
    balance = 0.0
    for gate in range(len(logits)):
        probability = logits[gate].softmax(dim=-1).mean(dim=0)
        fraction = load[gate] / load[gate].sum()
        balance += float(logits.shape[-1] * (probability * fraction).sum()) / len(logits)
    return balance, float((logits.exp().sum(dim=-1).log() ** 2).mean())


@pytest.mark.parametrize("routing", ["prefix:1", "per_layer", "final"])
def test_routing_figures_are_means_over_the_tokens_since_the_last_entry(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routing: str
) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1}  # what an evaluation routes must not count
    trainer = monitored(folder, tmp_path, routing, max_steps=4, logging_steps=2, **options)
    witness = Witness(trainer, monkeypatch)
    trainer.train()
    found = entries_of(trainer)
    assert [entry["step"] for entry in found] == [2, 4]
    assert any((inputs["attention_mask"] == 0).any() for _, inputs, _, _ in witness.parts), "there must be padding"
    for entry, steps in zip(found, (range(0, 2), range(2, 4)), strict=True):
        expected = witness.expected(steps, trainer.model.experts.names)
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert sum(entry[f"expert_usage/odd/{name}"] for name in trainer.model.experts.names) == pytest.approx(1)


def test_an_accumulated_batch_is_logged_as_the_whole_one(folder: Path, tmp_path: Path) -> None:
    found = []
    for size, parts in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = monitored(folder, tmp_path, max_steps=3, logging_steps=3, **options)
        trainer.train()
        (entry,) = entries_of(trainer)
        watched = ("expert_", "router/", "grad_norm")
        found.append({key: value for key, value in entry.items() if key.startswith(watched)})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 15
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def packed_items() -> list[Item]:
    """Return rows of one to three examples, and an empty one that only fills the batch."""
    lengths = [[5, 7], [4], [9], [3, 3, 3], []]
    generator = torch.Generator().manual_seed(1)
    return [
        Item(
            input_ids=[torch.randint(3, 250, (n,), generator=generator).int().numpy() for n in row],
            prompt_lengths=[1] * len(row),
            domain=index % 2,
            packed=True,
        )
        for index, row in enumerate(lengths)
    ]


def test_packed_rows_count_and_filler_rows_do_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = monitored(folder, tmp_path, max_steps=1, per_device_train_batch_size=5)
    trainer.train_dataset, trainer.data_collator = packed_items(), TokenCollator(0)
    witness = Witness(trainer, monkeypatch)
    trainer.train()
    (entry,) = entries_of(trainer)
    expected = witness.expected(range(1), trainer.model.experts.names)
    assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert witness.parts[0][1]["attention_mask"].sum(dim=1).tolist() == [12, 4, 9, 9, 0]


def test_concatenated_rows_of_several_domains_have_no_usage_per_domain(folder: Path, tmp_path: Path) -> None:
    trainer = monitored(folder, tmp_path, max_steps=1, per_device_train_batch_size=2)
    trainer.train_dataset, trainer.data_collator = packed_items()[:2], TokenCollator(0, flatten=True)
    trainer.train()
    (entry,) = entries_of(trainer)
    assert "expert_usage/expert_0" in entry
    assert not any(key.startswith(("expert_usage/even/", "expert_usage/odd/")) for key in entry)


def recorded_gradients(trainer: DyLoRATrainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Return a list that collects the gradients of each step before clipping."""
    found: list[dict[str, Tensor]] = []
    clip = trainer._clip_grad_norm

    def spy(model: Any) -> Any:
        parameters = trainer.model.named_parameters()
        found.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        return clip(model)

    monkeypatch.setattr(trainer, "_clip_grad_norm", spy)
    return found


@pytest.mark.parametrize("routing", ["prefix:1", "per_layer"])
def test_gradient_norms_are_each_experts_own_and_unclipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routing: str
) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1e-3}
    trainer = monitored(folder, tmp_path, routing, max_steps=3, **options)
    gradients = recorded_gradients(trainer, monkeypatch)
    trainer.train()
    assert len(gradients) == 3
    for entry, step in zip(entries_of(trainer), gradients, strict=True):
        parts = {name: f".{name}." for name in trainer.model.experts.names} | {"router": "router.gates"}
        for name, marker in parts.items():
            squares = [(gradient**2).sum().item() for key, gradient in step.items() if marker in key]
            assert squares, name
            assert entry[f"grad_norm/{name}"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)
        assert sum(entry[f"grad_norm/{name}"] ** 2 for name in parts) == pytest.approx(entry["grad_norm"] ** 2)
        assert entry["grad_norm"] > 1e-2, "must have been clipped"


def test_norms_are_logged_without_clipping_too(folder: Path, tmp_path: Path) -> None:
    trainer = monitored(folder, tmp_path, max_steps=1, max_grad_norm=0)
    trainer.train()
    (entry,) = entries_of(trainer)
    parts = [value for key, value in entry.items() if key.startswith("grad_norm/")]
    assert len(parts) == 4
    assert sum(value**2 for value in parts) == pytest.approx(entry["grad_norm"] ** 2)


def test_only_trained_parameters_are_monitored(folder: Path, tmp_path: Path) -> None:
    trainer = monitored(folder, tmp_path, max_steps=1)
    trainer.model.experts.freeze("expert_1")
    assert list(parameter_groups(trainer.model)) == ["expert_0", "expert_2", "router"]
    trainer.model.experts.set_active("expert_2")
    assert list(parameter_groups(trainer.model)) == ["expert_2"]
    trainer.train()
    (entry,) = entries_of(trainer)
    assert [key for key in entry if key.startswith("grad_norm/")] == ["grad_norm/expert_2"]
    assert entry["expert_usage/expert_2"] == 1 and "router/normalised_entropy" not in entry


def test_monitoring_changes_no_bit_of_the_training(folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    watched, alone = monitored(folder, tmp_path, **options), trainer_of(folder, tmp_path, **options)
    for trainer in (watched, alone):
        trainer.train()
    theirs = dict(alone.model.named_parameters())
    for name, parameter in watched.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert not any("expert_usage" in key for entry in alone.state.log_history for key in entry)


def test_figures_are_in_the_trainers_entries_and_the_docs_list_every_name(folder: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "include_num_input_tokens_seen": "non_padding"}
    trainer = monitored(folder, tmp_path, max_steps=2, **options)
    trainer.train()
    assert [entry["step"] for entry in entries_of(trainer)] == [1, 2]
    assert entries_of(trainer)[0].keys() >= {"loss", "grad_norm/expert_0", "router/maturity/expert_2", "memory_mib"}
    page = PAGE.read_text()
    names = {key for entry in trainer.state.log_history for key in entry} - {"step"}
    for name in names:
        general = name
        for expert in trainer.model.experts.names:
            general = general.replace(expert, "<expert>")
        for domain in DOMAINS:
            general = general.replace(f"/{domain}", "/<domain>")
        assert f"`{general}`" in page, general


def test_maturity_and_memory_are_logged(folder: Path, tmp_path: Path) -> None:
    trainer = monitored(folder, tmp_path, max_steps=1)
    trainer.model.set_maturity(1, ["expert_1"])
    trainer.train()
    (entry,) = entries_of(trainer)
    assert [entry[f"router/maturity/expert_{n}"] for n in range(3)] == [0, 1, 0]
    assert 50 < entry["memory_mib"] < 100_000
    assert "accelerator_memory_mib" not in entry


class Clock(TrainerCallback):
    """Clock that counts two seconds a step, and a hundred an evaluation batch."""

    def __init__(self) -> None:
        self.now = 1000.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.now += 2

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.now += 100


def test_speed_excludes_evaluations(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("dylo_moe.training.monitoring.callbacks.time", SimpleNamespace(monotonic=lambda: clock.now))
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = monitored(folder, tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=8, **evaluation)
    trainer.add_callback(clock)
    trainer.evaluate()
    trainer.train()
    tokens = sum(map(len, rows()["input_ids"]))
    assert [entry["tokens_per_second"] for entry in entries_of(trainer)] == [tokens / 2, tokens / 2]


def one_token_rows() -> Dataset:
    row = {"input_ids": [7] * 6, "attention_mask": [1] * 6, "labels": [7] * 6, "domain": 0}
    return Dataset.from_list([row] * 8)


def point_router(model: DyLoRA_MoE, logit: float) -> None:
    """Give expert_0 this logit at every token 7, and the others 0; for routing ``prefix:0``."""
    hidden = model.experts.base_model.get_input_embeddings().weight[7].detach().double()
    gate = model.router.gates[0]
    gate.data.zero_()
    gate.data[0] = logit * hidden / hidden.norm() / math.sqrt(len(hidden))


def test_a_collapse_is_warned_of_once_with_its_remedy(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = monitored(folder, tmp_path, "prefix:0", max_steps=6, logging_steps=2, learning_rate=1e-6)
    trainer.train_dataset = one_token_rows()
    point_router(trainer.model, 4.0)
    trainer.train()
    share = math.exp(4) / (math.exp(4) + 2)
    assert [entry["expert_usage/expert_0"] for entry in entries_of(trainer)] == pytest.approx([share] * 3, rel=1e-3)
    (said,) = warnings_of(caplog)
    assert "collapsed: expert_0 got 96%" in said and "up to step 2" in said
    assert "raise `balance_coefficient` (now 0.5)" in said


def test_a_collapse_at_one_layer_is_warned_of_even_if_the_mean_is_balanced(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = monitored(folder, tmp_path, "per_layer", max_steps=2, logging_steps=2, learning_rate=1e-6)
    gates = trainer.model.router.gates
    for gate in gates:
        gate.data.zero_()
    # the first layer reads the embeddings: give them a component that the gate reacts to
    trainer.model.experts.base_model.get_input_embeddings().weight.data[:, 0] = 1
    gates[0].data[1, 0] = 50.0
    trainer.train()
    (said,) = warnings_of(caplog)
    assert "collapsed at layer 0 and perhaps others: expert_1 got 9" in said or "expert_1 got 100%" in said
    (entry,) = entries_of(trainer)
    assert entry["router/collapsed"] == pytest.approx(1 / len(gates))
    assert entry["expert_usage/expert_1"] < 0.9


def test_layers_with_one_expert_have_not_collapsed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = DyLoRA_MoE(str(folder), 3, rank=4, routing="per_layer", experts_per_layer=[1, 3])
    trainer = DyLoRATrainer(
        model,
        DOMAINS,
        args=monitored(folder, tmp_path, max_steps=2, logging_steps=1).args,
        train_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        callbacks=monitoring_callbacks(DOMAINS),
    )
    trainer.train()
    assert not warnings_of(caplog)
    assert [entry["router/collapsed"] for entry in entries_of(trainer)] == [0, 0]
    assert all(0.5 < entry["router/normalised_entropy"] <= 1 for entry in entries_of(trainer))


def test_without_a_balance_loss_the_remedy_is_to_add_one(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = monitored(folder, tmp_path, "prefix:0", max_steps=1, learning_rate=1e-6)
    trainer.train_dataset = one_token_rows()
    trainer.model.losses.balance_coefficient = 0.0
    point_router(trainer.model, 4.0)
    trainer.train()
    (said,) = warnings_of(caplog)
    assert said.endswith("up to step 1: set `balance` to switch")


def test_a_balanced_run_warns_of_nothing(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = monitored(folder, tmp_path, "prefix:0", max_steps=6, logging_steps=2, learning_rate=1e-6)
    trainer.train_dataset = one_token_rows()
    point_router(trainer.model, 2.0)  # 0.79 for expert_0: uneven, but no collapse
    trainer.train()
    assert not warnings_of(caplog)


def zero_the_gradient(trainer: DyLoRATrainer, parameters: Any, steps: range = range(1000)) -> None:
    for parameter in parameters:
        parameter.register_hook(lambda grad: torch.zeros_like(grad) if trainer.state.global_step in steps else grad)


@pytest.mark.parametrize(("steps", "times"), [(49, 0), (50, 1), (51, 1)])
def test_a_zero_gradient_is_warned_of_after_fifty_steps(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, times: int
) -> None:
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = monitored(folder, tmp_path, max_steps=steps, **parts)
    zero_the_gradient(trainer, trainer.model.experts.parameters("expert_1"))
    trainer.train()
    said = warnings_of(caplog)
    assert len(said) == times
    assert all("the gradient of expert_1 was exactly zero for 50 steps" in one for one in said)
    assert all("raise `balance_coefficient` (now 0.5)" in one for one in said)
    assert entries_of(trainer)[-1]["grad_norm/expert_1"] == 0


@pytest.mark.parametrize(("zero", "times"), [(range(0, 4), 0), (range(1, 6), 1), (range(0, 12), 1)])
def test_only_consecutive_zero_gradients_count(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, zero: range, times: int
) -> None:
    trainer = trainer_of(folder, tmp_path, max_steps=12, logging_steps=4)
    trainer.add_callback(GradientMonitoringCallback(zero_gradient_steps=5))
    gates = list(trainer.model.router.gates)
    zero_the_gradient(trainer, gates, zero)
    if len(zero) == 4:  # and four more, after a step that was not zero
        zero_the_gradient(trainer, gates, range(5, 9))
    trainer.train()
    said = warnings_of(caplog)
    assert len(said) == times
    assert all("gradient of router" in one and "raise `router_temperature` (now 1)" in one for one in said)


def spoil(trainer: DyLoRATrainer, what: str, step: int) -> None:
    """Make the first part of a step's batch NaN or infinite, or one expert's gradient NaN."""
    if what == "gradient":
        parameter = next(trainer.model.experts.parameters("expert_1"))
        parameter.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == step else grad)
        return
    seen: list[int] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not trainer.model.training:
            return None
        seen.append(trainer.state.global_step)
        first_part = seen.count(step) == 1 and seen[-1] == step
        return output * float(what) if first_part else None

    trainer.model.experts.base_model.get_input_embeddings().register_forward_hook(hook)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "the loss is nan in step 3;"),
        ("inf", "the loss is nan in step 3;"),
        ("gradient", "the loss is finite, but not the gradient of expert_1 in step 3;"),
    ],
)
@pytest.mark.parametrize("logging_steps", [1, 2, 500])
def test_a_loss_of_nan_ends_the_run_and_names_the_last_good_checkpoint(
    folder: Path, tmp_path: Path, what: str, message: str, logging_steps: int
) -> None:
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": logging_steps}
    options = {**parts, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    trainer = monitored(folder, tmp_path / "bad", **options, eval_steps=2)
    spoil(trainer, what, 2)
    with pytest.raises(TrainingError) as raised:
        trainer.train()
    checkpoint = tmp_path / "bad" / "checkpoint-2"
    said = str(raised.value)
    assert message in said and f"resume with `resume_from_checkpoint` {checkpoint}," in said
    assert "`learning_rate` (now 0.01)" in said and "`max_grad_norm` (now 1)" in said and "\n" not in said
    assert [path.name for path in (tmp_path / "bad").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not any(math.isnan(value) for entry in trainer.state.log_history for value in entry.values())

    good, resumed = (monitored(folder, tmp_path / output, **options, eval_steps=2) for output in ("good", "bad"))
    good.train()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    theirs = dict(good.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


class Breaks(TrainerCallback):
    """Callback that makes a weight infinite after a step with finite loss and gradients."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            next(kwargs["model"].experts.parameters("expert_2")).data[0, 0] = math.inf


def test_weights_that_are_not_finite_are_neither_evaluated_nor_saved(folder: Path, tmp_path: Path) -> None:
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = monitored(folder, tmp_path, max_steps=4, **each)
    trainer.add_callback(Breaks(2))
    with pytest.raises(TrainingError, match="step 2 has left weights that are not finite") as raised:
        trainer.train()
    assert f"`resume_from_checkpoint` {tmp_path}/checkpoint-1" in str(raised.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1]


def test_nan_before_the_first_checkpoint_advises_to_start_again(folder: Path, tmp_path: Path) -> None:
    trainer = monitored(folder, tmp_path, max_steps=2)
    spoil(trainer, "nan", 0)
    with pytest.raises(TrainingError, match=r"in step 1; there is no checkpoint of this run yet, so start again"):
        trainer.train()


def test_tensorboard_has_the_same_figures_as_the_history(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = monitored(folder, tmp_path, max_steps=4, logging_steps=2, report_to=["tensorboard"])
    monkeypatch.chdir(tmp_path)  # where a writer without a folder would write
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events.parent)).Reload()
    found = entries_of(trainer)
    watched = ("expert_usage/", "router/", "grad_norm/", "tokens_", "memory")
    names = [name for name in found[0] if name.startswith(watched)]
    assert len(names) > 20
    for name in names:
        scalars = {scalar.step: scalar.value for scalar in written.Scalars(f"train/{name}")}
        assert scalars == pytest.approx({entry["step"]: entry[name] for entry in found}, rel=1e-6)


def test_there_are_two_monitoring_callbacks() -> None:
    gradients, router = monitoring_callbacks(DOMAINS)
    assert isinstance(gradients, GradientMonitoringCallback) and gradients.zero_gradient_steps == 50
    assert isinstance(router, DyLoRAMonitoringCallback) and router.collapsed_above == 0.9
