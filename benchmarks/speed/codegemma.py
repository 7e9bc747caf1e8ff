"""Cost of routing at the shapes of CodeGemma-2B: one decoder layer, and the head with its 256,000 words.

The weights are random, and one layer represents eighteen: CodeGemma-2B itself is gated and too large for a short run.
"""

import gc
from dataclasses import replace
from typing import Any

import torch
from transformers import GemmaConfig, GemmaForCausalLM

from benchmarks.common.timing import Timed, ratios
from benchmarks.speed.contenders import REFERENCE, Lineup, random_tokens
from benchmarks.speed.memory import LOSSES
from benchmarks.speed.sections import BATCH, Run
from benchmarks.speed.workloads import Call, forward_call, train_call

HIDDEN = 2048
LAYER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
CONTENDERS = (REFERENCE, "ours_per_layer_4", "ours_per_layer_16")
LAYER_ROUNDS, HEAD_ROUNDS = 3, 2


def codegemma(run: Run) -> dict[str, Any]:
    """Measure one layer's forward and train step relative to PEFT LoRA, and the chunked loss relative to plain."""
    torch.manual_seed(0)
    # a small vocabulary, because the head is measured separately
    base = GemmaForCausalLM(GemmaConfig(**LAYER, num_hidden_layers=1, vocab_size=256)).requires_grad_(False)
    own = replace(run, lineup=Lineup(base))
    found: dict[str, Any] = {"reference": REFERENCE}
    tokens = random_tokens(base, BATCH, run.length)
    for what, make in (("forward", forward_call), ("train", train_call)):
        contenders = own.contenders(dict.fromkeys(CONTENDERS, LAYER_ROUNDS))
        seconds = own.timed({name: Timed(make(one, tokens), count) for name, (one, count) in contenders.items()})
        found[what] = {"ratios": ratios(seconds, REFERENCE), "seconds": seconds}
    del own, base, contenders
    gc.collect()  # hooks make reference cycles
    seconds = run.timed(_head(run))
    found["head"] = {"vocabulary": run.vocabulary, "ratios": ratios(seconds, "plain"), "seconds": seconds}
    return found


def _head(run: Run) -> dict[str, Timed]:
    hidden = torch.randn(BATCH, run.length, HIDDEN, requires_grad=True)
    head = torch.randn(run.vocabulary, HIDDEN).mul_(0.02)
    labels = torch.randint(run.vocabulary, (BATCH, run.length))

    def call(name: str, length: int) -> Call:
        def run_loss() -> None:
            hidden.grad = None
            LOSSES[name](hidden[:, :length], head, labels[:, :length]).backward()

        return run_loss

    # a few tokens suffice to warm up, and a full call would take as long as a round
    return {name: Timed(call(name, run.length), run.rounds(HEAD_ROUNDS), call(name, 8)) for name in LOSSES}
