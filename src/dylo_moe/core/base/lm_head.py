"""The language-modelling head, where the loss can be computed from its input and its weight.

A loss without logits needs the hidden states that enter the head, and logits that are only their product with its
weight. Some model families scale or cap their logits after the head. A forward of the model itself shows whether it
does, so that no list of families is needed.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from dylo_moe.core.base.structure import find_decoder, is_wrapped

_PROBED_LOGIT = 1000.0
"""Logit far above any cap (Gemma 2 has 30) and well inside float16."""


def linear_lm_head(causal_lm: PreTrainedModel, backbone: nn.Module | None = None) -> nn.Linear | None:
    """Return the head if the logits are only its product with the backbone's output; None otherwise.

    Runs the model on four tokens, with large random hidden states instead of the backbone's output.

    Args:
        causal_lm: The model.
        backbone: Its backbone; found if not given.
    """
    head: nn.Module | None = causal_lm.get_output_embeddings()
    # a head that is quantized, adapted, sharded or not loaded yet multiplies in its own way
    if (
        type(head) is not nn.Linear
        or is_wrapped(head)
        or head.weight.is_meta
        or head.weight.shape != (head.out_features, head.in_features)
    ):
        return None
    if "logits_to_keep" not in inspect.signature(causal_lm.forward).parameters:
        return None
    features = torch.randn(1, 4, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight)
    with torch.no_grad():
        features *= _PROBED_LOGIT / F.linear(features, head.weight).abs().max().clamp(min=1e-3)
        wanted = F.linear(features, head.weight, head.bias)
        hook = (backbone or find_decoder(causal_lm).backbone).register_forward_hook(partial(_replace_output, features))
        try:
            ids = torch.zeros(1, 4, dtype=torch.long, device=head.weight.device)
            logits = causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            hook.remove()
    linear = logits.shape == wanted.shape and torch.allclose(
        logits.to(wanted), wanted, rtol=0, atol=_PROBED_LOGIT / 100
    )
    return head if linear else None


def _replace_output(features: Tensor, module: nn.Module, args: tuple[object, ...], output: ModelOutput) -> None:
    output["last_hidden_state"] = features
