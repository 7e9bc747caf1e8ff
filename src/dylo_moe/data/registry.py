"""The datasets by name: where each comes from, under which licence, and how a row becomes prompt and response.

Adding a dataset is adding one ``DatasetSpec``. Turning text into tokens is the business of ``prepare_data.py``.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from dylo_moe.data.local_code import cpp_headers_rows, python_stdlib_rows, unique_rows
from dylo_moe.errors import DatasetError, did_you_mean, first_line

Row = Mapping[str, Any]

_UNREACHABLE = (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError, DatasetNotFoundError, HfHubHTTPError)


class Example(NamedTuple):
    """What every row of every dataset becomes. The loss is on the response alone."""

    prompt: str
    response: str
    domain: str


def instruction_prompt(instruction: str, context: str = "") -> str:
    """The plain template around an instruction, for base models that know no chat."""
    task = f"### Instruction:\n{instruction.strip()}\n\n"
    given = f"### Input:\n{context.strip()}\n\n" if context.strip() else ""
    return f"{task}{given}### Response:\n"


@dataclass(frozen=True)
class InstructionColumns:
    """Rows of an instruction, possibly some input, and an answer."""

    instruction: str
    response: str
    context: str | None = None

    def __call__(self, row: Row) -> tuple[str, str]:
        """Returns prompt and response of a row."""
        context = row[self.context] or "" if self.context else ""
        return instruction_prompt(row[self.instruction], context), row[self.response]


@dataclass(frozen=True)
class CompletionColumns:
    """Rows whose response goes on where the prompt ends."""

    prompt: str = "prompt"
    response: str = "response"

    def __call__(self, row: Row) -> tuple[str, str]:
        """Returns prompt and response of a row."""
        return row[self.prompt], row[self.response]


def mbpp_row(row: Row) -> tuple[str, str]:
    """MBPP as in its paper: the task and the tests that its code has to pass, then the code."""
    tests = "\n".join(row["test_list"])
    return instruction_prompt(f"{row['text']}\nYour code should pass these tests:\n{tests}"), row["code"]


def sharegpt_row(row: Row) -> tuple[str, str]:
    """The last answer of a conversation; the turns before it are the prompt."""
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    if not turns or turns[-1][0] != "gpt":
        raise DatasetError("a conversation must end with a turn from 'gpt'")
    *before, (_, answer) = turns
    rendered = [text.strip() + "\n\n" if speaker == "gpt" else instruction_prompt(text) for speaker, text in before]
    return "".join(rendered), answer


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset.

    Attributes:
        source: A Hub id, or a function that yields the rows.
        licence: As its page states it.
        to_pair: From a row to prompt and response.
        config: The Hub configuration.
        hub_splits: The Hub's splits to read; all are pooled, and split again by content.
        shares: Shares of train, validation and test.
    """

    source: str | Callable[[], Iterator[Row]]
    licence: str
    to_pair: Callable[[Row], tuple[str, str]]
    config: str | None = None
    hub_splits: str = "train"
    shares: tuple[float, float, float] = (0.9, 0.1, 0.0)


REGISTRY: dict[str, DatasetSpec] = {
    "code_alpaca": DatasetSpec(
        "sahil2801/CodeAlpaca-20k", "CC BY-NC 4.0", InstructionColumns("instruction", "output", "input")
    ),
    "mbpp": DatasetSpec(
        "google-research-datasets/mbpp",
        "CC BY 4.0",
        mbpp_row,
        config="full",
        hub_splits="train+validation+test+prompt",
        shares=(0.7, 0.1, 0.2),
    ),
    "evol_instruct": DatasetSpec(
        "nickrosh/Evol-Instruct-Code-80k-v1", "CC BY-NC-SA 4.0", InstructionColumns("instruction", "output")
    ),
    "code_feedback": DatasetSpec(
        "m-a-p/CodeFeedback-Filtered-Instruction", "Apache-2.0", InstructionColumns("query", "answer")
    ),
    "python_codes_25k": DatasetSpec(
        "flytech/python-codes-25k", "not stated", InstructionColumns("instruction", "output", "input")
    ),
    "python_code_instructions_18k": DatasetSpec(
        "iamtarun/python_code_instructions_18k_alpaca",
        "not stated",
        InstructionColumns("instruction", "output", "input"),
    ),
    "python_code_23k_sharegpt": DatasetSpec("ajibawa-2023/Python-Code-23k-ShareGPT", "CC BY-NC-ND 4.0", sharegpt_row),
    "python_stdlib": DatasetSpec(python_stdlib_rows, "PSF-2.0", CompletionColumns()),
    "cpp_headers": DatasetSpec(cpp_headers_rows, "BSD-3-Clause", CompletionColumns()),
}

AVAILABLE_DATASETS: tuple[str, ...] = tuple(REGISTRY)
"""The names that ``get_dataset`` knows."""


def spec_of(name: str) -> DatasetSpec:
    """The entry of a dataset.

    Raises:
        DatasetError: There is none of that name.
    """
    if name not in REGISTRY:
        known = ", ".join(AVAILABLE_DATASETS)
        raise DatasetError(f"there is no dataset {name!r}{did_you_mean(name, REGISTRY)} (there are: {known})")
    return REGISTRY[name]


def get_dataset(name: str) -> DatasetDict:
    """Reads a dataset and splits it.

    The split of a row follows from its prompt alone: it is the same on every machine, stays where it is when rows
    are added or reordered, and rows with equal prompts never end up on both sides.

    Args:
        name: One of ``AVAILABLE_DATASETS``.

    Returns:
        The splits ``train``, ``validation`` and, where the dataset has one, ``test``, each with the text columns
        ``prompt``, ``response`` and ``domain``.

    Raises:
        DatasetError: The name is unknown, the dataset cannot be reached, or it holds no usable row.
    """
    spec = spec_of(name)
    names = [split for split, share in zip(("train", "validation", "test"), spec.shares, strict=True) if share > 0]
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in names}
    for example in _examples(name, spec):
        rows[_split_of(example.prompt, spec.shares)].append(example._asdict())
    for split in names:
        if not rows[split]:
            raise DatasetError(f"the dataset {name!r} is empty: it has no row for its {split} split")
    return DatasetDict({split: Dataset.from_list(rows[split]) for split in names})


def _examples(name: str, spec: DatasetSpec) -> Iterator[Example]:
    rows = _hub_rows(name, spec, spec.source) if isinstance(spec.source, str) else unique_rows(spec.source())
    for number, row in enumerate(rows):
        try:
            prompt, response = spec.to_pair(row)
        except (KeyError, TypeError, AttributeError, DatasetError) as error:
            raise DatasetError(
                f"row {number} of the dataset {name!r} has not the expected columns: {first_line(error)} "
                f"(it has: {', '.join(row)})"
            ) from error
        if response.strip():
            yield Example(prompt, response, name)


def _hub_rows(name: str, spec: DatasetSpec, source: str) -> Dataset:
    try:
        return datasets.load_dataset(source, spec.config, split=spec.hub_splits)
    except _UNREACHABLE as error:
        raise DatasetError(
            f"the dataset {name!r} ({source}) could not be fetched from the Hub and is not in the local cache; "
            f"connect, or use --datasets python_stdlib,cpp_headers, which need no Hub ({first_line(error)})"
        ) from error


def _split_of(prompt: str, shares: tuple[float, float, float]) -> str:
    digest = hashlib.sha256(prompt.encode("utf-8", errors="surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    train, validation, _ = shares
    return "train" if position < train else "validation" if position < train + validation else "test"
