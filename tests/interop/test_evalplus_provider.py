"""Generation by EvalPlus, with its provider for transformers, on a mixture's folder."""

from pathlib import Path

import pytest

# evalplus is installed without all of its dependencies: this package needs only its data
provider = pytest.importorskip(
    "evalplus.provider.hf", reason="the packages that evalplus generates with are not installed", exc_type=ImportError
)

from transformers import AutoTokenizer  # noqa: E402

from dylo_moe import DyLoRA_MoE  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # warnings of evalplus, not ours


@pytest.mark.parametrize("routing", ["prefix:1"])
def test_codegen_generates_what_generate_does(routing: str, folder: Path) -> None:
    decoder = provider.HuggingFaceDecoder(
        str(folder),
        dataset="humaneval",
        trust_remote_code=True,
        dtype="float32",
        temperature=0.0,
        max_new_tokens=8,
        force_base_prompt=True,
    )
    assert isinstance(decoder.model, DyLoRA_MoE)
    (got,) = decoder.codegen("def f(x):\n", do_sample=False, num_samples=1)
    model, tokenizer = DyLoRA_MoE.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f(x):\n", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    for stop in decoder.eos:
        text = text.partition(stop)[0]
    assert got == text != ""


def test_it_stops_at_the_sequences_that_it_sets_on_the_model(folder: Path) -> None:
    """Check that the base model uses a method that EvalPlus sets on the mixture."""
    decoder = provider.HuggingFaceDecoder(
        str(folder),
        dataset="humaneval",
        trust_remote_code=True,
        dtype="float32",
        temperature=0.0,
        max_new_tokens=12,
        force_base_prompt=True,
    )
    (whole,) = decoder.codegen("def f(x):\n", do_sample=False, num_samples=1)
    forwards: list[int] = []
    hook = decoder.model.experts.base_model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    decoder.eos = [*decoder.eos, whole[:2]]
    assert decoder.codegen("def f(x):\n", do_sample=False, num_samples=1) == [""]
    hook.remove()
    assert len(forwards) < 12
