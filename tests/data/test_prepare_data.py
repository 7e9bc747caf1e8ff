"""From text to tokens: what carries a loss, what is cut, how datasets are mixed."""

from collections import Counter
from collections.abc import Iterator

import pytest

from dylo_moe.core.losses import IGNORE_INDEX
from dylo_moe.data import registry
from dylo_moe.data.prepare_data import encode_example, encode_prompt, prepare_data
from dylo_moe.data.registry import CompletionColumns, DatasetSpec
from dylo_moe.errors import DatasetError
from tiny_folder import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT, RESPONSE = "def add(a, b):\n", "    return a + b\n"


@pytest.fixture(autouse=True)
def datasets_of_unequal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(name: str, count: int) -> None:
        def source() -> Iterator[dict[str, str]]:
            for index in range(count):
                yield {"prompt": f"{name} {index}\n", "response": f"answer {index} of {name}\n"}

        monkeypatch.setitem(registry.REGISTRY, name, DatasetSpec(source, "none", CompletionColumns()))

    monkeypatch.setattr(registry, "unique_rows", list)
    add("large", 300)
    add("small", 60)


def test_the_loss_is_on_the_response_and_the_end_of_text_alone() -> None:
    encoded = encode_example(TOKENIZER, PROMPT, RESPONSE, 100)
    assert encoded is not None
    labelled = [label for label in encoded["labels"] if label != IGNORE_INDEX]
    assert TOKENIZER.decode(labelled[:-1]) == RESPONSE
    assert labelled[-1] == TOKENIZER.eos_token_id
    assert encoded["labels"][: len(encode_prompt(TOKENIZER, PROMPT))] == [IGNORE_INDEX] * len(
        encode_prompt(TOKENIZER, PROMPT)
    )
    assert TOKENIZER.decode(encoded["input_ids"], skip_special_tokens=True) == PROMPT + RESPONSE


def test_training_and_generation_see_the_same_prompt() -> None:
    encoded = encode_example(TOKENIZER, PROMPT, RESPONSE, 100)
    assert encoded is not None
    prompt = encode_prompt(TOKENIZER, PROMPT)
    assert encoded["input_ids"][: len(prompt)] == prompt


def test_a_tokenizer_with_bos_gets_it_once_and_in_front() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    encoded = encode_example(tokenizer, PROMPT, RESPONSE, 100)
    assert encoded is not None
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_prompt_stays_open_where_the_tokenizer_would_end_it() -> None:
    class Ending:
        eos_token_id = TOKENIZER.eos_token_id

        def __call__(self, text: str) -> object:
            encoded = TOKENIZER(text)
            encoded["input_ids"] = [*encoded["input_ids"], TOKENIZER.eos_token_id]
            return encoded

    assert encode_prompt(Ending(), PROMPT) == encode_prompt(TOKENIZER, PROMPT)  # type: ignore[arg-type]


def test_a_long_response_loses_its_end_and_a_long_prompt_its_row() -> None:
    whole = encode_example(TOKENIZER, PROMPT, RESPONSE, 100)
    assert whole is not None
    prompt_length = len(encode_prompt(TOKENIZER, PROMPT))
    cut = encode_example(TOKENIZER, PROMPT, RESPONSE, prompt_length + 2)
    assert cut is not None
    for key, values in cut.items():
        assert values == whole[key][: prompt_length + 2]
    assert encode_example(TOKENIZER, PROMPT, RESPONSE, prompt_length) is None


def test_rows_keep_their_domain_and_the_splits_apart() -> None:
    data = prepare_data(["large", "small"], TOKENIZER, max_length=64)
    assert len(data.train) + len(data.validation) == 360
    for split in (data.train, data.validation):
        for row in split:
            assert data.domains[row["domain"]] in TOKENIZER.decode(row["input_ids"])
            assert row["length"] == len(row["input_ids"]) == len(row["labels"]) == sum(row["attention_mask"])
    assert not {tuple(row) for row in data.train["input_ids"]} & {tuple(row) for row in data.validation["input_ids"]}
    assert data.notes == []


def test_interleaving_gives_equal_shares_and_repeats_the_small_one() -> None:
    data = prepare_data(["large", "small"], TOKENIZER, max_length=64, interleaved=True)
    counts = Counter(data.train["domain"])
    assert abs(counts[0] - counts[1]) <= 1
    distinct = {tuple(ids) for ids, domain in zip(data.train["input_ids"], data.train["domain"], strict=True) if domain}
    assert len(distinct) < counts[1]
    plain = prepare_data(["large", "small"], TOKENIZER, max_length=64)
    assert Counter(plain.train["domain"])[0] > 3 * Counter(plain.train["domain"])[1]


def test_subsets_are_random_seeded_percents_and_not_heads() -> None:
    def rows(seed: int) -> list[list[int]]:
        return list(
            prepare_data(["large"], TOKENIZER, max_length=64, training_percent=10, seed=seed).train["input_ids"]
        )

    whole = list(prepare_data(["large"], TOKENIZER, max_length=64).train["input_ids"])
    assert len(rows(1)) == round(len(whole) * 0.1)
    assert rows(1) == rows(1) != rows(2)
    assert rows(1) != whole[: len(rows(1))]


def test_what_was_cut_and_dropped_is_told() -> None:
    longest = max(prepare_data(["small"], TOKENIZER, max_length=64).train["length"])
    data = prepare_data(["small"], TOKENIZER, max_length=longest - 1)
    assert any("0 dropped" in note and "cut at" in note for note in data.notes)


def test_a_length_that_fits_nothing_is_refused() -> None:
    with pytest.raises(DatasetError, match="no prompt of small train fits --max_seq_length 2"):
        prepare_data(["small"], TOKENIZER, max_length=2)
