"""``model(input_ids, routing_weights=w)`` on plain PEFT models, against what PEFT itself computes.

Runs under pytest, and on its own: ``python -m tests.core.lora.test_enable`` prints a line for each check and
family, and ends with the error of the first that fails.
"""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dylo_moe import enable_routing
from tests.support.families import FAMILIES, LAYERS, relative_error, stir, tiny, token_ids

NAMES = ("first", "second")
RANKS, ALPHAS = (5, 6), (7, 3)  # a scaling of 7/5 is not exact in float32, one of 3/6 is
TOLERANCE = 1e-10
IDS = token_ids(2, 9)


def two_adapters(family: str, dropouts: tuple[float, float] = (0.0, 0.0)) -> PeftModel:
    """A PEFT model with two adapters of unequal ranks and scalings, both active; nothing of this package in it."""
    torch.manual_seed(7)
    configs = [
        LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules="all-linear",
            fan_in_fan_out=family == "gpt2",
        )
        for rank, alpha, dropout in zip(RANKS, ALPHAS, dropouts, strict=True)
    ]
    model = get_peft_model(tiny(family), configs[0], adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], configs[1])
    stir(model)
    model.base_model.set_adapter(list(NAMES))
    return model.eval()


def routed_and_plain(family: str, dropouts: tuple[float, float] = (0.0, 0.0)) -> tuple[PeftModel, PeftModel]:
    """The same model twice: with ``enable_routing``, and as PEFT has it."""
    plain = two_adapters(family, dropouts)
    routed = copy.deepcopy(plain)
    enable_routing(routed)
    return routed, plain


def one_hot(index: int) -> Tensor:
    weights = torch.zeros(*IDS.shape, len(NAMES), dtype=torch.float64)
    weights[..., index] = 1
    return weights


def random_weights() -> Tensor:
    return torch.rand(*IDS.shape, len(NAMES), dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def check_one_hot_is_the_adapter(family: str) -> None:
    """One-hot weights give PEFT's own logits with that adapter alone."""
    routed, plain = routed_and_plain(family)
    logits = []
    for index, name in enumerate(NAMES):
        plain.set_adapter(name)
        logits.append(plain(IDS).logits)
        assert relative_error(routed(IDS, routing_weights=one_hot(index)).logits, logits[-1]) < TOLERANCE
    assert relative_error(logits[0], logits[1]) > 0.01, "the two adapters must differ, or nothing was checked"


def check_all_zero_is_the_base(family: str) -> None:
    """All-zero weights give the logits of the base model."""
    routed, _ = routed_and_plain(family)
    assert relative_error(routed(IDS, routing_weights=one_hot(0) * 0).logits, tiny(family)(IDS).logits) < TOLERANCE


def check_each_layer_adds_the_weighted_deltas(family: str) -> None:
    """Every layer's output is the base's plus ``sum_e w_e s_e B_e A_e x``; equal weights are the mean of the deltas."""
    routed, _ = routed_and_plain(family)
    seen: list[tuple[LoraLayer, Tensor, Tensor]] = []
    for module in routed.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
    for weights in (torch.full((*IDS.shape, 2), 0.5, dtype=torch.float64), random_weights()):
        seen.clear()
        routed(IDS, routing_weights=weights)
        assert len(seen) >= 4 * LAYERS
        for layer, x, output in seen:
            deltas = [layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name] for name in NAMES]
            mixed = sum(weights[..., index, None] * delta for index, delta in enumerate(deltas))
            assert relative_error(output - layer.base_layer(x), mixed) < TOLERANCE


