"""Every entry of the registry, on rows with each set's real columns."""

from collections.abc import Iterator

import datasets
import pytest

from dylo_moe.data import registry
from dylo_moe.data.registry import AVAILABLE_DATASETS, REGISTRY, DatasetSpec, get_dataset, spec_of
from dylo_moe.errors import DatasetError

ALPACA = {"instruction": "Add 1 and 2.", "input": "1, 2", "output": "print(1 + 2)"}
ROWS = {
    "code_alpaca": ALPACA,
    "python_codes_25k": {**ALPACA, "text": "Add 1 and 2. print(1 + 2)"},
    "python_code_instructions_18k": {**ALPACA, "prompt": "Below is an instruction"},
    "evol_instruct": {"instruction": "Add 1 and 2.", "output": "print(1 + 2)"},
    "code_feedback": {"query": "Add 1 and 2.", "answer": "print(1 + 2)", "resource": "evol", "lang": "python"},
    "python_code_23k_sharegpt": {
        "id": "7",
        "conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "print(1 + 2)"}],
    },
    "mbpp": {
        "task_id": 11,
        "text": "Add 1 and 2.",
        "code": "print(1 + 2)",
        "test_list": ["assert f() == 3", "assert f(1) == 3"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    "python_stdlib": {"prompt": "Add 1 and 2.", "response": "print(1 + 2)"},
    "cpp_headers": {"prompt": "Add 1 and 2.", "response": "print(1 + 2)"},
}


def test_the_seven_hub_datasets_and_the_two_local_ones_are_there() -> None:
    assert set(AVAILABLE_DATASETS) == set(ROWS)
    assert sum(isinstance(spec.source, str) for spec in REGISTRY.values()) == 7


@pytest.mark.parametrize("name", AVAILABLE_DATASETS)
def test_a_row_becomes_a_prompt_with_the_task_and_a_response_with_the_answer(name: str) -> None:
    prompt, response = spec_of(name).to_pair(ROWS[name])
    assert "Add 1 and 2." in prompt
    assert response == "print(1 + 2)"
    assert response not in prompt
    assert spec_of(name).licence


def test_the_template_shows_input_only_where_there_is_some() -> None:
    to_pair = spec_of("code_alpaca").to_pair
    assert "### Input:\n1, 2\n" in to_pair(ALPACA)[0]
    assert "### Input" not in to_pair({**ALPACA, "input": ""})[0]
    assert to_pair(ALPACA)[0].endswith("### Response:\n")


def test_mbpp_trains_on_its_code_and_shows_the_tests() -> None:
    prompt, response = spec_of("mbpp").to_pair(ROWS["mbpp"])
    assert "assert f() == 3\nassert f(1) == 3" in prompt
    assert response == ROWS["mbpp"]["code"]


def test_a_conversation_of_many_turns_ends_with_its_last_answer() -> None:
    turns = [("human", "first"), ("gpt", "one"), ("human", "second"), ("gpt", "two")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    prompt, response = spec_of("python_code_23k_sharegpt").to_pair(row)
    assert response == "two"
    assert prompt.index("first") < prompt.index("one") < prompt.index("second")


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(DatasetError, match="no dataset 'code_alpca'; did you mean 'code_alpaca'"):
        get_dataset("code_alpca")


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"prompt {index}", "response": f"response {index}"} for index in range(count)]


def with_rows(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]], **changes: object) -> None:
    def source() -> Iterator[dict[str, str]]:
        yield from rows

    monkeypatch.setattr(registry, "unique_rows", list)
    fields = {"licence": "none", "to_pair": REGISTRY["python_stdlib"].to_pair, **changes}
    monkeypatch.setitem(REGISTRY, "mine", DatasetSpec(source, **fields))  # type: ignore[arg-type]


def test_splits_have_their_shares_and_share_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, rows_of(3_000), shares=(0.7, 0.1, 0.2))
    splits = get_dataset("mine")
    prompts = {name: set(split["prompt"]) for name, split in splits.items()}
    assert sum(map(len, prompts.values())) == 3_000
    assert len(set.union(*prompts.values())) == 3_000
    for name, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(len(prompts[name]) / 3_000 - share) < 0.03
    assert set(splits["train"]["domain"]) == {"mine"}


def test_a_row_stays_in_its_split_when_others_come_or_move(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, rows_of(200))
    before = set(get_dataset("mine")["validation"]["prompt"])
    with_rows(monkeypatch, rows_of(400)[::-1])
    after = set(get_dataset("mine")["validation"]["prompt"])
    assert before == {prompt for prompt in after if int(prompt.split()[1]) < 200}


def test_equal_prompts_never_end_up_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{index % 50}", "response": f"response {index}"} for index in range(500)]
    with_rows(monkeypatch, rows)
    splits = get_dataset("mine")
    assert not set(splits["train"]["prompt"]) & set(splits["validation"]["prompt"])


def test_the_known_shares() -> None:
    assert spec_of("code_alpaca").shares == (0.9, 0.1, 0.0)
    assert spec_of("mbpp").shares == (0.7, 0.1, 0.2)


def test_an_empty_dataset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, [{"prompt": "p", "response": "  "}])
    with pytest.raises(DatasetError, match="'mine' is empty"):
        get_dataset("mine")


def test_a_row_without_the_columns_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, [*rows_of(2), {"question": "q"}])
    with pytest.raises(DatasetError, match=r"row 2 of the dataset 'mine' .*'prompt'.*it has: question"):
        get_dataset("mine")


def test_without_the_hub_the_message_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match=r"could not be fetched from the Hub.*python_stdlib,cpp_headers"):
        get_dataset("code_alpaca")


def test_the_local_domains_are_split_and_named() -> None:
    splits = get_dataset("python_stdlib")
    assert set(splits) == {"train", "validation"}
    assert splits["train"].column_names == ["prompt", "response", "domain"]
    assert 0.08 < len(splits["validation"]) / len(splits["train"]) < 0.14
