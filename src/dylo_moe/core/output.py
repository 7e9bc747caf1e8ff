"""The output of a mixture's forward, and the router's losses in it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from dylo_moe.core.lora import ForwardRecord
from dylo_moe.core.losses import causal_lm_loss, linear_causal_lm_loss
from dylo_moe.core.routing import load_balance_loss, router_z_loss


@dataclass
class DyLoRAOutput(CausalLMOutputWithPast):
    """Output of a forward: that of any causal LM, and the router's.

    ``loss`` is ``lm_loss + aux_loss`` while training, and ``lm_loss`` alone while evaluating, so that its exponential
    is a perplexity; it is None without labels. ``logits`` are None with ``return_logits=False``.

    Attributes:
        lm_loss: Cross-entropy in nats per labelled token.
        aux_loss: ``balance_coefficient * balance_loss + z_loss_coefficient * z_loss``.
        balance_loss: Balance loss before its coefficient.
        z_loss: Router z-loss before its coefficient.
        router_logits: ``(num_gates, batch, seq, num_active_experts)``; None if the router did not run.
        routing_weights: Weights that mixed the experts, of the same shape; None if the router did not run.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: Tensor | None = None
    routing_weights: Tensor | None = None


@dataclass
class AuxLossWeights:
    """Weights of the router's losses; 0 leaves a loss out.

    Attributes:
        balance_coefficient: Weight of the balance loss.
        z_loss_coefficient: Weight of the router z-loss.
    """

    balance_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0


class LossOptions(NamedTuple):
    """What a forward with labels takes into account.

    Attributes:
        smoothing: Share of each target spread over the vocabulary.
        num_items_in_batch: Number of labelled tokens in the whole global batch, if this is a part of one.
        num_tokens_in_batch: Number of real tokens in the whole global batch, likewise.
        expert_load: Expert counts of a larger batch, ``(num_gates, num_active_experts)``; see
            ``balance.load_balance_loss``.
        return_logits: False leaves out the logits. The loss is then computed in chunks, at the labelled tokens alone,
            and ``backward`` can run once.
    """

    smoothing: float = 0.0
    num_items_in_batch: Tensor | int | None = None
    num_tokens_in_batch: Tensor | int | None = None
    expert_load: Tensor | None = None
    return_logits: bool = True


def make_output(base_output: ModelOutput, record: ForwardRecord) -> DyLoRAOutput:
    """Return the base model's output, without its loss, together with the router's record."""
    # only known fields: versions of transformers differ in the name of the cache
    known = CausalLMOutputWithPast.__dataclass_fields__
    result = DyLoRAOutput(**{name: value for name, value in base_output.items() if name in known and name != "loss"})
    if record.router_logits:
        assert result.logits is not None
        device = result.logits.device
        result.router_logits = torch.stack([logits.to(device) for logits in record.router_logits])
        result.routing_weights = torch.stack([weights.to(device) for weights in record.routing_weights])
    return result


def routing_shares(weights: Tensor) -> Tensor:
    """Return routing weights, ``(..., num_experts)``, as shares that sum to 1, whatever the expert scale."""
    return weights / weights.sum(dim=-1, keepdim=True)


def lm_loss(
    logits: Tensor | None,
    features: Tensor | None,
    head: nn.Linear | None,
    labels: Tensor,
    options: LossOptions,
) -> Tensor:
    """Return the cross-entropy in nats per labelled token, from logits or, chunk by chunk, from features and head.

    Args:
        logits: ``(batch, seq, vocabulary)``; read if features or head are None.
        features: Last hidden states, ``(batch, seq, hidden_size)``.
        head: Head that makes the logits of the features.
        labels: ``(batch, seq)``, not shifted, -100 where there is no loss.
        options: Smoothing and the number of tokens to divide by.
    """
    smoothing, num_items = options.smoothing, options.num_items_in_batch
    if head is None or features is None:
        assert logits is not None
        return causal_lm_loss(logits, labels, label_smoothing=smoothing, num_items=num_items)
    return linear_causal_lm_loss(
        features, head.weight, labels, bias=head.bias, label_smoothing=smoothing, num_items=num_items
    )


def sum_losses(
    result: DyLoRAOutput,
    token_mask: Tensor | None,
    top_k: int,
    weights: AuxLossWeights,
    options: LossOptions,
    training: bool,
) -> None:
    """Fill in the router's losses and ``loss`` of an output that has ``lm_loss``.

    Args:
        result: The output.
        token_mask: ``(batch, seq)``, nonzero for real tokens; None if all are real.
        top_k: Experts per token when routing is sparse.
        weights: Weights of the router's losses.
        options: Number of tokens to divide by, and counts of a larger batch.
        training: Whether ``loss`` includes the router's losses.
    """
    assert result.lm_loss is not None
    result.loss = result.lm_loss
    if result.router_logits is None:
        return
    logits, num_tokens = result.router_logits, options.num_tokens_in_batch
    result.balance_loss = load_balance_loss(logits, token_mask, top_k, load=options.expert_load, num_tokens=num_tokens)
    result.z_loss = router_z_loss(logits, token_mask, num_tokens=num_tokens)
    result.aux_loss = weights.balance_coefficient * result.balance_loss + weights.z_loss_coefficient * result.z_loss
    if training:
        result.loss = result.lm_loss + result.aux_loss.to(result.lm_loss.device)
