"""The loss without logits: when it can be used, and that it equals the loss with logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedModel

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.base.lm_head import linear_lm_head
from tests.support.families import (
    CONFIGS,
    FAMILIES,
    ROUTINGS,
    TIED,
    gradients,
    mixture,
    padded,
    relative_error,
    stir,
    tiny,
    token_ids,
)

ROWS = [token_ids(1, length, seed=length)[0] for length in (9, 4, 7)]
_SIZES = {
    key: value
    for key, value in CONFIGS["llama"].to_dict().items()
    if key
    in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "initializer_range",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
}
CAPPED = {
    "gemma2": Gemma2Config(**_SIZES, final_logit_softcapping=30.0),
    "cohere": CohereConfig(**_SIZES, logit_scale=0.0625),
    "granite": GraniteConfig(**_SIZES, logits_scaling=8.0),
}


def model_of(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    if family in FAMILIES:
        return tiny(family, dtype=dtype)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CAPPED[family])).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, *CAPPED])
def test_a_head_is_linear_if_nothing_follows_it(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    wanted = None if family in CAPPED else model.get_output_embeddings()
    assert linear_lm_head(model) is wanted
    assert not model._forward_hooks and not model.base_model._forward_hooks


@pytest.mark.filterwarnings(TIED)
def test_an_adapted_head_is_not_linear() -> None:
    base = tiny()
    get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"]))
    assert linear_lm_head(base) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gemma2", "cohere"])
def test_without_logits_the_losses_and_their_gradients_are_the_same(
    family: str, routing: str, smoothing: float
) -> None:
    ids, mask = padded(ROWS, "right")
    labels = ids.clone()
    labels[:, :3] = -100
    outcomes = []
    for return_logits in (True, False):
        torch.manual_seed(1)
        model = DyLoRA_MoE(model_of(family), 3, rank=4, routing=routing, z_loss_coefficient=0.1)
        model.router.double()
        stir(model)
        output = model.train()(
            ids, mask, labels, label_smoothing=smoothing, num_items_in_batch=17, return_logits=return_logits
        )
        output.loss.backward()
        assert (output.logits is not None) == return_logits
        outcomes.append((output, gradients(model)))
    (whole, wanted), (chunked, got) = outcomes
    for name in ("loss", "lm_loss", "aux_loss", "balance_loss", "z_loss"):
        assert chunked[name].item() == pytest.approx(whole[name].item(), rel=1e-12), name
    assert torch.equal(chunked.router_logits, whole.router_logits)
    assert got.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        assert relative_error(got[name], gradient) < 1e-9, name


def test_the_base_model_makes_no_logits_without_return_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    made: list[Tensor] = []
    model.experts.base_model.register_forward_hook(lambda *args: made.append(args[-1].logits))
    model(ROWS[0][None], labels=ROWS[0][None], return_logits=False)
    assert [logits.numel() for logits in made] == [0]


def test_without_labels_there_are_always_logits() -> None:
    assert mixture()(ROWS[0][None], return_logits=False).logits.shape[:2] == (1, len(ROWS[0]))
