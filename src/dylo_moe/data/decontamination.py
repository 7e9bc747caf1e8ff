"""Removal of benchmark tasks (HumanEval(+) and MBPP(+)) from training data, which would make their scores meaningless.

A row is a benchmark task if its task id says so, if it shares a 13-gram with a task (Brown et al. 2020, "Language
models are few-shot learners", appendix C), or if a line of its prompt is a task's complete question, which may be
shorter than 13 words. Comments of Python, white space, punctuation and letter case are ignored. Rows that share only a
10-gram are kept and counted.

The n-grams of the tasks come with the package as hashes, so no network is needed and no benchmark text is
redistributed. ``tools/build_decontamination_index.py`` makes them from the official files.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from dylo_moe.data.examples import column
from dylo_moe.data.map_rows import map_rows

MATCH_LENGTH, NEAR_LENGTH = 13, 10
"""Lengths in words of the n-grams for which a row is dropped, and for which it is reported."""

_LENGTHS = (MATCH_LENGTH, NEAR_LENGTH)

_SHORTEST_QUESTION = 5
"""Fewest words of a question that is compared as a whole."""

INDEX_FILE = "benchmark_grams.npz"
BY_ID, BY_GRAM, BY_PROMPT, NEAR, CLEAN = "by_id", "by_gram", "by_prompt", "near", ""

_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass
class Contamination:
    """Benchmark tasks found in one dataset.

    Attributes:
        dataset: Name of the dataset.
        rows: Number of rows that were compared.
        by_id: Number of rows dropped for their task id.
        by_gram: Number of other rows dropped for a 13-gram of a task.
        by_prompt: Number of other rows dropped for a line of their prompt that is a task's complete question.
        near: Number of rows kept although they share a 10-gram with a task.
        tasks: Ids of the tasks in the dropped rows.
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
        """Number of rows dropped for any reason."""
        return self.by_id + self.by_gram + self.by_prompt


@dataclass(frozen=True)
class TaskIndex:
    """The benchmark tasks as hashes.

    Attributes:
        tasks: Ids of the tasks, as EvalPlus writes them: ``HumanEval/0``, ``Mbpp/2``.
        ngrams: For ``MATCH_LENGTH`` and ``NEAR_LENGTH``, from the hash of an n-gram to the index of its task.
        prompts: From the hash of a complete question to the index of its task.
    """

    tasks: tuple[str, ...]
    ngrams: dict[int, dict[int, int]]
    prompts: dict[int, int]

    def find(self, prompt: str, response: str, task: str = "") -> tuple[str, str]:
        """Return how a row matches a task (such as ``BY_GRAM``) and the task's id, or two empty strings."""
        if self.number(task) >= 0:
            return BY_ID, task
        words = words_of(f"{prompt}\n{response}")
        if found := self._first(self.ngrams[MATCH_LENGTH], ngrams_of(words, MATCH_LENGTH)):
            return BY_GRAM, found
        if found := self._first(self.prompts, _lines_of(prompt)):
            return BY_PROMPT, found
        if found := self._first(self.ngrams[NEAR_LENGTH], ngrams_of(words, NEAR_LENGTH)):
            return NEAR, found
        return CLEAN, ""

    def _first(self, known: Mapping[int, int], hashes: Iterable[int]) -> str:
        return next((self.tasks[known[one]] for one in hashes if one in known), "")

    def number(self, task: str) -> int:
        """Return the index of a task in ``tasks``, or -1 for an unknown id."""
        return self._numbers.get(task, -1)

    @cached_property
    def identity(self) -> str:
        """Hash of the content of the index."""
        return str(Hasher.hash([self.tasks, self.ngrams, self.prompts]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {task: number for number, task in enumerate(self.tasks)}


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without Python comments, white space and punctuation."""
    return _WORD.findall(_COMMENT.sub("", text).lower())


def ngrams_of(words: Sequence[str], length: int) -> Iterator[int]:
    """Yield the hash of every n-gram of ``length`` words in which at most half of the words are numbers."""
    is_number = [word[0].isdigit() for word in words]
    numbers = sum(is_number[: length - 1])
    for end in range(length, len(words) + 1):
        numbers += is_number[end - 1]
        # lists of small numbers occur in many unrelated programs
        if 2 * numbers <= length:
            yield _hash_of(words[end - length : end])
        numbers -= is_number[end - length]


def _lines_of(prompt: str) -> Iterator[int]:
    """Yield the hash of every line of a prompt that is long enough to be a question."""
    for line in prompt.splitlines():
        words = words_of(line)
        if len(words) >= _SHORTEST_QUESTION:
            yield _hash_of(words)


def _hash_of(words: Iterable[str]) -> int:
    """Return the 64-bit BLAKE2b hash of words."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def build_index(problems: Iterable[tuple[str, str, Sequence[str]]]) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an index file.

    Args:
        problems: Id, question and texts (question and solutions) of each task.
    """
    ids: list[str] = []
    ngrams: dict[int, dict[int, int]] = {length: {} for length in _LENGTHS}
    prompts: dict[int, int] = {}
    for index, (task, question, texts) in enumerate(problems):
        ids.append(task)
        for length in _LENGTHS:
            for text in texts:
                for ngram in ngrams_of(words_of(text), length):
                    ngrams[length].setdefault(ngram, index)
        for line in _lines_of(question):
            prompts.setdefault(line, index)
    arrays: dict[str, NDArray[np.generic]] = {"tasks": np.array(ids)}
    for name, found in {**{str(length): ngrams[length] for length in _LENGTHS}, "prompts": prompts}.items():
        arrays[f"{name}_hashes"] = np.array(list(found), dtype=np.uint64)
        arrays[f"{name}_tasks"] = np.array(list(found.values()), dtype=np.uint16)
    return arrays


@cache
def task_index() -> TaskIndex:
    """Return the index that comes with the package."""
    with files("dylo_moe.data").joinpath(INDEX_FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:

        def mapping(name: str) -> dict[int, int]:
            pairs = zip(arrays[f"{name}_hashes"].tolist(), arrays[f"{name}_tasks"].tolist(), strict=True)
            return dict(pairs)

        ngrams = {length: mapping(str(length)) for length in _LENGTHS}
        return TaskIndex(tuple(arrays["tasks"].tolist()), ngrams, mapping("prompts"))


def decontaminate(rows: Dataset, name: str, *, workers: int = 1) -> tuple[Dataset, Contamination]:
    """Drop the rows that are benchmark tasks.

    Args:
        rows: Rows with the columns ``prompt``, ``response`` and ``task``.
        name: Name of the dataset.
        workers: Number of processes that compare rows.

    Returns:
        The remaining rows, and what was found.
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


def _find(batch: Mapping[str, list[str]]) -> dict[str, list[int]]:
    index = task_index()
    found = [index.find(*row) for row in zip(batch["prompt"], batch["response"], batch["task"], strict=True)]
    return {"kind": [_KINDS.index(kind) for kind, _ in found], "task": [index.number(task) for _, task in found]}
