"""Timed workloads, as calls without arguments: a forward, a train step and greedy generation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.contenders import Contender

Call = Callable[[], Any]


def forward_call(contender: Contender, input_ids: Tensor) -> Call:
    """Return a forward as in evaluation: no gradients, no cache, the logits of all tokens."""
    contender.model.eval()

    def call() -> None:
        with torch.no_grad():
            contender.model(input_ids=input_ids, use_cache=False)

    return call


def train_call(contender: Contender, input_ids: Tensor) -> Call:
    """Return a train step with every token labelled; for the bare base it ends at the gradient of the embeddings."""
    model = contender.model.train()
    if not contender.trainable:
        return _base_backward(model, input_ids)
    # fused, the Trainer's default, matters with many small parameters
    optimizer = torch.optim.AdamW(contender.trainable, lr=1e-4, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=input_ids, labels=input_ids, **contender.train_options).loss.backward()
        optimizer.step()

    return call


def _base_backward(model: Any, input_ids: Tensor) -> Call:
    """Return the part that every method pays: forward, and backward through all frozen layers."""

    def call() -> None:
        embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=input_ids).loss.backward()

    return call


def generate_call(contender: Contender, prompt: Tensor, new_tokens: int) -> Call:
    """Return greedy generation of exactly ``new_tokens`` tokens, with the key-value cache if the model has one."""
    model = contender.model.eval()

    def call() -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    return call
