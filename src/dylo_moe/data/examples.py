"""Examples of a dataset: read once, cached on the disk by content, and split by content.

Rows are written one by one to an Arrow file, which is memory-mapped, so memory does not grow with their number. A
second run with the same source, template and code reads the file that the first one wrote.
"""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from numpy.typing import NDArray

from dylo_moe.data.formats import PromptResponse, Row
from dylo_moe.data.local_code import unique_rows
from dylo_moe.data.readers import LocatedRow, data_files, digest_of, rows_of
from dylo_moe.data.registry import OWN_FILES, DatasetEntry, resolve
from dylo_moe.data.templates import PlainTemplate, Template
from dylo_moe.errors import DatasetError, first_line

SPLITS = ("train", "validation", "test")
_SKIPPED = len(SPLITS)
_FEATURES = Features(
    {
        "prompt": Value("string"),
        "response": Value("string"),
        "domain": Value("string"),
        "split": Value("int8"),
        "task": Value("string"),
        "problem": Value("string"),
    }
)
_UNREACHABLE = (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError, DatasetNotFoundError, HfHubHTTPError)


class Example(NamedTuple):
    """Prompt and response of one example, and its domain; only the response has a loss."""

    prompt: str
    response: str
    domain: str


@dataclass(frozen=True)
class Examples:
    """All examples of one dataset.

    Attributes:
        entry: The dataset.
        rows: Examples with the columns ``prompt``, ``response``, ``domain``, ``split`` (an index into ``SPLITS``) and
            ``task`` (the benchmark task id in the row, or "").
        skipped: Number of rows left out.
        first_skipped: Location and fault of the first of them, or "".
    """

    entry: DatasetEntry
    rows: Dataset
    skipped: int
    first_skipped: str


def get_dataset(
    name: str, *, data_dir: str | Path | None = None, template: Template | None = None, skip_bad_rows: bool = False
) -> DatasetDict:
    """Read a dataset and split it; benchmark tasks stay in it (see ``decontaminate`` before training on it).

    The split of a row depends on its prompt alone: it is the same on every machine, does not change when rows are
    added or reordered, and rows with equal prompts are in the same split.

    Args:
        name: One of ``AVAILABLE_DATASETS``, or ``name=path``; see ``registry.resolve``.
        data_dir: Folder with files or with a ``datasets`` cache.
        template: Prompt template of conversations; the plain one by default.
        skip_bad_rows: Whether to leave out rows that cannot be used instead of raising an error.

    Returns:
        Those of the splits ``train``, ``validation`` and ``test`` that the dataset has, each with the text columns
        ``prompt``, ``response`` and ``domain``.

    Raises:
        DatasetError: The name is unknown, the dataset cannot be reached, a row cannot be used, or a split is empty.
    """
    examples = read_examples(resolve(name, data_dir), template or PlainTemplate(), skip_bad_rows=skip_bad_rows)
    return DatasetDict(
        {
            name: rows_of_split(examples.rows, name).select_columns(list(Example._fields))
            for name in check_splits(examples)
        }
    )


def check_splits(examples: Examples) -> list[str]:
    """Return the names of a dataset's splits, after checking that each has rows.

    Raises:
        DatasetError: A split is empty.
    """
    shares = zip(SPLITS, examples.entry.spec.shares, strict=True)
    names = [name for name, share in shares if share > 0]
    counts = np.bincount(splits_of(examples.rows), minlength=len(SPLITS))
    for name in names:
        if not counts[SPLITS.index(name)]:
            raise DatasetError(f"the dataset {examples.entry.name!r} is empty: it has no row for its {name} split")
    return names


def rows_of_split(rows: Dataset, name: str) -> Dataset:
    """Return the rows of one split."""
    return rows.select(np.flatnonzero(splits_of(rows) == SPLITS.index(name)))


def splits_of(rows: Dataset) -> NDArray[np.int64]:
    """Return the split of each row, an index into ``SPLITS``: ``(rows,)``."""
    return column(rows, "split")


