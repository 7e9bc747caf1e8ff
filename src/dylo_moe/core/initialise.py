"""How the experts of a new mixture begin: as in PEFT, from the base's weights (PiSSA), or from data (EVA).

The last two know principal directions of which one adapter would take the first ``r``. Several experts that began alike
would get gradients in proportion and stay alike, so the directions are dealt to them in turn: expert e of E takes
the e-th, the (e+E)-th and so on, and all get about the same share of the large ones.

No parameter of the base changes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from dylo_moe.core.expert import ExpertManager
from dylo_moe.errors import ExpertError

_OVERSAMPLING, _ITERATIONS = 8, 16
"""Of the randomised SVD that PiSSA uses as well. How near it comes does not matter to the model: what is added at the
start is what is taken away."""

_MOST_FORWARDS = 200
"""After which EVA is given up: its principal components did not settle."""


def create_experts(
    experts: ExpertManager,
    number: int,
    init: str,
    *,
    rank: int,
    alpha: float | None,
    use_rslora: bool,
    **options: Any,
) -> ExpertManager:
    """Makes the experts of a new mixture; ``DyLoRA_MoE`` says what the arguments mean.

    Raises:
        ModelError: The base model cannot carry them.
        ExpertError: An option is out of its range.
    """
    scale: dict[str, Any] = {"rank": rank, "alpha": alpha, "use_rslora": use_rslora}
    if init == "pissa":
        scale = _with_constant(**scale)
    for _ in range(number):
        experts.create(init_lora_weights=True if init in ("default", "pissa") else init, **scale, **options)
    if init == "pissa":
        initialise_pissa(experts)
    return experts


def _with_constant(rank: int, alpha: float | None, use_rslora: bool) -> dict[str, Any]:
    """The options for an expert of ``rank`` that also holds a constant of that rank, with the same scaling."""
    alpha = 2 * rank if alpha is None else alpha
    return {"rank": 2 * rank, "alpha": alpha * (math.sqrt(2) if use_rslora else 2), "use_rslora": use_rslora}


@torch.no_grad()
def initialise_pissa(experts: ExpertManager) -> None:
    """Begins with the principal components of the base's weights (PiSSA, Meng et al. 2024, arXiv 2404.02948).

    PiSSA trains ``B A`` from ``B0 A0``, the largest components of ``W``, and takes them away from ``W``. Here ``W``
    stays as it is, and the constant ``-B0 A0`` is part of the expert: of its ranks the first half is ``B, A`` and
    trains, and the second half is ``-B0, A0`` and gets no gradient. The sum is what PEFT makes of a PiSSA adapter
    when it converts it to a plain LoRA of twice the rank, and is exported as one at any time.
    Train it without weight decay, which would shrink the constant.

    Args:
        experts: All of them created with the options of ``_with_constant``.

    Raises:
        ExpertError: The base has fewer components than there are ranks to begin.
    """
    for path, layer in _lora_layers(experts):
        names = [name for name in experts.names if name in layer.r]
        count = len(experts.names) * max(layer.r[name] // 2 for name in names)
        weight = _weight(layer)
        if count > min(weight.shape):
            raise ExpertError(
                f"--init pissa deals out num_experts x lora_r = {count} components of each weight, and {path} has "
                f"{min(weight.shape)}; lower --lora_r or --num_experts, or leave it out with --target_modules"
            )
        left, values, right = torch.svd_lowrank(weight, min(count + _OVERSAMPLING, *weight.shape), _ITERATIONS)
        for name in names:
            share = slice(experts.names.index(name), count, len(experts.names))
            root = (values[share] / layer.scaling[name]).sqrt()
            down, up = root[:, None] * right[:, share].T, left[:, share] * root
            layer.lora_A[name].weight.copy_(torch.cat([down, down]))
            layer.lora_B[name].weight.copy_(torch.cat([up, -up], dim=1))
    hold_constant(experts, experts.names)


def hold_constant(experts: ExpertManager, names: Sequence[str]) -> None:
    """Give the second half of these experts' ranks no gradient, as ``initialise_pissa`` says."""
    for _, layer in _lora_layers(experts):
        for name in names:
            if name in layer.r:
                _hold_second_half(layer.lora_A[name].weight, dim=0)
                _hold_second_half(layer.lora_B[name].weight, dim=1)
    experts.held.update(names)


