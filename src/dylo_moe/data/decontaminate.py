"""Keeps benchmark tasks out of the training data: HumanEval(+) and MBPP(+), whose scores would mean nothing otherwise.

A row is a task if it says so by its task id, if 13 words in a row are a task's own (Brown et al. 2020, "Language
models are few-shot learners", appendix C), or if a line of its prompt is the whole of a task's question, which may be
shorter. Words are what is left without white space, punctuation, letter case and Python comments. Rows that share
only 10 words in a row are kept and counted.

The tasks' n-grams come with the package, as hashes: no network is needed, and no text of the benchmarks is carried.
``benchmarks/benchmark_grams.py`` makes them from the official files.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from dylo_moe.data.examples import column
from dylo_moe.data.parallel import map_rows

GRAM, NEAR_GRAM = 13, 10
"""Words in a row that a row must share with a task to be dropped, and to be reported."""

_LENGTHS = (GRAM, NEAR_GRAM)

SHORTEST_PROMPT = 5
"""Words of the shortest question that is compared as a whole."""

INDEX_FILE = "benchmark_grams.npz"
BY_ID, BY_GRAM, BY_PROMPT, NEAR, CLEAN = "by_id", "by_gram", "by_prompt", "near", ""

_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass
class Contamination:
    """What was found in one dataset.

    Attributes:
        dataset: Its name.
        rows: How many rows were looked at.
        by_id: Rows dropped since their task id is a benchmark's.
        by_gram: Other rows dropped for 13 words of a task in a row.
        by_prompt: Other rows dropped since a line of their prompt is a task's whole question.
        near: Rows kept that share 10 words in a row with a task.
        tasks: The tasks of the dropped rows.
    """

    dataset: str
    rows: int
    by_id: int = 0
    by_gram: int = 0
    by_prompt: int = 0
    near: int = 0
    tasks: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """Rows dropped for any reason."""
        return self.by_id + self.by_gram + self.by_prompt


@dataclass(frozen=True)
class TaskIndex:
    """The tasks of the benchmarks, as hashes.

    Attributes:
        tasks: Their ids, as EvalPlus writes them: ``HumanEval/0``, ``Mbpp/2``.
        grams: For ``GRAM`` and ``NEAR_GRAM``, from the hash of so many words to the task that has them.
        prompts: From the hash of a whole question to its task.
    """

    tasks: tuple[str, ...]
    grams: dict[int, dict[int, int]]
    prompts: dict[int, int]

    def find(self, prompt: str, response: str, task: str = "") -> tuple[str, str]:
        """How a row touches the benchmarks, and which task it is; both empty where it does not."""
        if self.number(task) >= 0:
            return BY_ID, task
        words = words_of(f"{prompt}\n{response}")
        if found := self._first(self.grams[GRAM], grams_of(words, GRAM)):
            return BY_GRAM, found
        if found := self._first(self.prompts, lines_of(prompt)):
            return BY_PROMPT, found
        if found := self._first(self.grams[NEAR_GRAM], grams_of(words, NEAR_GRAM)):
            return NEAR, found
        return CLEAN, ""

    def _first(self, known: Mapping[int, int], hashes: Iterable[int]) -> str:
        return next((self.tasks[known[one]] for one in hashes if one in known), "")

    def number(self, task: str) -> int:
        """The place of a task in ``tasks``, or -1."""
        return self._numbers.get(task, -1)

    @cached_property
    def identity(self) -> str:
        """Tells this index from others, by everything that is in it."""
        return str(Hasher.hash([self.tasks, self.grams, self.prompts]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {task: number for number, task in enumerate(self.tasks)}


def words_of(text: str) -> list[str]:
    """The words of a text, without Python comments, white space, punctuation and letter case."""
    return _WORD.findall(_COMMENT.sub("", text).lower())


def grams_of(words: Sequence[str], length: int) -> Iterator[int]:
    """Hashes of all runs of ``length`` words of which at least half are no numbers."""
    numbers = [word[0].isdigit() for word in words]
    among = sum(numbers[: length - 1])
    for end in range(length, len(words) + 1):
        among += numbers[end - 1]
        # lists of small numbers are the same in many a program
        if 2 * among <= length:
            yield hash_of(words[end - length : end])
        among -= numbers[end - length]


def lines_of(prompt: str) -> Iterator[int]:
    """Hashes of the lines of a prompt that are long enough to be a question."""
    for line in prompt.splitlines():
        words = words_of(line)
        if len(words) >= SHORTEST_PROMPT:
            yield hash_of(words)


def hash_of(words: Iterable[str]) -> int:
    """64 bits of BLAKE2b over words."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def build_index(problems: Iterable[tuple[str, str, Sequence[str]]]) -> dict[str, "np.ndarray[Any, Any]"]:
    """The arrays of an index file.

    Args:
        problems: Id, question and texts (question and solutions) of each task.
    """
    ids: list[str] = []
    grams: dict[int, dict[int, int]] = {length: {} for length in _LENGTHS}
    prompts: dict[int, int] = {}
    for index, (task, question, texts) in enumerate(problems):
        ids.append(task)
        for length in _LENGTHS:
            for text in texts:
                for gram in grams_of(words_of(text), length):
                    grams[length].setdefault(gram, index)
        for line in lines_of(question):
            prompts.setdefault(line, index)
    arrays: dict[str, np.ndarray[Any, Any]] = {"tasks": np.array(ids)}
    for name, found in {**{str(length): grams[length] for length in _LENGTHS}, "prompts": prompts}.items():
        arrays[f"{name}_hashes"] = np.array(list(found), dtype=np.uint64)
        arrays[f"{name}_tasks"] = np.array(list(found.values()), dtype=np.uint16)
    return arrays


