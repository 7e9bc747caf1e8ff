"""lm-evaluation-harness: a mixture, as an object and as a folder, scores as its logits do."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the package lm-eval is not installed; make test-interop installs it")
# its model classes need extras of transformers
harness = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)

from lm_eval.api.instance import Instance  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from dylo_moe import DyLoRA_MoE  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # warnings of the harness, not ours

QUESTIONS = [("def f", "(x):"), ("def", "(x): return x"), ("int x;", " /// Docs.")]


def slow_loglikelihoods(folder: Path) -> list[tuple[float, bool]]:
    model, tokenizer = DyLoRA_MoE.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for question, answer in QUESTIONS:
        start, ids = len(tokenizer(question).input_ids), tokenizer(question + answer, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        targets = ids[0, start:]
        answers.append((logs.gather(1, targets[:, None]).sum().item(), bool((logs.argmax(-1) == targets).all())))
    return answers


@pytest.mark.parametrize("kind", ["object", "folder"])
def test_loglikelihoods_are_those_of_the_logits(kind: str, folder: Path) -> None:
    given: Any = DyLoRA_MoE.from_pretrained(folder) if kind == "object" else str(folder)
    scorer = harness.HFLM(pretrained=given, batch_size=2, device="cpu")
    assert isinstance(scorer.model, DyLoRA_MoE)
    requests = [Instance("loglikelihood", {}, question, index) for index, question in enumerate(QUESTIONS)]
    got = scorer.loglikelihood(requests, disable_tqdm=True)
    for (score, greedy), (wanted, is_greedy) in zip(got, slow_loglikelihoods(folder), strict=True):
        assert score == pytest.approx(wanted, rel=1e-4)
        assert greedy is is_greedy


def test_it_generates_what_generate_does(folder: Path) -> None:
    model, tokenizer = DyLoRA_MoE.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scorer = harness.HFLM(pretrained=model, batch_size=1)
    request = Instance("generate_until", {}, ("def f", {"until": ["\n"], "max_gen_toks": 5}), 0)
    (got,) = scorer.generate_until([request], disable_tqdm=True)
    ids = tokenizer("def f", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert got == tokenizer.decode(new, skip_special_tokens=True).partition("\n")[0] != ""


def test_the_length_is_that_of_the_base(folder: Path) -> None:
    assert harness.HFLM(pretrained=str(folder), device="cpu").max_length == 512
