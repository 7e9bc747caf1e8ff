"""TRL's trainers on a mixture, which they treat as an ordinary causal LM."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

trl = pytest.importorskip("trl", reason="the package trl is not installed; make test-interop installs it")

from transformers import AutoTokenizer  # noqa: E402

from dylo_moe import DyLoRA_MoE  # noqa: E402
from tests.support.saved_mixture import QUIET, mixture_on, moved, tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # warnings of TRL, not ours

TEXTS = Dataset.from_dict({"text": [f"def f{i}(x):\n    return x + {i}\n" for i in range(8)]})
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"def f{i}" for i in range(8)],
        "chosen": ["(x): return x"] * 8,
        "rejected": ["abc"] * 8,
    }
)
PROMPTS = Dataset.from_dict({"prompt": [f"def f{i}" for i in range(8)]})


def sft(model: DyLoRA_MoE, folder: Path, output: Path, **arguments: Any) -> Any:
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            str(output), max_length=32, **{**QUIET, "max_steps": 2, "save_strategy": "no", "seed": 3, **arguments}
        ),
        train_dataset=TEXTS,
        eval_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def dpo(model: DyLoRA_MoE, folder: Path, output: Path, ref_model: Any = None, **arguments: Any) -> Any:
    return trl.DPOTrainer(
        model,
        ref_model=ref_model,
        args=trl.DPOConfig(str(output), **{**QUIET, "max_steps": 2, "save_strategy": "no", **arguments}),
        train_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def grpo(model: DyLoRA_MoE, folder: Path, output: Path, **arguments: Any) -> Any:
    options = {"max_steps": 2, "save_strategy": "no", "num_generations": 2, "max_completion_length": 6}
    return trl.GRPOTrainer(
        model,
        args=trl.GRPOConfig(str(output), **{**QUIET, **options, **arguments}),
        train_dataset=PROMPTS,
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
    )


def first_loss(trainer: Any) -> float:
    return next(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("kind", [sft, dpo, grpo])
@pytest.mark.parametrize("routing", ["prefix:1", "per_layer"])
def test_experts_and_router_train_and_the_base_stays(
    kind: Any, routing: str, base_folder: Path, tmp_path: Path
) -> None:
    mixture_on(base_folder, routing).save_pretrained(tmp_path / "mixture")
    model = DyLoRA_MoE.from_pretrained(tmp_path / "mixture")
    before = tensors(model)
    kind(model, tmp_path / "mixture", tmp_path / "out").train()
    assert moved(before, model) == {"experts", "router"}


def test_sft_loss_is_the_cross_entropy_of_the_mixture(folder: Path, tmp_path: Path) -> None:
    exact = {"bf16": False, "per_device_eval_batch_size": 1}  # the default of TRL is bfloat16
    trainer = sft(DyLoRA_MoE.from_pretrained(folder), folder, tmp_path, **exact)
    got = trainer.evaluate()["eval_loss"]
    model, tokenizer = DyLoRA_MoE.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids = torch.tensor([row["input_ids"]])
            losses.append(model(ids, labels=ids).lm_loss.item())
    assert tokenizer.eos_token_id == trainer.eval_dataset[0]["input_ids"][-1]
    assert got == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_balance_loss_is_not_in_trls_loss(folder: Path, base_folder: Path, tmp_path: Path) -> None:
    """Check that a coefficient of a million changes nothing, as docs/interop.md says."""
    losses = []
    for coefficient in (0.0, 1e6):
        place = tmp_path / str(coefficient)
        mixture_on(base_folder, balance_coefficient=coefficient).save_pretrained(place / "mixture")
        trainer = sft(DyLoRA_MoE.from_pretrained(place / "mixture"), folder, place / "out")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_dpo_begins_at_ln_2_with_the_saved_mixture_as_its_reference(folder: Path, tmp_path: Path) -> None:
    trainer = dpo(DyLoRA_MoE.from_pretrained(folder), folder, tmp_path)
    assert isinstance(trainer.ref_model, DyLoRA_MoE)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)


def test_dpo_of_a_mixture_saved_just_now_takes_that_folder(base_folder: Path, folder: Path, tmp_path: Path) -> None:
    model = mixture_on(base_folder)
    model.save_pretrained(tmp_path / "mixture")
    trainer = dpo(model, folder, tmp_path / "out")
    trainer.train()
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("options", [{"kind": dpo}, {"kind": grpo, "beta": 0.1}], ids=["dpo", "grpo"])
def test_a_mixture_that_was_never_saved_is_no_reference(
    options: dict[str, Any], base_folder: Path, folder: Path, tmp_path: Path
) -> None:
    kind, *_ = (options.pop(name) for name in ["kind"])
    with pytest.raises(Exception, match=r"not saved: pass ref_model=copy\.deepcopy\(model\)"):
        kind(mixture_on(base_folder), folder, tmp_path, **options)


def test_dpo_takes_a_copy_as_its_reference(base_folder: Path, folder: Path, tmp_path: Path) -> None:
    model = mixture_on(base_folder)
    reference = copy.deepcopy(model)
    before, kept = tensors(model), tensors(reference)
    trainer = dpo(model, folder, tmp_path, ref_model=reference)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert moved(before, model) == {"experts", "router"}
    assert moved(kept, reference) == set()


def test_dpo_scores_the_reference_before_training(base_folder: Path, folder: Path, tmp_path: Path) -> None:
    trainer = dpo(mixture_on(base_folder), folder, tmp_path, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    trainer.train()
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)


def test_a_checkpoint_is_a_mixture_without_its_base(folder: Path, tmp_path: Path) -> None:
    trainer = sft(DyLoRA_MoE.from_pretrained(folder), folder, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    base = sum(value.numel() * 4 for value in trainer.model.experts.base_model.state_dict().values())
    assert not (checkpoint / "model.safetensors").exists()
    assert sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) < base / 2
    assert moved(tensors(DyLoRA_MoE.from_pretrained(checkpoint)), trainer.model) == set()


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(folder: Path, tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sft(DyLoRA_MoE.from_pretrained(folder), folder, tmp_path / "whole", **saving)
    whole.train()
    resumed = sft(DyLoRA_MoE.from_pretrained(folder), folder, tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert moved(tensors(whole.model), resumed.model) == set()


def test_grpo_generates_by_continuous_batching(folder: Path, tmp_path: Path) -> None:
    model = DyLoRA_MoE.from_pretrained(folder)
    before = tensors(model)
    batching = {"num_blocks": 16, "max_batch_tokens": 64}
    trainer = grpo(
        model,
        folder,
        tmp_path,
        bf16=False,  # it would round the base model to generate, and leave it rounded
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=batching,
    )
    trainer.train()
    assert moved(before, model) == {"experts", "router"}