@cache
def task_index() -> TaskIndex:
    """The index that the package carries."""
    with files("dylo_moe.data").joinpath(INDEX_FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:

        def mapping(name: str) -> dict[int, int]:
            pairs = zip(arrays[f"{name}_hashes"].tolist(), arrays[f"{name}_tasks"].tolist(), strict=True)
            return dict(pairs)

        grams = {length: mapping(str(length)) for length in _LENGTHS}
        return TaskIndex(tuple(arrays["tasks"].tolist()), grams, mapping("prompts"))


def decontaminate(rows: Dataset, name: str, *, workers: int = 1) -> tuple[Dataset, Contamination]:
    """Drops the rows that are tasks of a benchmark.

    Args:
        rows: With the columns ``prompt``, ``response`` and ``task``.
        name: The dataset's.
        workers: Processes to look with.

    Returns:
        The other rows, and what was found.
    """
    key = Hasher.hash([rows._fingerprint, task_index().identity])
    found = map_rows(
        rows,
        _find,
        key,
        features=Features({"kind": Value("int8"), "task": Value("int16")}),
        workers=workers,
        title=f"Comparing {name} with benchmarks",
    )
    kinds, tasks = column(found, "kind"), column(found, "task")
    counts = {kind: int((kinds == number).sum()) for number, kind in enumerate(_KINDS) if kind}
    dropped = np.isin(kinds, [_KINDS.index(kind) for kind in (BY_ID, BY_GRAM, BY_PROMPT)])
    names = [task_index().tasks[task] for task in np.unique(tasks[dropped])]
    kept = rows.select(np.flatnonzero(~dropped)) if dropped.any() else rows
    return kept, Contamination(name, len(rows), **counts, tasks=names)


_KINDS = (CLEAN, BY_ID, BY_GRAM, BY_PROMPT, NEAR)


def _find(batch: dict[str, list[str]]) -> dict[str, list[int]]:
    index = task_index()
    found = [index.find(*row) for row in zip(batch["prompt"], batch["response"], batch["task"], strict=True)]
    return {"kind": [_KINDS.index(kind) for kind, _ in found], "task": [index.number(task) for _, task in found]}
