"""Tests that disguised benchmark tasks are found, and other rows kept."""

import json
import os
import random
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dylo_moe.data import decontamination as decontaminate_module
from dylo_moe.data.decontamination import (
    BY_GRAM,
    BY_ID,
    BY_PROMPT,
    CLEAN,
    NEAR,
    TaskIndex,
    build_index,
    decontaminate,
    ngrams_of,
    task_index,
    words_of,
)
from dylo_moe.data.examples import get_dataset, read_examples
from dylo_moe.data.registry import resolve
from dylo_moe.data.templates import PlainTemplate

GRAMS = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "build_decontamination_index.py"))

QUESTION = "Write a function that counts how often the rarest word of a long text occurs in it."
SOLUTION = "def rarest(text):\n    words = text.split()\n    return min(words.count(word) for word in words)\n"


def index_of(*problems: tuple[str, str, list[str]]) -> TaskIndex:
    arrays = build_index(problems)

    def mapping(name: str) -> dict[int, int]:
        return dict(zip(arrays[f"{name}_hashes"].tolist(), arrays[f"{name}_tasks"].tolist(), strict=True))

    return TaskIndex(tuple(arrays["tasks"]), {length: mapping(str(length)) for length in (13, 10)}, mapping("prompts"))


INDEX = index_of(("Mbpp/7", QUESTION, [QUESTION, SOLUTION]), ("Mbpp/8", "Find the odd one out.", []))


@pytest.mark.parametrize(
    ("prompt", "response", "task", "kind"),
    [
        ("Something else", "entirely", "Mbpp/7", BY_ID),
        ("Something else", "entirely", "Mbpp/70", CLEAN),
        (QUESTION, "pass", "", BY_GRAM),
        (QUESTION.upper().replace(" ", "\n\t"), "pass", "", BY_GRAM),
        ("Please", SOLUTION.replace("\n", "  # a comment of mine\n").replace("    ", "\t"), "", BY_GRAM),
        ("Go:\n  find the ODD one out!\n", "pass", "", BY_PROMPT),
        ("Do find the odd one out", "pass", "", CLEAN),
        (" ".join(QUESTION.split()[:11]), "pass", "", NEAR),
        (" ".join(QUESTION.split()[:9]), "pass", "", CLEAN),
    ],
)
def test_a_task_is_found_by_id_by_ngram_or_by_its_complete_question(
    prompt: str, response: str, task: str, kind: str
) -> None:
    found, of = INDEX.find(prompt, response, task)
    assert found == kind
    assert of == {CLEAN: "", BY_PROMPT: "Mbpp/8"}.get(kind, "Mbpp/7")


def test_words_exclude_comments_but_not_words_with_a_number_sign() -> None:
    assert words_of("x = 1  # note\n# all of it\nC# and F#\n") == ["x", "1", "c", "and", "f"]


def test_ngrams_of_mostly_numbers_are_ignored() -> None:
    numbers = [str(number) for number in range(30)]
    assert list(ngrams_of(numbers, 13)) == []
    assert len(list(ngrams_of([*"abcdefg", *numbers[:6]], 13))) == 1
    assert len(list(ngrams_of([*"abcdef", *numbers[:7]], 13))) == 0


def test_dropped_rows_are_counted_by_reason_and_named() -> None:
    rows = [
        {"prompt": "a", "response": "b", "task": "Mbpp/2"},
        {"prompt": "a", "response": "b", "task": "Mbpp/999999"},
        {"prompt": "a", "response": "b", "task": ""},
    ]
    kept, report = decontaminate(Dataset.from_list(rows), "mine")
    assert [row["task"] for row in kept] == ["Mbpp/999999", ""]
    assert (report.rows, report.dropped, report.by_id, report.by_gram, report.tasks) == (3, 1, 1, 0, ["Mbpp/2"])


def test_another_index_is_not_answered_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": QUESTION, "response": "pass"}, {"prompt": "Something else", "response": "entirely"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(resolve(f"mine={path}"), PlainTemplate()).rows
    for _ in range(2):  # computed, then read from the cache
        assert decontaminate(examples, "mine")[1].dropped == 0
    same_names = TaskIndex(task_index().tasks, INDEX.ngrams, INDEX.prompts)
    monkeypatch.setattr(decontaminate_module, "task_index", lambda: same_names)
    assert decontaminate(examples, "mine")[1].by_gram == 1


def test_the_packaged_index_has_all_tasks_and_no_text() -> None:
    index = task_index()
    assert sum(task.startswith("HumanEval/") for task in index.tasks) == 164
    assert sum(task.startswith("Mbpp/") for task in index.tasks) == 378
    for length, found in index.ngrams.items():
        assert len(set(found.values())) > 500, f"most tasks have an n-gram of {length} words"


REAL = os.environ.get("DYLO_MOE_DATA", "")
needs_data = pytest.mark.skipif(
    not REAL, reason="set DYLO_MOE_DATA to a folder with mbpp.jsonl, MbppPlus.jsonl.gz and HumanEvalPlus.jsonl.gz"
)


@needs_data
def test_the_packaged_index_is_what_the_script_makes() -> None:
    made = build_index(GRAMS["problems"](Path(REAL)))
    index = task_index()
    assert made["tasks"].tolist() == list(index.tasks)
    for length in (13, 10):
        pairs = zip(made[f"{length}_hashes"].tolist(), made[f"{length}_tasks"].tolist(), strict=True)
        assert dict(pairs) == index.ngrams[length]


@needs_data
def test_the_official_mbpp_loses_the_tasks_of_mbpp_plus() -> None:
    splits = get_dataset(f"mbpp={REAL}/mbpp.jsonl")
    assert sum(map(len, splits.values())) == 974
    rows = read_examples(resolve(f"mbpp={REAL}/mbpp.jsonl"), PlainTemplate()).rows
    kept, report = decontaminate(rows, "mbpp")
    assert report.by_id == 378
    plus = {row["task_id"] for row in GRAMS["rows"](Path(REAL) / "MbppPlus.jsonl.gz")}
    assert plus <= set(report.tasks)
    assert not plus & set(kept["task"])
    assert len(kept) == 974 - report.dropped


def disguised(code: str, rng: random.Random) -> str:
    """Return code with other white space and comments, as a copy on the web may have."""
    lines = [f"{line}  # {rng.choice(['note', 'see above', 'mine'])}" for line in code.splitlines() if line.strip()]
    return "\n\n".join(re.sub(r"^( +)", lambda match: match[0] * 2, line) for line in lines)


@needs_data
def test_every_planted_humaneval_problem_is_caught() -> None:
    rng = random.Random(0)
    index = task_index()
    missed = []
    for row in GRAMS["rows"](Path(REAL) / "HumanEvalPlus.jsonl.gz"):
        kind, _ = index.find("Complete this.", disguised(row["prompt"] + row["canonical_solution"], rng))
        missed += [row["task_id"]] * (kind != BY_GRAM)
    assert not missed


@needs_data
def test_most_of_code_alpaca_is_left() -> None:
    rows: Any = get_dataset(f"code_alpaca={REAL}/code_alpaca_2k.json")["train"]
    kept, report = decontaminate(rows.add_column("task", np.array([""] * len(rows))), "code_alpaca")
    assert len(kept) > 0.97 * len(rows)
    assert report.near < 0.05 * len(rows)