def _hold_second_half(parameter: Tensor, dim: int) -> None:
    half = parameter.shape[dim] // 2

    def without_constant(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept.narrow(dim, half, half).zero_()
        return kept

    parameter.register_hook(without_constant)


def initialise_eva(
    experts: ExpertManager, forward: Callable[[Mapping[str, Tensor]], Any], batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Lets each ``A`` see the directions in which its inputs vary most (EVA, Paischer et al. 2024, arXiv 2410.07170).

    They are the principal components of the inputs of each layer, found by PEFT's incremental SVD; ``B`` is zero, so
    that nothing changes yet. Ranks are not redistributed between layers (rho = 1): experts of equal rank are what
    the fused product and the parameter budget assume.

    Args:
        experts: Those to begin.
        forward: Runs the base model on a batch.
        batches: What to run it on, each with ``attention_mask``, ``(batch, seq)``.

    Raises:
        ExpertError: The batches are too small, a layer too narrow, or the components do not settle.
    """
    ranks = [layer.r[name] for _, layer in _lora_layers(experts) for name in layer.r]
    count = len(experts.names) * max(ranks)
    # the incremental SVD looks at twice as many directions as it returns
    large = [dict(batch) for batch in batches if batch["attention_mask"].sum() >= 2 * count]
    if not large:
        raise ExpertError(
            f"--init eva needs batches of {2 * count} tokens (2 x num_experts x lora_r) and the first ones have fewer; "
            "raise --train_batch_size or --max_seq_length"
        )
    for path, layer in _lora_layers(experts):
        if layer.in_features < 2 * count:
            raise ExpertError(
                f"--init eva needs inputs of a width of 2 x num_experts x lora_r = {2 * count}, and {path} has "
                f"{layer.in_features}; lower --lora_r or --num_experts"
            )
    components = _principal_inputs(experts, forward, large, count)
    with torch.no_grad():
        for path, layer in _lora_layers(experts):
            for name in layer.r:
                dealt = components[path][experts.names.index(name) :: len(experts.names)]
                layer.lora_A[name].weight.copy_(dealt[: layer.r[name]])
                layer.lora_B[name].weight.zero_()


def _principal_inputs(
    experts: ExpertManager,
    forward: Callable[[Mapping[str, Tensor]], Any],
    batches: list[dict[str, Tensor]],
    count: int,
) -> dict[str, Tensor]:
    """``(count, in_features)`` for each LoRA layer by its name, the largest first."""
    forwards = 0

    def counted(model: object, batch: Mapping[str, Tensor]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > _MOST_FORWARDS:
            raise ExpertError(
                f"--init eva: the principal components of the inputs did not settle in {_MOST_FORWARDS} forwards; "
                "lower --lora_r or --num_experts, or use another --init"
            )
        with torch.no_grad():
            forward(batch)

    found: dict[str, Tensor] = get_eva_state_dict(
        experts.peft_model,
        batches,
        peft_config=LoraConfig(r=count, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, use_label_mask=False)),
        forward_fn=counted,
        adapter_name=experts.names[0],
        show_progress_bar=False,
    )
    return found


def _lora_layers(experts: ExpertManager) -> Iterator[tuple[str, Any]]:
    for path, module in experts.peft_model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _weight(layer: Any) -> Tensor:
    """The base layer's weight, ``(out, in)``, as it is in effect; float32 at least."""
    base = layer.get_base_layer()
    own = base.weight
    weight: Tensor = dequantize_module_weight(base).detach()
    # on a CPU, PEFT puts a copy there that has lost what the 8-bit forwards before had settled
    base.weight = own
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.T if layer.fan_in_fan_out else weight
