"""Tests of the data pipeline: tokenization, labels, truncation and caching."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dylo_moe.data import map_rows
from dylo_moe.data import pipeline as module
from dylo_moe.data.packing import TokenRows
from dylo_moe.data.pipeline import PreparedData, prepare_data
from dylo_moe.data.templates import template_of
from dylo_moe.data.tokenization import encode_examples, encode_prompt
from dylo_moe.errors import DatasetError
from tests.data.test_templates import CHATML
from tests.support.tiny_folder import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT, RESPONSE = "def add(a, b):\n", "    return a + b\n"


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def own(tmp_path: Path, name: str, count: int) -> str:
    path = tmp_path / f"{name}.jsonl"
    rows = [{"prompt": f"{name} {n}\n", "response": f"answer {n} of {name}\n"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={path}"


def prepared(tmp_path: Path, *names: str, **options: Any) -> PreparedData:
    sizes = {"large": 300, "small": 60}
    return prepare_data(
        [own(tmp_path, name, sizes[name]) for name in names], TOKENIZER, **{"max_length": 64, **options}
    )


def encode(prompt: str, response: str, length: int, **options: Any) -> dict[str, Any]:
    return {
        key: values[0] for key, values in encode_examples(TOKENIZER, [prompt], [response], length, **options).items()
    }


def ids_of(rows: TokenRows) -> list[tuple[int, ...]]:
    return [tuple(ids) for index in range(len(rows)) for ids in rows[index]["input_ids"]]


def test_an_example_is_prompt_response_and_the_end_of_text() -> None:
    row = encode(PROMPT, RESPONSE, 100)
    prompt = encode_prompt(TOKENIZER, PROMPT)
    assert row["input_ids"][: row["prompt_length"]] == prompt
    assert TOKENIZER.decode(row["input_ids"][len(prompt) : -1]) == RESPONSE
    assert row["input_ids"][-1] == TOKENIZER.eos_token_id
    assert row["length"] == len(row["input_ids"]) and not row["cut"]


def test_the_end_of_text_is_not_repeated_after_a_template_that_writes_it() -> None:
    assert encode(PROMPT, RESPONSE + "<eos>", 100) == encode(PROMPT, RESPONSE, 100)


def test_a_tokenizer_with_bos_gets_it_once_and_in_front() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    for prompt in (PROMPT, f"<bos>{PROMPT}"):  # as plain text, and as a chat template writes it
        ids = encode_examples(tokenizer, [prompt], [RESPONSE], 100)["input_ids"][0]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_does_not_end_with_the_eos_of_the_tokenizer() -> None:
    class Ending:
        eos_token, eos_token_id, bos_token = TOKENIZER.eos_token, TOKENIZER.eos_token_id, None

        def __call__(self, texts: list[str]) -> object:
            encoded = TOKENIZER(texts)
            encoded["input_ids"] = [[*ids, TOKENIZER.eos_token_id] for ids in encoded["input_ids"]]
            return encoded

    assert encode_prompt(Ending(), PROMPT) == encode_prompt(TOKENIZER, PROMPT)  # type: ignore[arg-type]


def test_a_long_response_is_cut_or_dropped_and_a_long_prompt_dropped() -> None:
    whole, prompt_length = encode(PROMPT, RESPONSE, 100), len(encode_prompt(TOKENIZER, PROMPT))
    cut = encode(PROMPT, RESPONSE, prompt_length + 2)
    assert cut["input_ids"] == whole["input_ids"][: prompt_length + 2] and cut["cut"]
    assert encode(PROMPT, RESPONSE, prompt_length + 2, overlong="drop")["length"] == 0
    assert encode(PROMPT, RESPONSE, whole["length"], overlong="drop") == whole
    assert encode(PROMPT, RESPONSE, prompt_length)["length"] == 0


def test_rows_keep_their_domain_and_the_splits_apart(tmp_path: Path) -> None:
    data = prepared(tmp_path, "large", "small")
    assert len(data.train) + len(data.validation) == 360
    assert data.domains == ["large", "small"]
    for split in (data.train, data.validation):
        for index in range(len(split)):
            row = split[index]
            (ids,) = row["input_ids"]
            assert data.domains[row["domain"]] in TOKENIZER.decode(ids)
            assert split.lengths[index] == len(ids) and split.domains[index] == row["domain"]
    assert not set(ids_of(data.train)) & set(ids_of(data.validation))
    assert data.notes == []


def test_the_summaries_count_rows_and_tokens(tmp_path: Path) -> None:
    data = prepared(tmp_path, "large", "small")
    large, small = data.summaries
    assert (large.train + large.validation, small.train + small.validation) == (300, 60)
    assert large.train_tokens + small.train_tokens == data.train.lengths.sum()
    prompts = sum(sum(data.train[index]["prompt_lengths"]) for index in range(len(data.train)))
    assert large.labelled_tokens + small.labelled_tokens == data.train.lengths.sum() - prompts
    assert json.loads(json.dumps(data.record()))["datasets"][1]["name"] == "small"


def test_packing_loses_nothing_and_keeps_domains_apart(tmp_path: Path) -> None:
    plain, packed = prepared(tmp_path, "large", "small"), prepared(tmp_path, "large", "small", packing=True)
    assert sorted(ids_of(packed.train)) == sorted(ids_of(plain.train))
    assert packed.train.lengths.max() <= 64
    assert packed.packing_efficiency is not None
    assert 0.9 < packed.packing_efficiency <= 1
    assert packed.packing_efficiency == pytest.approx(plain.train.lengths.sum() / (len(packed.train) * 64))
    for index in range(len(packed.train)):
        row = packed.train[index]
        assert all(packed.domains[row["domain"]] in TOKENIZER.decode(ids) for ids in row["input_ids"])
    assert ids_of(packed.validation) == ids_of(plain.validation)


def test_interleaving_gives_equal_shares(tmp_path: Path) -> None:
    data = prepared(tmp_path, "large", "small")
    drawn = data.train.domains[list(data.sampler(temperature=np.inf))]
    assert (drawn == 0).sum() == (drawn == 1).sum()
    assert (data.train.domains[list(data.sampler())] == 1).sum() == data.summaries[1].train


def test_subsets_are_random_seeded_percents_and_not_heads(tmp_path: Path) -> None:
    def rows(seed: int) -> list[tuple[int, ...]]:
        return ids_of(prepared(tmp_path, "large", training_percent=10, seed=seed).train)

    whole = ids_of(prepared(tmp_path, "large").train)
    assert len(rows(1)) == round(len(whole) * 0.1)
    assert rows(1) == rows(1) != rows(2)
    assert rows(1) != whole[: len(rows(1))]


def test_cut_and_dropped_rows_are_noted_and_counted(tmp_path: Path) -> None:
    longest = int(prepared(tmp_path, "small").train.lengths.max())
    data = prepared(tmp_path, "small", max_length=longest - 1)
    assert any("0 dropped" in note and "cut at" in note for note in data.notes)
    assert data.summaries[0].cut > 0 == data.summaries[0].too_long
    dropping = prepared(tmp_path, "small", max_length=longest - 1, overlong="drop")
    assert (dropping.summaries[0].too_long, dropping.summaries[0].cut) == (data.summaries[0].cut, 0)


def test_a_length_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no row of small train fits `max_seq_length` 2; raise it"):
        prepared(tmp_path, "small", max_length=2)


def test_a_chat_template_is_applied_and_its_end_is_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"query": f"q {n}", "answer": f"a {n}"}) + "\n" for n in range(60)))
    data = prepare_data([f"talk={path}"], tokenizer, max_length=64, template=template_of("auto", tokenizer))
    row = data.train[0]
    text, number = tokenizer.decode(row["input_ids"][0]), data.train[0]["prompt_lengths"][0]
    assert text.startswith("<|user|>q ") and "<eos>\n<|assistant|>a " in text and text.endswith("<eos>")
    assert text.count("<eos>") == 2
    assert tokenizer.decode(row["input_ids"][0][number:]).startswith("a ")
    assert data.record()["template"] == "chat"


def test_tokens_are_cached_and_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_rows, "ROWS_PER_CHUNK", 50)
    seen: list[int] = []

    def encode_some(*arguments: Any) -> Any:
        seen.append(len(arguments[-1]["prompt"]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    original = module.encode_batch
    monkeypatch.setattr(module, "encode_batch", encode_some)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, "large")
    finished = sum(seen[:3])
    seen += [0] * 9
    data = prepared(tmp_path, "large")
    assert sum(seen[13:]) == len(data.train) + len(data.validation) - finished
    again = len(seen)
    assert ids_of(prepared(tmp_path, "large").train) == ids_of(data.train)
    assert len(seen) == again, "everything is cached"
    prepared(tmp_path, "large", max_length=63)
    assert len(seen) > again, "other settings are other tokens"


def test_several_processes_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = prepared(tmp_path, "large")
    monkeypatch.setattr(map_rows, "ROWS_PER_WORKER", 10)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    assert ids_of(prepared(tmp_path, "large", workers=2).train) == ids_of(alone.train)
