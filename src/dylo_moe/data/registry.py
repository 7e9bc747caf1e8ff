"""Registry of datasets by name: the source, license and row format of each.

A dataset is added by one ``DatasetSpec``. Any file of the user is a dataset too. Text becomes tokens in
``tokenization.py``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.data.formats import (
    CompletionColumns,
    InstructionColumns,
    Row,
    RowFormat,
    TurnColumn,
    detect_format,
    mbpp_row,
)
from dylo_moe.data.local_code import cpp_headers_rows, python_stdlib_rows
from dylo_moe.data.readers import SUFFIXES
from dylo_moe.errors import DatasetError, did_you_mean

OWN_FILES = "own files"
"""Source of a dataset that is read from the user's files."""


@dataclass(frozen=True)
class DatasetSpec:
    """Source, license and format of one dataset.

    Attributes:
        source: Hub id, function that yields the rows, or ``OWN_FILES``.
        license: License as the dataset's page states it.
        row_format: Conversion of a row to prompts and responses.
        columns: Names of the columns that are read.
        revision: Commit, tag or branch on the Hub.
        config: Name of the Hub configuration.
        hub_splits: Splits of the Hub to read; they are pooled, and split again by content.
        shares: Fractions of train, validation and test.
        task_of: Function that returns the benchmark task id in a row, for a dataset that has such ids.
        evaluation_only: Whether the dataset is a benchmark, which must not be trained on.
    """

    source: str | Callable[[], Iterator[Mapping[str, str]]]
    license: str
    row_format: RowFormat
    columns: tuple[str, ...]
    revision: str = "main"
    config: str | None = None
    hub_splits: str = "train"
    shares: tuple[float, float, float] = (0.9, 0.1, 0.0)
    task_of: Callable[[Row], str] | None = None
    evaluation_only: bool = False

    @property
    def non_commercial(self) -> bool:
        """Whether the license rules out commercial use."""
        return "-NC" in self.license

    @property
    def on_hub(self) -> str | None:
        """Hub id of the dataset, or None if it is not on the Hub."""
        return self.source if isinstance(self.source, str) and self.source != OWN_FILES else None


def _mbpp_task(row: Row) -> str:
    return f"Mbpp/{row.get('task_id')}"


_ALPACA = InstructionColumns("instruction", "output", "input"), ("instruction", "input", "output")

REGISTRY: dict[str, DatasetSpec] = {
    "code_alpaca": DatasetSpec("sahil2801/CodeAlpaca-20k", "CC BY-NC 4.0", *_ALPACA),
    "mbpp": DatasetSpec(
        "google-research-datasets/mbpp",
        "CC BY 4.0",
        mbpp_row,
        ("task_id", "text", "code", "test_list"),
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        config="full",
        hub_splits="train+validation+test+prompt",
        shares=(0.7, 0.1, 0.2),
        task_of=_mbpp_task,
    ),
    "evol_instruct": DatasetSpec(
        "nickrosh/Evol-Instruct-Code-80k-v1",
        "CC BY-NC-SA 4.0",
        InstructionColumns("instruction", "output"),
        ("instruction", "output"),
    ),
    "code_feedback": DatasetSpec(
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "Apache-2.0",
        InstructionColumns("query", "answer"),
        ("query", "answer"),
    ),
    "python_codes_25k": DatasetSpec("flytech/python-codes-25k", "not stated", *_ALPACA),
    "python_code_instructions_18k": DatasetSpec("iamtarun/python_code_instructions_18k_alpaca", "not stated", *_ALPACA),
    "python_code_23k_sharegpt": DatasetSpec(
        "ajibawa-2023/Python-Code-23k-ShareGPT", "CC BY-NC-ND 4.0", TurnColumn("conversations"), ("conversations",)
    ),
    "humaneval": DatasetSpec(
        "openai/openai_humaneval",
        "MIT",
        CompletionColumns("prompt", "canonical_solution"),
        ("prompt", "canonical_solution"),
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        hub_splits="test",
        shares=(0.0, 0.0, 1.0),
        evaluation_only=True,
    ),
    "python_stdlib": DatasetSpec(python_stdlib_rows, "PSF-2.0", CompletionColumns(), ("prompt", "response")),
    "cpp_headers": DatasetSpec(cpp_headers_rows, "BSD-3-Clause", CompletionColumns(), ("prompt", "response")),
}

AVAILABLE_DATASETS: tuple[str, ...] = tuple(REGISTRY)
"""Names that ``get_dataset`` knows; it also takes any ``name=path``."""

_OWN = DatasetSpec(OWN_FILES, "the user's", detect_format, ())
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class DatasetEntry:
    """Dataset that a user named.

    Attributes:
        name: Name of the dataset and of its domain.
        spec: Specification of the dataset.
        path: File or folder to read instead of the source.
        cache: Folder of a ``datasets`` cache to read from.
    """

    name: str
    spec: DatasetSpec
    path: Path | None = None
    cache: Path | None = None


def resolve(dataset: str, data_dir: str | Path | None = None) -> DatasetEntry:
    """Return the dataset ``name``, or ``name=path`` for files of the user.

    A known name with a path reads that dataset's rows from the path. With ``data_dir``, a dataset of the Hub is read
    from ``data_dir/<name>.<suffix>`` or the folder ``data_dir/<name>`` if it exists, and otherwise through the
    ``datasets`` cache in ``data_dir``.

    Raises:
        DatasetError: The name is unknown or not usable, or ``data_dir`` is not a folder.
    """
    name, is_own, path = dataset.partition("=")
    if not _NAME.fullmatch(name):
        raise DatasetError(f"{name!r} cannot name a dataset; use letters, digits, '_', '-' and '.'")
    if is_own:
        if not path:
            raise DatasetError(f"{dataset!r} names no file; write {name}=path/to/file.jsonl")
        return DatasetEntry(name, REGISTRY.get(name, _OWN), Path(path).expanduser())
    if name not in REGISTRY:
        known = ", ".join(AVAILABLE_DATASETS)
        raise DatasetError(
            f"there is no dataset {name!r}{did_you_mean(name, REGISTRY)} (there are: {known}; "
            f"a file of your own is {name}=path/to/file.jsonl)"
        )
    spec = REGISTRY[name]
    if data_dir is None or not spec.on_hub:
        return DatasetEntry(name, spec)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"`data_dir` must be a folder, got {folder}")
    candidates = (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES))
    found = next((path for path in candidates if path.exists()), None)
    return DatasetEntry(name, spec, found, folder)


def refuse_for_training(entry: DatasetEntry) -> None:
    """Check that a dataset is not a benchmark.

    Raises:
        DatasetError: The dataset is for evaluation only.
    """
    if entry.spec.evaluation_only:
        raise DatasetError(
            f"{entry.name} is a benchmark, which cannot evaluate a model that was trained on it; leave it out of "
            "`datasets`"
        )
