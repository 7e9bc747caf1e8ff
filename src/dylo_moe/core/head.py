"""The language-modelling head, where it can be taken apart from the model that ends in it.

For a loss without logits one needs the hidden states that enter the head, and the certainty that the logits are
nothing but their product with its weight. Some families scale or cap their logits after the head; rather than
listing them, the model itself is asked.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from dylo_moe.core.routing import backbone

_PROBED_LOGIT = 1000.0
"""Far above any cap (Gemma 2 has 30), well inside float16."""


def plain_head(causal_lm: PreTrainedModel) -> nn.Linear | None:
    """The head, if the logits are its product with the backbone's output and nothing else; None otherwise.

    Runs the model on four tokens with large made-up hidden states in the place of the backbone's output.
    """
    head: nn.Module | None = causal_lm.get_output_embeddings()
    # a head that is quantised, adapted, sharded or not loaded yet has its own way to multiply
    if type(head) is not nn.Linear or head.weight.is_meta or head.weight.shape != (head.out_features, head.in_features):
        return None
    if "logits_to_keep" not in inspect.signature(causal_lm.forward).parameters:
        return None
    features = torch.randn(1, 4, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight)
    with torch.no_grad():
        features *= _PROBED_LOGIT / F.linear(features, head.weight).abs().max().clamp(min=1e-3)
        wanted = F.linear(features, head.weight, head.bias)
        hook = backbone(causal_lm).register_forward_hook(partial(_put, features))
        try:
            ids = torch.zeros(1, 4, dtype=torch.long, device=head.weight.device)
            logits = causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            hook.remove()
    plain = logits.shape == wanted.shape and torch.allclose(logits.to(wanted), wanted, rtol=0, atol=_PROBED_LOGIT / 100)
    return head if plain else None


def _put(features: Tensor, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> None:
    output["last_hidden_state"] = features


class BackboneOutput:
    """Holds on to what the backbone gives inside a ``with`` block; registered once, so that a compiler sees no change.

    Args:
        causal_lm: The model whose backbone it is.

    Attributes:
        hidden_states: ``(batch, seq, hidden_size)`` of the last forward in the block; None outside of one.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.hidden_states: Tensor | None = None
        self._wanted = False
        backbone(causal_lm).register_forward_hook(partial(_hold, self))

    @contextmanager
    def held(self, wanted: bool = True) -> Iterator[None]:
        """The block in which the hidden states are held, if they are wanted."""
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted, self.hidden_states = False, None


def _hold(holder: BackboneOutput, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if holder._wanted:
        holder.hidden_states = output[0]
