"""The parts of a mixture, built once: experts and router on a base model, new or read from a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from dylo_moe.core.base import load_base_model, portable_name
from dylo_moe.core.lora import ExpertManager, check_experts_per_block, create_experts
from dylo_moe.core.output import AuxLossWeights
from dylo_moe.core.routing import SUM_TO_ONE, DynamicHybridRouter, make_router
from dylo_moe.errors import ExpertError
from dylo_moe.spec import ExpertSpec, RoutingMode


@dataclass(frozen=True)
class RouterSpec:
    """Options of a mixture's router.

    Attributes:
        routing: Routing mode; see ``DyLoRA_MoE``.
        top_k: Experts per token when routing is sparse; 2 by default, or 1 if there is one expert.
        temperature: Divisor of the router's logits.
        experts_per_block: Number of the first experts that each block of layers carries; None for all.
        expert_scale: ``sum_to_one`` or ``unit``; see ``DynamicHybridRouter``.
    """

    routing: str = "per_layer"
    top_k: int | None = None
    temperature: float = 1.0
    experts_per_block: Sequence[int] | None = None
    expert_scale: str = SUM_TO_ONE


@dataclass(frozen=True)
class Parts:
    """Everything that a ``DyLoRA_MoE`` is made of.

    Attributes:
        base_name: Name that loads the base model from any working directory.
        revision: Revision of the base model on the Hub.
        routing_mode: Routing mode, with its layer.
        experts: The experts, with their base model.
        router: The router, which grows with the experts.
        loss_weights: Weights of the router's losses.
        prompt_template: Template around conversations in training, ``chat`` or ``plain``.
    """

    base_name: str
    revision: str | None
    routing_mode: RoutingMode
    experts: ExpertManager
    router: DynamicHybridRouter
    loss_weights: AuxLossWeights
    prompt_template: str | None = None


def build_parts(
    experts: ExpertManager,
    num_experts: int,
    add_experts: Callable[[ExpertManager], object],
    spec: RouterSpec,
    *,
    base_name: str,
    revision: str | None,
    loss_weights: AuxLossWeights,
    prompt_template: str | None = None,
) -> Parts:
    """Build the parts of a mixture on a base model.

    Args:
        experts: Manager of the base model, still without experts.
        num_experts: Number of experts that ``add_experts`` adds.
        add_experts: Creates or imports the experts.
        spec: Options of the router.
        base_name: See ``Parts``.
        revision: See ``Parts``.
        loss_weights: See ``Parts``.
        prompt_template: See ``Parts``.

    Raises:
        ExpertError: An expert cannot be added.
        ModelError: The base model cannot carry the experts.
        RoutingError: The mode does not fit the model, or a number is out of its range.
    """
    mode = RoutingMode.parse(spec.routing, len(experts.decoder.layers))
    # before the experts: an impossible router is refused while the base model is unchanged
    top_k = min(2, num_experts) if spec.top_k is None else spec.top_k
    router = make_router(experts, mode, num_experts, top_k, spec.temperature, spec.experts_per_block, spec.expert_scale)
    experts.place_on_layers(mode.first_expert_layer, spec.experts_per_block)
    add_experts(experts)
    experts.on_added.append(router.add_expert)
    return Parts(base_name, revision, mode, experts, router, loss_weights, prompt_template)


def new_parts(
    model: str | PreTrainedModel,
    num_experts: int,
    expert_spec: ExpertSpec,
    router_spec: RouterSpec,
    loss_weights: AuxLossWeights,
    *,
    expert_names: Sequence[str] | None = None,
    shared_rank: int = 0,
    revision: str | None,
    **loading: Any,
) -> Parts:
    """Build the parts of a new mixture.

    Args:
        model: Name of the base model, or the loaded base model.
        num_experts: Number of experts to create.
        expert_spec: Options of the experts.
        router_spec: Options of the router.
        loss_weights: Weights of the router's losses.
        expert_names: Names of the experts.
        shared_rank: Rank of the shared expert; 0 for none.
        revision: Revision of the base model on the Hub.
        **loading: Passed to ``load_base_model``, if the base model is given by its name.

    Raises:
        ExpertError: An option of the experts is out of its range.
        ModelError: The base model cannot be loaded or cannot carry the experts.
        RoutingError: See ``build_parts``.
    """
    base = load_base_model(model, revision=revision, **loading) if isinstance(model, str) else model
    base_name, revision = portable_name(model, revision)
    experts = ExpertManager(base)
    blocks, layers = router_spec.experts_per_block, len(experts.decoder.layers)
    check_experts_per_block(blocks, num_experts, RoutingMode.parse(router_spec.routing, layers), layers)
    names = [None] * num_experts if expert_names is None else list(expert_names)
    if len(names) != num_experts:
        raise ExpertError(f"`expert_names` must be {num_experts} names, one for each expert, got {len(names)}")
    create = partial(create_experts, names=names, spec=expert_spec, shared_rank=shared_rank)
    return build_parts(
        experts, num_experts, create, router_spec, base_name=base_name, revision=revision, loss_weights=loss_weights
    )