def check_gradients_reach_the_weights(family: str) -> None:
    """The gradient of the weights is the slope of the loss, and that of the adapters is PEFT's own."""
    routed, plain = routed_and_plain(family)
    weights = random_weights().requires_grad_()
    loss = routed(IDS, routing_weights=weights).logits.square().mean()
    loss.backward()
    assert (weights.grad != 0).all()
    # the norms of some families compute in float32 whatever comes in, so the step cannot be small
    direction, step = weights.grad.sign(), 3e-3
    ends = [routed(IDS, routing_weights=weights + sign * step * direction).logits.square().mean() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs((weights.grad * direction).sum() / slope - 1) < 1e-3

    routed.zero_grad()
    routed(IDS, routing_weights=one_hot(1)).logits.square().mean().backward()
    plain.set_adapter(NAMES[1])
    plain(IDS).logits.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters() if f".{NAMES[1]}." in name}
    got = dict(routed.named_parameters())
    assert len(wanted) >= 8 * LAYERS
    for name, gradient in wanted.items():
        assert relative_error(got[name].grad, gradient) < TOLERANCE, name


def check_without_the_argument_nothing_changes(family: str) -> None:
    """PEFT's own calls give the same bits with and without ``enable_routing``."""
    routed, plain = routed_and_plain(family)
    assert routed.state_dict().keys() == plain.state_dict().keys()
    with_both = [model(IDS).logits for model in (routed, plain)]
    assert torch.equal(*with_both)
    for model in (routed, plain):
        model.set_adapter(NAMES[1])
    assert torch.equal(routed(IDS).logits, plain(IDS).logits)
    with routed.disable_adapter():
        assert torch.equal(routed(IDS).logits, tiny(family)(IDS).logits)
    for model in (routed, plain):
        model.merge_adapter([NAMES[1]])
    assert torch.equal(routed(IDS).logits, plain(IDS).logits)
    for model in (routed, plain):
        model.unmerge_adapter()
    unloaded = [model.merge_and_unload() for model in (routed, plain)]
    assert torch.equal(*(model(IDS).logits for model in unloaded))


def check_dropout_is_drawn_as_by_peft(family: str) -> None:
    """While training with dropout, one-hot weights give PEFT's own logits from the same seed."""
    for dropouts in ((0.4, 0.4), (0.0, 0.4)):
        routed, plain = (model.train() for model in routed_and_plain(family, dropouts))
        plain.set_adapter(NAMES[1])
        torch.manual_seed(11)
        got = routed(IDS, routing_weights=one_hot(1)).logits
        torch.manual_seed(11)
        wanted = plain(IDS).logits
        assert relative_error(got, wanted) < TOLERANCE
        assert relative_error(plain.eval()(IDS).logits, wanted) > 1e-3, "dropout must matter, or nothing was checked"


def check_adapters_on_different_modules(family: str) -> None:
    """Each adapter takes its own column, in layers that only one of them adapts too."""
    base = tiny(family)
    targets = [["mlp.dense_h_to_4h"], ["query_key_value", "mlp.dense_h_to_4h"]]
    if family == "gpt2":
        targets = [["mlp.c_fc"], ["c_attn", "mlp.c_fc"]]
    elif family != "neox":
        targets = [["up_proj"], ["q_proj", "up_proj"]]
    model = None
    for name, modules in zip(NAMES, targets, strict=True):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, fan_in_fan_out=family == "gpt2")
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    stir(model)
    model.base_model.set_adapter(list(NAMES))
    plain = copy.deepcopy(model.eval())
    enable_routing(model)
    for index, name in enumerate(NAMES):
        plain.set_adapter(name)
        assert relative_error(model(IDS, routing_weights=one_hot(index)).logits, plain(IDS).logits) < TOLERANCE


CHECKS = (
    check_one_hot_is_the_adapter,
    check_all_zero_is_the_base,
    check_each_layer_adds_the_weighted_deltas,
    check_gradients_reach_the_weights,
    check_without_the_argument_nothing_changes,
    check_dropout_is_drawn_as_by_peft,
    check_adapters_on_different_modules,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_routing_weights_on_plain_peft(check: Callable[[str], None], family: str) -> None:
    check(family)


if __name__ == "__main__":
    for family in FAMILIES:
        for check in CHECKS:
            check(family)
            sys.stdout.write(f"ok {family:6} {check.__doc__}\n")
