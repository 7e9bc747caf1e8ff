"""Tests of reading a dataset once, caching it, and splitting it by content."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.data import examples, registry
from dylo_moe.data.examples import Example, get_dataset, read_examples
from dylo_moe.data.formats import CompletionColumns
from dylo_moe.data.registry import DatasetSpec, resolve
from dylo_moe.data.templates import PlainTemplate
from dylo_moe.errors import DatasetError


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {index}", "response": f"response {index}"} for index in range(count)]


def own(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mine={path}"


def test_splits_have_their_shares_and_share_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DatasetSpec("own files", "none", CompletionColumns(), (), shares=(0.7, 0.1, 0.2))
    monkeypatch.setitem(registry.REGISTRY, "mine", spec)
    splits = get_dataset(own(tmp_path, rows_of(3_000)))
    prompts = {name: set(split["prompt"]) for name, split in splits.items()}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 3_000
    for name, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(len(prompts[name]) / 3_000 - share) < 0.03
    assert splits["train"].column_names == list(Example._fields)
    assert set(splits["train"]["domain"]) == {"mine"}


def test_a_row_keeps_its_split_when_rows_are_added_or_reordered(tmp_path: Path) -> None:
    before = set(get_dataset(own(tmp_path, rows_of(200)))["validation"]["prompt"])
    after = set(get_dataset(own(tmp_path, rows_of(400)[::-1]))["validation"]["prompt"])
    assert before == {prompt for prompt in after if int(prompt.split()[1]) < 200}


def test_equal_prompts_are_in_the_same_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index % 50}", "response": f"response {index}"} for index in range(500)]
    splits = get_dataset(own(tmp_path, rows))
    assert not set(splits["train"]["prompt"]) & set(splits["validation"]["prompt"])


def test_the_split_does_not_depend_on_the_template(tmp_path: Path) -> None:
    class Loud(PlainTemplate):
        def render(self, messages: Any) -> str:
            return super().render(messages).upper()

    wanted = own(tmp_path, [{"instruction": f"i {n}", "output": f"o {n}"} for n in range(200)])
    plain, loud = get_dataset(wanted), get_dataset(wanted, template=Loud(identity="loud"))
    assert [prompt.upper() for prompt in plain["validation"]["prompt"]] == loud["validation"]["prompt"][:]
    assert plain["train"]["response"][:] == loud["train"]["response"][:]


def test_a_dataset_is_read_once_and_again_when_its_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = own(tmp_path, rows_of(50))
    first = read_examples(resolve(wanted), PlainTemplate()).rows
    read: list[Path] = []

    def counted(path: Path) -> Iterator[Any]:
        read.append(path)
        yield from original(path)

    original = examples.rows_of
    monkeypatch.setattr(examples, "rows_of", counted)
    assert read_examples(resolve(wanted), PlainTemplate()).rows[:] == first[:]
    assert not read
    own(tmp_path, rows_of(51))
    assert len(read_examples(resolve(wanted), PlainTemplate()).rows) == 51
    assert len(read) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p"}, r"rows.jsonl line 3: its columns are prompt, and no known format has them"),
        ({"prompt": 7, "response": "r"}, "rows.jsonl line 3: column 'prompt' must be text, got a int"),
        ({"prompt": "p", "response": " \n"}, "rows.jsonl line 3: the response is empty"),
        ({"prompt": "p", "response": "\ud800"}, r"rows.jsonl line 3: it holds half of a surrogate pair, \\ud800"),
    ],
)
def test_an_unusable_row_is_named_or_skipped_and_counted(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    rows = rows_of(100)
    wanted = own(tmp_path, [*rows[:2], row, *rows[2:]])
    with pytest.raises(DatasetError, match=said) as caught:
        get_dataset(wanted)
    assert "'mine'" in str(caught.value) and "`skip_bad_rows`" in str(caught.value)
    for _ in range(2):  # read, then found in the cache
        found = read_examples(resolve(wanted), PlainTemplate(), skip_bad_rows=True)
        assert (len(found.rows), found.skipped) == (100, 1)
        assert "line 3" in found.first_skipped


def test_a_public_dataset_may_have_rows_without_a_response(tmp_path: Path) -> None:
    rows = [{"instruction": f"i {n}", "input": "", "output": f"o {n}"} for n in range(100)]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**rows[0], "output": ""}, *rows]))
    found = read_examples(resolve(f"code_alpaca={path}"), PlainTemplate())
    assert (len(found.rows), found.skipped) == (100, 1)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="'mine' is empty: it has no row for its"):
        get_dataset(own(tmp_path, rows_of(1)))
    with pytest.raises(DatasetError, match="'mine' is empty"):
        get_dataset(own(tmp_path, []))


def test_the_local_domains_are_split_and_named() -> None:
    splits = get_dataset("python_stdlib")
    assert set(splits) == {"train", "validation"}
    assert 0.08 < len(splits["validation"]) / len(splits["train"]) < 0.14