def column(rows: Dataset, name: str) -> NDArray[np.int64]:
    """Return a column of integers or booleans: ``(rows,)``."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    return np.asarray(rows.with_format("numpy", columns=[name])[:][name], dtype=np.int64)


def read_examples(entry: DatasetEntry, template: Template, *, skip_bad_rows: bool = False) -> Examples:
    """Read all examples of a dataset, from the cache if they were read before.

    Args:
        entry: The dataset.
        template: Prompt template of conversations.
        skip_bad_rows: Whether to leave out rows that cannot be used. Rows of a known dataset that have no response are
            always left out.

    Raises:
        DatasetError: The dataset cannot be reached, or a row cannot be used; the message names file and line.
    """
    source = _source(entry)
    key = [source.identity, entry.name, entry.spec, template.identity, skip_bad_rows, code_digest()]
    arguments = {"source": source, "entry": entry, "template": template, "skip_bad_rows": skip_bad_rows}
    try:
        rows = Dataset.from_generator(
            _example_records, features=_FEATURES, gen_kwargs=arguments, fingerprint=Hasher.hash(key)
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DatasetError | OSError):
            raise error.__cause__ from None
        raise
    bad = splits_of(rows) == _SKIPPED
    if not bad.any():
        return Examples(entry, rows.remove_columns("problem"), 0, "")
    first = rows[int(bad.argmax())]["problem"]
    return Examples(entry, rows.select(np.flatnonzero(~bad)).remove_columns("problem"), int(bad.sum()), first)


def read_rows(entry: DatasetEntry) -> list[Row]:
    """Return the unconverted rows of a dataset in the order of their source.

    Raises:
        DatasetError: The dataset cannot be reached or read.
    """
    return [row for _, row in _located_rows(_source(entry), entry)]


@cache
def code_digest() -> str:
    """Return a digest of this package's code, so that no cache of other code is read."""
    return digest_of(sorted(Path(__file__).parent.glob("*.py")))


class _Source(NamedTuple):
    """Source of rows: files, a dataset of the Hub, or neither for a local dataset; with a hash of its content."""

    identity: str
    files: list[Path]
    hub: Dataset | None


def _source(entry: DatasetEntry) -> _Source:
    if entry.path is not None:
        files = data_files(entry.path)
        return _Source(digest_of(files), files, None)
    if entry.spec.on_hub:
        hub = _from_hub(entry)
        return _Source(hub._fingerprint, [], hub)
    # the installed files that local datasets read depend on these versions
    versions = [platform.python_version(), torch.__version__]
    return _Source(Hasher.hash([entry.spec.source, versions]), [], None)


def _from_hub(entry: DatasetEntry) -> Dataset:
    spec, hub = entry.spec, entry.spec.on_hub
    try:
        return datasets.load_dataset(
            hub, spec.config, split=spec.hub_splits, revision=spec.revision, cache_dir=entry.cache
        )
    except _UNREACHABLE as error:
        raise DatasetError(
            f"the dataset {entry.name!r} ({hub}) could not be fetched from the Hub and is not in the local cache "
            f"({first_line(error)}); connect, or run 'hf download {hub} --repo-type dataset --local-dir "
            f"DIR/{entry.name}' elsewhere and pass `data_dir` DIR here, or use python_stdlib,cpp_headers, which need "
            "no Hub"
        ) from error


def _located_rows(source: _Source, entry: DatasetEntry) -> Iterator[LocatedRow]:
    if source.hub is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(source.hub))
    elif source.files:
        for path in source.files:
            yield from rows_of(path)
    else:
        assert callable(entry.spec.source)
        yield from ((f"row {number}", row) for number, row in enumerate(unique_rows(entry.spec.source())))


def _example_records(
    source: _Source, entry: DatasetEntry, template: Template, skip_bad_rows: bool
) -> Iterator[dict[str, object]]:
    where = None
    for where, row in _located_rows(source, entry):
        task = entry.spec.task_of(row) if entry.spec.task_of else ""
        try:
            records = [_example_record(pair, entry, template, task) for pair in entry.spec.row_format(row)]
        except DatasetError as error:
            problem = f"the dataset {entry.name!r}: {where}: {error}"
            expected = isinstance(error, _NoResponseError) and entry.spec.source != OWN_FILES
            if not skip_bad_rows and not expected:
                raise DatasetError(f"{problem}; fix or remove the row, or set `skip_bad_rows`") from error
            records = [{**dict.fromkeys(_FEATURES, ""), "split": _SKIPPED, "problem": problem}]
        yield from records
    if where is None:
        raise DatasetError(f"the dataset {entry.name!r} is empty: it has no row at all")


class _NoResponseError(DatasetError):
    """Error for a row without a response, which some public datasets have."""


def _example_record(pair: PromptResponse, entry: DatasetEntry, template: Template, task: str) -> dict[str, object]:
    prompt, response = pair
    if not response.strip():
        raise _NoResponseError("the response is empty")
    if not isinstance(prompt, str):
        prompt, response = template.render(prompt), response + template.turn_end
    try:
        (prompt + response).encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"it holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}") from error
    position = int.from_bytes(hashlib.sha256(pair.key.encode()).digest()[:8], "big") / 2**64
    train, validation, _ = entry.spec.shares
    split = 0 if position < train else 1 if position < train + validation else 2
    example = Example(prompt, response, entry.name)
    return {**example._asdict(), "split": split, "task": task, "problem": ""}
