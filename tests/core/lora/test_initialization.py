"""How experts start: the mixture equals the base, the base never changes, and no two experts are equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import ExpertError
from tests.support.families import gradients, relative_error, tiny, token_ids

INITIALIZATIONS = ("default", "gaussian", "orthogonal", "eva", "pissa")


def started(init: str, family: str = "llama", *, base: Any = None, **options: Any) -> DyLoRA_MoE:
    torch.manual_seed(4)
    base = tiny(family) if base is None else base
    options = {"num_experts": 2, "rank": 4, "routing": "prefix:1", **options}
    model = DyLoRA_MoE(base, init="default" if init == "eva" else init, **options)
    model.router.double()
    if init == "eva":
        model.initialize_eva(data())
    return model.eval()


def data() -> list[dict[str, Tensor]]:
    ids = [token_ids(4, 16, seed) for seed in range(4)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


def plain_state(base: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in base.named_parameters()
        if "lora_" not in name
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_the_base_stays_as_it_is_and_the_mixture_starts_as_the_base(init: str, family: str) -> None:
    base = tiny(family)
    before, ids = plain_state(base), token_ids(2, 9)
    logits = base(ids).logits
    model = started(init, family, base=base)
    after = plain_state(model.experts.base_model)
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name
    # PEFT makes the orthogonal halves in float32, and their product is zero up to its rounding
    assert relative_error(model(ids).logits, logits) < (1e-6 if init == "orthogonal" else 1e-12)


@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_every_expert_gets_gradients_and_no_two_start_equal(init: str) -> None:
    model = started(init).train()
    ids = token_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    for index in range(2):
        assert any(found[name].abs().max() > 0 for name in found if f".expert_{index}." in name)
    assert not any("base_layer" in name or ("lora_" not in name and "router" not in name) for name in found)
    first = {name: p for name, p in model.named_parameters() if ".lora_A.expert_0." in name}
    for name, parameter in first.items():
        other = model.get_parameter(name.replace("expert_0", "expert_1"))
        overlap = torch.linalg.matrix_norm(directions(parameter) @ directions(other).T, ord=2)
        assert overlap < 0.99, f"{name}: a direction of one expert is a direction of the other"


def directions(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows."""
    _, values, rows = torch.linalg.svd(matrix.detach(), full_matrices=False)
    return rows[values > 1e-8 * values[0]]


def test_eva_deals_out_the_principal_directions_of_the_inputs() -> None:
    model = started("eva")
    layer = model.experts.base_model.model.layers[1].self_attn.q_proj
    inputs = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad(), model.base_only():
        for batch in data():
            model(batch["input_ids"])
    hook.remove()
    rows = torch.cat(inputs)
    _, _, wanted = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    for place, name in enumerate(model.experts.names):
        found = layer.lora_A[name].weight
        assert torch.linalg.matrix_norm(found @ found.T - torch.eye(4), ord=2) < 1e-4, "the directions are orthonormal"
        # the largest ones settle first; the later ones are near each other in size
        for rank in range(2):
            assert torch.dot(found[rank], wanted[2 * rank + place]).abs() > 0.9
        assert not layer.lora_B[name].weight.any()


def test_eva_leaves_padding_out() -> None:
    def started_from(width: int) -> Tensor:
        model = started("default")
        batches = []
        for batch in data():
            junk = torch.full((4, width), 7)
            joined = {"input_ids": torch.cat([batch["input_ids"], junk], dim=1)}
            joined["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros_like(junk)], dim=1)
            batches.append(joined)
        model.initialize_eva(batches)
        return model.get_parameter("model.base_model.model.model.layers.2.self_attn.q_proj.lora_A.expert_0.weight")

    torch.testing.assert_close(started_from(0).abs(), started_from(5).abs(), rtol=1e-3, atol=1e-4)


def test_pissa_trains_from_the_principal_components_against_a_constant() -> None:
    """Compare with ``B0 A0`` of a full SVD, dealt out to the experts in turn."""
    model = started("pissa", rank=3, alpha=5.0)
    assert model.experts.pissa_experts == {"expert_0", "expert_1"}
    layer = model.experts.base_model.model.layers[1].self_attn.o_proj
    weight, scaling = layer.base_layer.weight, layer.scaling["expert_1"]
    assert scaling == pytest.approx(5.0 / 3)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for place, name in enumerate(model.experts.names):
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        assert torch.equal(down[:3], down[3:]) and torch.equal(up[:, :3], -up[:, 3:])
        share = slice(place, 6, 2)
        wanted = left[:, share] * values[share] @ right[share]
        assert relative_error(scaling * up[:, :3] @ down[:3], wanted) < 1e-4
    model.experts.set_active("expert_1")
    ids = token_ids(2, 9)
    model.train()(ids, labels=ids).loss.backward()
    down, up = layer.lora_A["expert_1"].weight, layer.lora_B["expert_1"].weight
    assert not down.grad[3:].any() and not up.grad[:, 3:].any(), "the constant gets no gradient"
    assert down.grad[:3].any() and up.grad[:, :3].any()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_the_constant_of_pissa_never_moves(optimizer_class: type[torch.optim.Optimizer]) -> None:
    model = started("pissa").train()
    chosen = [p for p in model.parameters() if p.requires_grad]
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {"weight_decay": 0.0}
    optimizer = optimizer_class(chosen, lr=1e-2, **options)
    layer = model.experts.base_model.model.layers[2].self_attn.v_proj
    before = layer.lora_A["expert_0"].weight.detach().clone()
    for seed in range(3):
        ids = token_ids(2, 9, seed)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = layer.lora_A["expert_0"].weight
    assert torch.equal(after[4:], before[4:])
    assert not torch.equal(after[:4], before[:4])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_a_trained_expert_is_exported_as_a_plain_adapter_that_is_the_same(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    model = started(init, use_rslora=rslora).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = token_ids(2, 9)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().experts.export("expert_1", tmp_path / "adapter")
    model.experts.set_active("expert_1")
    logits = model(ids).logits
    plain = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
    assert relative_error(plain(ids).logits, logits) < 1e-6
    assert relative_error(tiny()(ids).logits, logits) > 1e-4
    model.experts.activate_all()
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", tiny())
    loaded.router.double()
    assert relative_error(loaded(ids).logits, model(ids).logits) < 1e-6


def test_parameters_that_train_are_counted_without_the_constant() -> None:
    assert started("pissa").num_trainable_parameters() == started("default").num_trainable_parameters()


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        ("pissa", {"rank": 9}, "`init` pissa needs `num_experts` x `rank` = 18 components"),
        ("eva", {"rank": 9}, "`init` eva needs inputs of a width of 2 x `num_experts` x `rank` = 36"),
        ("eva", {"rank": 17}, "`init` eva needs batches of 68 tokens"),
        ("olora", {}, "`init` must be one of default, gaussian, orthogonal, pissa, got 'olora'"),
    ],
)
def test_impossible_starts_are_refused(init: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ExpertError, match=message):
        started(init, **options)
