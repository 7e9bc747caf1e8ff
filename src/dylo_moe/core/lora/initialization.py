"""How the experts of a new mixture start: as in PEFT, from the base's weights (PiSSA), or from data (EVA).

PiSSA and EVA find principal directions, and one adapter would take the first ``r``. Several experts that start equal
would get proportional gradients and stay equal. So the directions are dealt out in turn: expert e of E takes the e-th,
the (e+E)-th and so on, and all get about the same share of the large ones.

No parameter of the base changes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.core.lora.manager import ExpertManager
from dylo_moe.errors import ExpertError
from dylo_moe.spec import ExpertSpec

_OVERSAMPLING, _ITERATIONS = 8, 16
"""Settings of the randomized SVD, as in PiSSA. Its error does not change the model: what the experts add at the start,
their constant takes away."""

_MAX_FORWARDS = 200
"""Number of forwards after which EVA gives up, because its principal components do not settle."""


def create_experts(experts: ExpertManager, names: Sequence[str | None], spec: ExpertSpec, shared_rank: int = 0) -> None:
    """Create the experts of a new mixture.

    Args:
        experts: Manager of the base model.
        names: Name of each routed expert; None for ``expert_N``.
        spec: Their options.
        shared_rank: Rank of the shared expert, which has the scaling of the others; 0 for none.

    Raises:
        ModelError: The base model cannot carry them.
        ExpertError: The base has too few components for ``init`` pissa.
    """
    from_base, shared = spec.init == "pissa", spec.with_rank(shared_rank) if shared_rank else None
    if from_base:  # twice the rank and the same scaling: the second half of the ranks will hold the constant
        factor = math.sqrt(2) if spec.use_rslora else 2
        spec = replace(spec, rank=2 * spec.rank, alpha=factor * spec.effective_alpha, init="default")
    for name in names:
        experts.create(name, spec)
    if from_base:
        initialize_pissa(experts)
    if shared is not None:
        experts.create(spec=replace(shared, init="default") if from_base else shared, shared=True)


@torch.no_grad()
def initialize_pissa(experts: ExpertManager) -> None:
    """Start with the principal components of the base's weights (PiSSA, Meng et al. 2024, arXiv 2404.02948).

    PiSSA trains ``B A`` from ``B0 A0``, the largest components of ``W``, and subtracts them from ``W``. Here ``W``
    stays as it is, and the constant ``-B0 A0`` is part of the expert: its first half of ranks is ``B, A`` and trains;
    its second half is ``-B0, A0`` and gets no gradient. PEFT makes the same sum when it converts a PiSSA adapter to a
    plain LoRA of twice the rank, and the expert can be exported as one at any time.
    Train it without weight decay, which would shrink the constant.

    Args:
        experts: All of them, created with twice the rank, as ``create_experts`` does.

    Raises:
        ExpertError: The base has fewer components than there are ranks to start.
    """
    for path, layer in _lora_layers(experts):
        names = [name for name in experts.names if name in layer.r]
        count = len(experts.names) * max(layer.r[name] // 2 for name in names)
        weight = _weight(layer)
        if count > min(weight.shape):
            raise ExpertError(
                f"`init` pissa needs `num_experts` x `rank` = {count} components of each weight, and {path} has "
                f"{min(weight.shape)}; lower `rank` or `num_experts`, or leave the module out of `target_modules`"
            )
        left, values, right = torch.svd_lowrank(weight, min(count + _OVERSAMPLING, *weight.shape), _ITERATIONS)
        for name in names:
            dealt = slice(experts.names.index(name), count, len(experts.names))
            root = (values[dealt] / layer.scaling[name]).sqrt()
            down, up = root[:, None] * right[:, dealt].T, left[:, dealt] * root
            a, b = _factors(layer, name)
            a.copy_(torch.cat([down, down]))
            b.copy_(torch.cat([up, -up], dim=1))
    hold_constant(experts, experts.names)


def hold_constant(experts: ExpertManager, names: Sequence[str]) -> None:
    """Stop gradients to the second half of these experts' ranks; see ``initialize_pissa``."""
    for _, layer in _lora_layers(experts):
        for name in names:
            if name in layer.r:
                a, b = _factors(layer, name)
                _hold_second_half(a, dim=0)
                _hold_second_half(b, dim=1)
    experts.pissa_experts.update(names)


