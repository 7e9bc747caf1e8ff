"""Small random models of each family, mixtures on them, and batches to feed them.

Weights are drawn wider than by a real initialization, so that attention, experts and router all matter to the
logits; a test that compares two ways of computing something then compares something.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.utils.generic import ModelOutput

from dylo_moe import DyLoRA_MoE

VOCABULARY = 61
HIDDEN = 32
LAYERS = 3
PAD = 0

TIED = "ignore:Model has `tie_word_embeddings=True`:UserWarning"
"""Warning filter: PEFT 0.19 warns of an adapted embedding or head even if the two are not tied."""

ROUTINGS = ("final", "prefix:1", "context:1", "base_context:1", "per_layer")

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA_LIKE = {**_COMMON, "num_key_value_heads": 2}
"""Settings of the families that name them as Llama does."""

GPT_LIKE = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Settings of the families that name them as GPT-2 does."""

_GROUPED = {**LLAMA_LIKE, "head_dim": 8}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "gemma": GemmaConfig(**_GROUPED),
    "gemma3": Gemma3TextConfig(
        **_GROUPED,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": Qwen3Config(**_GROUPED),
    "gpt2": GPT2Config(**GPT_LIKE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "neox": GPTNeoXConfig(**_COMMON),
}
FAMILIES = tuple(CONFIGS)


def tiny(family: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a family, evaluating; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    return model.to(dtype).eval()


def stir(model: nn.Module, seed: int = 1) -> None:
    """Give every ``lora_B`` random values, as if the adapters had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def mixture(
    family: str = "llama",
    routing: str = "final",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    mature: bool = False,
    **options: object,
) -> DyLoRA_MoE:
    """Return a mixture on ``tiny(family)``, evaluating, whose experts and router have random values that matter.

    The router's gates are in the base model's dtype, so that a float64 mixture has float64 gradients throughout.
    """
    base = tiny(family, dtype=dtype, seed=seed)
    torch.manual_seed(seed + 1)
    model = DyLoRA_MoE(base, **{"num_experts": 3, "rank": 4, "routing": routing, **options})
    stir(model, seed + 2)
    with torch.no_grad():
        for gate in model.router.gates:
            gate.mul_(20)
    if dtype == torch.float64:
        model.router.double()
    if mature:
        model.set_maturity()
    return model.eval()


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Enable activation checkpointing by the name of the installed transformers (a new one since 5.23)."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})


def token_ids(batch: int, length: int, seed: int = 3) -> Tensor:
    """Return random tokens, none of them the padding or the first token."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str, pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Return token rows of unequal lengths as one batch: ``input_ids`` and ``attention_mask``."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def cache_of(output: ModelOutput) -> Cache:
    """Return the cache in the output of a forward, whatever this version of transformers calls it."""
    return next(value for value in output.values() if isinstance(value, Cache))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, as a share of the largest wanted value."""
    assert got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)} differ"
    return ((got - want).abs().max() / want.abs().max()).item()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients of a module's parameters, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
