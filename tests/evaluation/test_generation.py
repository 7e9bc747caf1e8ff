"""Samples come from the given model, do not depend on the batch, and stop where they should."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dylo_moe.errors import ConfigError
from dylo_moe.evaluation import generation
from dylo_moe.evaluation.generation import (
    GenerationSettings,
    Model,
    Prompt,
    Sample,
    check_lengths,
    generate_samples,
    make_batches,
)
from tests.support.tiny_models import taught_mixture, tiny_base, tiny_mixture

TEXTS = ["def add(a, b):\n", "x", "def return_a_longer_name(of, more, words):\n    return", "int x;\n"]


def prompts_of(tokenizer: PreTrainedTokenizerFast, stops: tuple[str, ...] = ("no such text",)) -> list[Prompt]:
    return [Prompt(f"task/{n}", text, tokenizer(text).input_ids, stops) for n, text in enumerate(TEXTS)]


def sampled(
    model: Model, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], settings: GenerationSettings
) -> dict[tuple[str, int], Sample]:
    batches = make_batches(prompts, settings, set())
    return {
        (sample.task_id, sample.index): sample
        for batch in generate_samples(model, tokenizer, batches, settings)
        for sample in batch
    }


@pytest.mark.parametrize("routing", ["per_layer", "final", "prefix:1", "context:1"])
def test_greedy_samples_equal_the_models_own_generate_on_each_prompt_alone(routing: str) -> None:
    model, tokenizer = tiny_mixture(routing)
    model.double()
    found = sampled(model, tokenizer, prompts_of(tokenizer), GenerationSettings(max_new_tokens=12, batch_size=3))
    assert len(found) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text).input_ids])
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected = tokenizer.decode(whole[0], skip_special_tokens=True)
        assert text + found[f"task/{number}", 0].completion == expected


@pytest.mark.parametrize("routing", ["per_layer", "final"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_end_leave_the_batch_and_change_nothing(
    routing: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_mixture(routing)
    model.double()
    settings = GenerationSettings(max_new_tokens=40, temperature=temperature, n_samples=2 if temperature else 1)
    # single letters, which some rows generate early, some late, some never
    prompts = prompts_of(tokenizer, ("a", "e", "|"))
    monkeypatch.setattr(generation, "_STRETCH", 40)
    at_once = sampled(model, tokenizer, prompts, settings)
    sizes: list[int] = []
    generate = model.generate

    def noted(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", noted)
    monkeypatch.setattr(generation, "_STRETCH", 3)
    assert sampled(model, tokenizer, prompts, settings) == at_once
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    monkeypatch.setattr(generation, "_can_drop_rows", lambda cache: False)
    assert sampled(model, tokenizer, prompts, settings) == at_once


def test_a_mixture_its_expert_and_its_base_give_different_samples() -> None:
    model, tokenizer = tiny_mixture()
    settings = GenerationSettings(max_new_tokens=12)
    mixture = sampled(model, tokenizer, prompts_of(tokenizer), settings)
    with model.base_only():
        base = sampled(model, tokenizer, prompts_of(tokenizer), settings)
    plain = sampled(tiny_base()[0], tokenizer, prompts_of(tokenizer), settings)
    assert base == plain
    assert all(mixture[key].completion != base[key].completion for key in mixture)


def test_a_sample_does_not_depend_on_its_batch_or_on_what_came_before() -> None:
    model, tokenizer = tiny_mixture()
    model.double()
    prompts = prompts_of(tokenizer)
    settings = {"max_new_tokens": 12, "temperature": 0.8, "n_samples": 3}
    together = sampled(model, tokenizer, prompts, GenerationSettings(batch_size=12, **settings))
    torch.manual_seed(12345)
    alone = sampled(model, tokenizer, prompts, GenerationSettings(batch_size=1, **settings))
    assert together == alone
    assert len({together["task/0", index].completion for index in range(3)}) == 3
    other = sampled(model, tokenizer, prompts, GenerationSettings(batch_size=12, seed=7, **settings))
    assert all(other[key].completion != together[key].completion for key in together)


def test_each_task_has_its_own_random_numbers() -> None:
    model, tokenizer = tiny_mixture()
    first = prompts_of(tokenizer)[0]
    prompts = [first, first._replace(task_id="another")]
    found = sampled(model, tokenizer, prompts, GenerationSettings(max_new_tokens=12, temperature=0.8))
    assert found[first.task_id, 0].completion != found["another", 0].completion


def test_draws_have_the_models_distribution() -> None:
    base, tokenizer = tiny_base()
    prompt = prompts_of(tokenizer)[0]
    settings = GenerationSettings(max_new_tokens=1, temperature=0.7, n_samples=2000, batch_size=500)
    found = sampled(base, tokenizer, [prompt], settings)
    with torch.no_grad():
        logits = base(torch.tensor([list(prompt.ids)])).logits[0, -1]
    wanted = (logits / 0.7).softmax(dim=-1)
    best = int(wanted.argmax())
    share = sum(sample.completion == tokenizer.decode([best]) for sample in found.values()) / 2000
    assert 0.05 < wanted[best] < 0.95
    assert share == pytest.approx(float(wanted[best]), abs=0.05)


def test_generating_leaves_the_random_state_and_the_mode_alone() -> None:
    model, tokenizer = tiny_mixture()
    model.train()
    model.experts.base_model.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    sampled(model, tokenizer, prompts_of(tokenizer), GenerationSettings(max_new_tokens=4, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)


def test_a_sample_ends_before_its_stop_string_and_after_its_end_token() -> None:
    base, tokenizer = tiny_base()
    prompt = "def add(a, b):\n"
    model = taught_mixture(base, tokenizer, prompt, "    return a\ndef rest")
    ids = tokenizer(prompt).input_ids
    settings = GenerationSettings(max_new_tokens=60)
    whole = sampled(model, tokenizer, [Prompt("t", prompt, ids, ("no such text",))], settings)["t", 0]
    assert whole.completion == "    return a\ndef rest" and whole.ended
    assert whole.tokens == len(tokenizer(whole.completion).input_ids) + 1
    cut = sampled(model, tokenizer, [Prompt("t", prompt, ids, ("\ndef ",))], settings)["t", 0]
    assert cut.completion == "    return a" and cut.ended
    assert cut.tokens == len(tokenizer("    return a\ndef ").input_ids) < whole.tokens


def test_a_stop_string_counts_only_in_what_was_generated() -> None:
    base, tokenizer = tiny_base()
    model = taught_mixture(base, tokenizer, "x = 1\n", "def f(): pass")
    # the line break belongs to the prompt
    prompt = Prompt("t", "x = 1\n", tokenizer("x = 1\n").input_ids, ("\ndef ", "x = 1"))
    assert sampled(model, tokenizer, [prompt], GenerationSettings(max_new_tokens=40))["t", 0].completion == (
        "def f(): pass"
    )


def test_a_sample_that_does_not_end_is_marked_as_truncated() -> None:
    model, tokenizer = tiny_mixture()
    for sample in sampled(model, tokenizer, prompts_of(tokenizer), GenerationSettings(max_new_tokens=3)).values():
        assert (sample.tokens, sample.ended) == (3, False) or (sample.ended and sample.tokens <= 3)


def test_the_models_own_generation_defaults_are_ignored() -> None:
    base, tokenizer = tiny_base()
    settings = GenerationSettings(max_new_tokens=12)
    expected = sampled(base, tokenizer, prompts_of(tokenizer), settings)
    base.generation_config.update(do_sample=True, temperature=3.0, top_k=5, top_p=0.5, repetition_penalty=9.0)
    assert sampled(base, tokenizer, prompts_of(tokenizer), settings) == expected


def test_beams_search() -> None:
    base, tokenizer = tiny_base()
    model = taught_mixture(base, tokenizer, "int x;\n", "int y;\nint z;")
    prompt = Prompt("t", "int x;\n", tokenizer("int x;\n").input_ids, ("\nint z",))
    found = sampled(model, tokenizer, [prompt], GenerationSettings(max_new_tokens=30, num_beams=3))
    assert found["t", 0].completion == "int y;"


def test_batches_hold_similar_lengths_and_leave_out_what_is_done() -> None:
    tokenizer = tiny_base()[1]
    prompts = prompts_of(tokenizer)
    settings = GenerationSettings(n_samples=2, temperature=1.0, batch_size=3)
    batches = make_batches(prompts, settings, {("task/2", 0), ("task/1", 1)})
    lengths = [len(prompt.ids) for batch in batches for prompt, _ in batch]
    assert lengths == sorted(lengths, reverse=True) and [len(batch) for batch in batches] == [3, 3]
    keys = {(prompt.task_id, index) for batch in batches for prompt, index in batch}
    assert keys == {(f"task/{n}", index) for n in range(4) for index in range(2)} - {("task/2", 0), ("task/1", 1)}


def test_prompts_with_other_stop_strings_are_in_another_batch() -> None:
    tokenizer = tiny_base()[1]
    one, other, *_ = prompts_of(tokenizer)
    batches = make_batches([one, other._replace(stops=("end",))], GenerationSettings(), set())
    assert sorted(len(batch) for batch in batches) == [1, 1]


def test_a_prompt_that_is_too_long_is_refused() -> None:
    base, tokenizer = tiny_base()
    with pytest.raises(
        ConfigError, match=r"`max_new_tokens` must be at most \d+, got 2040: the model has 2048 positions"
    ):
        check_lengths(base, prompts_of(tokenizer), GenerationSettings(max_new_tokens=2040))