def _hold_second_half(parameter: Tensor, dim: int) -> None:
    half = parameter.shape[dim] // 2

    def without_constant(gradient: Tensor) -> Tensor:
        masked = gradient.clone()
        masked.narrow(dim, half, half).zero_()
        return masked

    parameter.register_hook(without_constant)


def initialize_eva(
    experts: ExpertManager, forward: Callable[[Mapping[str, Tensor]], object], batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Start each ``A`` with the directions of largest input variance (EVA, Paischer et al. 2024, arXiv 2410.07170).

    They are the principal components of each layer's inputs, found by PEFT's incremental SVD. ``B`` is zero, so
    nothing changes yet. Ranks are not redistributed between layers (rho = 1): the fused product and the parameter
    budget assume experts of equal rank.

    Args:
        experts: All experts of a new mixture.
        forward: Runs the base model on a batch.
        batches: Batches of data, each with ``attention_mask``, ``(batch, seq)``.

    Raises:
        ExpertError: The batches are too small, a layer too narrow, or the components do not settle.
    """
    ranks = [layer.r[name] for _, layer in _lora_layers(experts) for name in layer.r]
    count = len(experts.names) * max(ranks)
    # the incremental SVD follows twice as many directions as it returns
    large = [dict(batch) for batch in batches if batch["attention_mask"].sum() >= 2 * count]
    if not large:
        raise ExpertError(
            f"`init` eva needs batches of {2 * count} tokens (2 x `num_experts` x `rank`), and the first ones have "
            "fewer; raise `train_batch_size` or `max_seq_length`"
        )
    for path, layer in _lora_layers(experts):
        if layer.in_features < 2 * count:
            raise ExpertError(
                f"`init` eva needs inputs of a width of 2 x `num_experts` x `rank` = {2 * count}, and {path} has "
                f"{layer.in_features}; lower `rank` or `num_experts`"
            )
    components = _principal_inputs(experts, forward, large, count)
    with torch.no_grad():
        for path, layer in _lora_layers(experts):
            for name in layer.r:
                dealt = components[path][experts.names.index(name) :: len(experts.names)]
                a, b = _factors(layer, name)
                a.copy_(dealt[: layer.r[name]])
                b.zero_()


def _principal_inputs(
    experts: ExpertManager,
    forward: Callable[[Mapping[str, Tensor]], object],
    batches: list[dict[str, Tensor]],
    count: int,
) -> dict[str, Tensor]:
    """Return the principal components of each LoRA layer's inputs, largest first, ``(count, in_features)``."""
    forwards = 0

    def counted(model: object, batch: Mapping[str, Tensor]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > _MAX_FORWARDS:
            raise ExpertError(
                f"`init` eva: the principal components of the inputs did not settle in {_MAX_FORWARDS} forwards; "
                "lower `rank` or `num_experts`, or use another `init`"
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


def _lora_layers(experts: ExpertManager) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in experts.peft_model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return ``A``, ``(rank, in)``, and ``B``, ``(out, rank)``, of an expert."""
    return layer.lora_A[name].get_parameter("weight"), layer.lora_B[name].get_parameter("weight")


def _weight(layer: LoraLayer) -> Tensor:
    """Return the base layer's dequantized weight, ``(out, in)``, in float32 at least."""
    base = layer.get_base_layer()
    own = base.weight
    weight: Tensor = dequantize_module_weight(base).detach()
    # on a CPU, PEFT replaces an 8-bit weight by a copy that lacks the state of earlier forwards
    base.weight = own
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.T if isinstance(base, Conv1D) else weight
