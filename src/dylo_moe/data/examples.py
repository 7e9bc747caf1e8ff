"""From a dataset's source to examples on disk: read once, kept by content, split by content.

Rows go from the source to an Arrow file one by one, and the file is mapped into memory: how many rows there are does
not matter to memory. A second run with the same source, template and code finds the file that the first one wrote.
"""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from dylo_moe.data.files import Located, data_files, digest_of, rows_of
from dylo_moe.data.local_code import unique_rows
from dylo_moe.data.registry import OWN_FILES, DatasetEntry, resolve
from dylo_moe.data.rows import Exchange, Row
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
    """What every row of every dataset becomes. The loss is on the response alone."""

    prompt: str
    response: str
    domain: str


@dataclass(frozen=True)
class Examples:
    """All examples of one dataset.

    Attributes:
        entry: The dataset.
        rows: With the columns ``prompt``, ``response``, ``domain``, ``split`` (an index into ``SPLITS``) and
            ``task`` (the benchmark task that a row says it is, or nothing).
        skipped: How many rows were left out.
        first_skipped: Where the first of them stands, and what is wrong with it.
    """

    entry: DatasetEntry
    rows: Dataset
    skipped: int
    first_skipped: str


def get_dataset(
    name: str, *, data_dir: str | Path | None = None, template: Template | None = None, skip_bad_rows: bool = False
) -> DatasetDict:
    """Reads a dataset and splits it. Nothing is taken out: see ``decontaminate`` before you train on it.

    The split of a row follows from its prompt alone: it is the same on every machine, stays where it is when rows
    are added or reordered, and rows with equal prompts never end up on both sides.

    Args:
        name: One of ``AVAILABLE_DATASETS``, or ``name=path``; see ``registry.resolve``.
        data_dir: Where files or a ``datasets`` cache are.
        template: What stands around a conversation; the plain one by default.
        skip_bad_rows: Leaves out rows that cannot be used, in the place of an error.

    Returns:
        Those of the splits ``train``, ``validation`` and ``test`` that the dataset has, each with the text columns
        ``prompt``, ``response`` and ``domain``.

    Raises:
        DatasetError: The name is unknown, the dataset cannot be reached, a row cannot be used, or a split is empty.
    """
    examples = read_examples(resolve(name, data_dir), template or PlainTemplate(), skip_bad_rows=skip_bad_rows)
    return DatasetDict(
        {name: of_split(examples.rows, name).select_columns(list(Example._fields)) for name in check_splits(examples)}
    )


def check_splits(examples: Examples) -> list[str]:
    """Makes sure that every split that a dataset has is not empty; returns the splits' names.

    Raises:
        DatasetError: One of them is empty.
    """
    shares = zip(SPLITS, examples.entry.spec.shares, strict=True)
    names = [name for name, share in shares if share > 0]
    counts = np.bincount(splits_of(examples.rows), minlength=len(SPLITS))
    for name in names:
        if not counts[SPLITS.index(name)]:
            raise DatasetError(f"the dataset {examples.entry.name!r} is empty: it has no row for its {name} split")
    return names


def of_split(rows: Dataset, name: str) -> Dataset:
    """The rows of one split."""
    return rows.select(np.flatnonzero(splits_of(rows) == SPLITS.index(name)))


def splits_of(rows: Dataset) -> "np.ndarray[Any, np.dtype[np.int8]]":
    """The split of each row, an index into ``SPLITS``."""
    return column(rows, "split")


def column(rows: Dataset, name: str) -> "np.ndarray[Any, Any]":
    """A column of numbers."""
    return np.asarray(rows.with_format("numpy", columns=[name])[:][name]) if len(rows) else np.zeros(0, np.int64)


def read_examples(entry: DatasetEntry, template: Template, *, skip_bad_rows: bool = False) -> Examples:
    """Reads all examples of a dataset, from the disk where they have been read before.

    Args:
        entry: The dataset.
        template: What stands around a conversation.
        skip_bad_rows: Leaves out rows that cannot be used. Rows of the Hub without a response always are.

    Raises:
        DatasetError: The dataset cannot be reached, or a row cannot be used; the message names file and line.
    """
    source = _source(entry)
    key = [source.identity, entry.name, entry.spec, template.identity, skip_bad_rows, code_digest()]
    arguments = {"source": source, "entry": entry, "template": template, "skip_bad_rows": skip_bad_rows}
    try:
        rows = Dataset.from_generator(_records, features=_FEATURES, gen_kwargs=arguments, fingerprint=Hasher.hash(key))
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
    """The rows of a dataset as they are, in the order of their source.

    Raises:
        DatasetError: The dataset cannot be had or read.
    """
    return [row for _, row in _located(_source(entry), entry)]


@cache
def code_digest() -> str:
    """A digest of this package's code: what older code has written is not read by newer code."""
    return digest_of(sorted(Path(__file__).parent.glob("*.py")))


class _Source(NamedTuple):
    """Where rows come from, and what tells their content from others'."""

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
    # what the local domains read are the files of these versions
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
            f"({first_line(error)}); connect, or elsewhere run 'hf download {hub} --repo-type dataset --local-dir "
            f"DIR/{entry.name}' and pass --data_dir DIR here, or use python_stdlib,cpp_headers, which need no Hub"
        ) from error


def _located(source: _Source, entry: DatasetEntry) -> Iterator[Located]:
    if source.hub is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(source.hub))
    elif source.files:
        for path in source.files:
            yield from rows_of(path)
    else:
        assert callable(entry.spec.source)
        yield from ((f"row {number}", row) for number, row in enumerate(unique_rows(entry.spec.source())))


def _records(source: _Source, entry: DatasetEntry, template: Template, skip_bad_rows: bool) -> Iterator[dict[str, Any]]:
    where = None
    for where, row in _located(source, entry):
        task = entry.spec.task_of(row) if entry.spec.task_of else ""
        try:
            records = [_record(exchange, entry, template, task) for exchange in entry.spec.exchanges(row)]
        except DatasetError as error:
            problem = f"the dataset {entry.name!r}: {where}: {error}"
            known = isinstance(error, _NoResponse) and entry.spec.source != OWN_FILES
            if not skip_bad_rows and not known:
                raise DatasetError(f"{problem}; mend or remove the row, or pass --skip_bad_rows") from error
            records = [{**dict.fromkeys(_FEATURES, ""), "split": _SKIPPED, "problem": problem}]
        yield from records
    if where is None:
        raise DatasetError(f"the dataset {entry.name!r} is empty: it has no row at all")


class _NoResponse(DatasetError):
    """A row has nothing to learn: some public sets have such rows, and in the user's own files it is the user's say."""


def _record(exchange: Exchange, entry: DatasetEntry, template: Template, task: str) -> dict[str, Any]:
    if not exchange.response.strip():
        raise _NoResponse("the response is empty")
    prompt, response = exchange.prompt, exchange.response
    if not isinstance(prompt, str):
        prompt, response = template.render(prompt), response + template.turn_end
    try:
        (prompt + response).encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"it holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}") from error
    split = _split_of(exchange.key, entry.spec.shares)
    example = Example(prompt, response, entry.name)
    return {**example._asdict(), "split": split, "task": task, "problem": ""}


def _split_of(key: str, shares: tuple[float, float, float]) -> int:
    digest = hashlib.sha256(key.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    train, validation, _ = shares
    return 0 if position < train else 1 if position < train + validation else 2
