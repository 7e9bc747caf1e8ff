"""Routes by the whole prompt: every token of a prompt and of its answer gets the same experts.

A token of a prompt is routed by the tokens before it alone, and the first of them say little. A program that generates
has the whole prompt before it computes anything, and can let all of it decide.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.core.base import evaluating
from dylo_moe.core.lora import ForwardRecord, RoutesFound
from dylo_moe.core.routing import real_tokens
from dylo_moe.errors import RoutingError

if TYPE_CHECKING:
    from dylo_moe.core.model import DyLoRA_MoE

TOKEN, PROMPT = "token", "prompt"
ROUTES = (TOKEN, PROMPT)


def check_route(model: "DyLoRA_MoE", route: str) -> str:
    """Return what decides about a token's experts when a model generates; raise ``RoutingError`` if it cannot."""
    if route not in ROUTES:
        raise RoutingError(f"`route` must be {TOKEN} or {PROMPT}, got {route!r}")
    if route == PROMPT and len(model.router.gates) > 1:
        raise RoutingError(
            f"`route` {PROMPT} needs a routing mode with one gate, such as context, and this is {model.routing}; use "
            f"`route` {TOKEN}"
        )
    return route


def find_prompt_weights(model: "DyLoRA_MoE", input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return what the router gives the last token of each prompt; see ``DyLoRA_MoE.prompt_weights``."""
    check_route(model, PROMPT)
    record = ForwardRecord(ends_with_routes=True)
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    with torch.no_grad(), evaluating(model), suppress(RoutesFound), model.experts.routing_state.scoped(record=record):
        model.experts.base_model(**given)
    (weights,) = record.routing_weights
    rows, length = input_ids.shape
    real = torch.ones_like(input_ids) if attention_mask is None else real_tokens(attention_mask)
    last = (real.long() * torch.arange(length, device=real.device)).argmax(dim=1)
    return weights[torch.arange(rows, device=weights.device), last.to(weights.device)][:, None]


def weights_to_generate(
    model: "DyLoRA_MoE", route: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Tensor | None:
    """Return the weights for the prompts that ``generate`` is given; None to route each token, or without a prompt.

    Args:
        model: The mixture.
        route: ``token`` or ``prompt``.
        args: Arguments of ``generate``.
        kwargs: Keyword arguments of ``generate``.
    """
    if check_route(model, route) == TOKEN:
        return None
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    prompts = next((one for one in given if isinstance(one, Tensor) and one.shape[-1]), None)
    if prompts is None:
        return None
    mask = kwargs.get("attention_mask")
    weights = find_prompt_weights(model, prompts, mask if isinstance(mask, Tensor) else None)
    return F.pad(weights, (0, 1), value=1.0) if model.experts.shared is not None else weights
