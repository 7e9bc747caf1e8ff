"""From named datasets to rows of tokens with a loss on the response alone.

Read, decontaminate, split, tokenise, pack: each step keeps what it did on the disk, by the content that it read. The
order in which rows are trained on is ``mixing``'s affair.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.decontaminate import Contamination, decontaminate
from dylo_moe.data.examples import Examples, check_splits, code_digest, column, of_split, read_examples
from dylo_moe.data.mixing import MixingSampler
from dylo_moe.data.packing import TokenRows
from dylo_moe.data.parallel import map_rows
from dylo_moe.data.registry import DatasetEntry, resolve
from dylo_moe.data.templates import PlainTemplate, Template
from dylo_moe.errors import DatasetError

Overlong = Literal["cut", "drop"]
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "cut": Value("bool"),
    }
)


@dataclass
class DomainSummary:
    """What became of one dataset.

    Attributes:
        name: The dataset's.
        source: The Hub id, the path, or what the package reads.
        revision: Of the Hub.
        licence: As its page states it.
        skipped: Rows that cannot be used: no response, or broken and left out by ``skip_bad_rows``.
        contaminated: Rows that are tasks of a benchmark, dropped.
        train: Rows to train on.
        validation: Held-out rows.
        too_long: Rows dropped since their prompt, or with ``overlong="drop"`` the whole, is too long.
        cut: Rows that lost the end of their response.
        train_tokens: Tokens to train on.
        labelled_tokens: Those with a loss.
    """

    name: str
    source: str
    revision: str
    licence: str
    skipped: int
    contaminated: int
    train: int = 0
    validation: int = 0
    too_long: int = 0
    cut: int = 0
    train_tokens: int = 0
    labelled_tokens: int = 0


@dataclass
class PreparedData:
    """Rows of tokens for training and evaluation.

    Attributes:
        train: The training rows, packed or not.
        validation: Held-out rows of all domains, one example each.
        domains: The names that ``domain`` counts.
        template: What stood around conversations.
        summaries: One for each domain.
        contamination: What was found of benchmarks in each domain; empty where nobody looked.
        notes: What a user should know, a line each.
        capacity: Tokens of a packed row; None where rows are not packed.
    """

    train: TokenRows
    validation: TokenRows
    domains: list[str]
    template: Template
    summaries: list[DomainSummary]
    contamination: list[Contamination]
    notes: list[str] = field(default_factory=list)
    capacity: int | None = None

    @property
    def packing_efficiency(self) -> float | None:
        """Share of the packed rows that is tokens and not padding; None where rows are not packed."""
        return None if self.capacity is None else float(self.train.lengths.mean() / self.capacity)

    def sampler(
        self, *, temperature: float = 1.0, seed: int = 0, batch_size: int = 1, processes: int = 1
    ) -> MixingSampler:
        """The order to train in; rows of similar length together where they are not packed."""
        lengths = None if self.train.packed else self.train.lengths
        return MixingSampler(
            self.train.domains,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            processes=processes,
            lengths=lengths,
        )

    def identity(self, **order: Any) -> str:
        """Tells these training rows, in this order, from others."""
        return str(Hasher.hash([self.train.fingerprint, self.capacity, order]))

    def record(self) -> dict[str, Any]:
        """What a run's report keeps of its data."""
        return {
            "template": self.template.name,
            "datasets": [asdict(summary) for summary in self.summaries],
            "contamination": [asdict(found) for found in self.contamination],
            "packing_efficiency": self.packing_efficiency,
        }


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model will see it: with the special tokens that the tokenizer puts in front."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The same for many prompts at once."""
    begin = tokenizer.bos_token
    ids: list[list[int]] = tokenizer(list(prompts)).input_ids
    for index, prompt in enumerate(prompts):
        # a chat template writes the beginning itself, and the tokenizer would write it again
        if begin and prompt.startswith(begin):
            ids[index] = tokenizer(prompt, add_special_tokens=False).input_ids
        # some tokenizers end every text; a prompt has to stay open
        if ids[index] and ids[index][-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids[index] = ids[index][:-1]
    return ids


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    overlong: Overlong = "cut",
) -> dict[str, list[Any]]:
    """Token ids of examples, each ended by the end-of-text token, which is learned too.

    Prompt and response are tokenised apart, so that the boundary between them in training is the one that
    generation sees.

    Args:
        tokenizer: The base model's.
        prompts: What comes before the responses.
        responses: What is learned.
        max_length: Most tokens of an example.
        overlong: ``cut`` takes the end of a response that is too long, ``drop`` the whole example. An example whose
            prompt alone leaves no room is always dropped.

    Returns:
        ``input_ids``, ``prompt_length``, ``length`` (0 for an example that is dropped) and ``cut``.
    """
    heads = encode_prompts(tokenizer, prompts)
    tails: list[list[int]] = tokenizer(list(responses), add_special_tokens=False).input_ids
    rows: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for head, tail in zip(heads, tails, strict=True):
        if not tail or tail[-1] != tokenizer.eos_token_id:
            tail = [*tail, tokenizer.eos_token_id]
        too_long = len(head) + len(tail) > max_length
        dropped = len(head) >= max_length or (too_long and overlong == "drop")
        ids = [] if dropped else (head + tail)[:max_length]
        for name, value in zip(rows, (ids, len(head), len(ids), too_long and not dropped), strict=True):
            rows[name].append(value)
    return rows


def prepare_data(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    training_percent: float = 100.0,
    validation_percent: float = 100.0,
    packing: bool = False,
    overlong: Overlong = "cut",
    template: Template | None = None,
    data_dir: str | Path | None = None,
    decontaminated: bool = True,
    skip_bad_rows: bool = False,
    workers: int = 1,
    seed: int = 42,
) -> PreparedData:
    """Reads, decontaminates, splits, tokenises and packs datasets.

    Args:
        names: Datasets of the registry, or ``name=path``.
        tokenizer: The base model's.
        max_length: Longest example and, with ``packing``, the longest row, in tokens.
        training_percent: Share of the training rows, chosen at random by ``seed``.
        validation_percent: The same for held-out rows.
        packing: Joins training examples into full rows.
        overlong: What to do with longer examples; see ``encode_examples``.
        template: What stands around a conversation; the plain one by default.
        data_dir: Where files or a ``datasets`` cache are.
        decontaminated: Whether to drop rows that are tasks of a benchmark.
        skip_bad_rows: Leaves out rows that cannot be used, in the place of an error.
        workers: Processes to tokenise and compare with.
        seed: Of the choice of rows; the splits do not depend on it.

    Raises:
        DatasetError: A dataset is unknown, unreachable or empty, a row of it cannot be used, or none fits
            ``max_length``.
    """
    template = template or PlainTemplate()
    pipeline = _Pipeline(tokenizer, template, max_length, overlong, decontaminated, skip_bad_rows, workers)
    percents = {"train": training_percent, "validation": validation_percent}
    prepared = [pipeline.prepare(entry, percents, seed) for entry in [resolve(name, data_dir) for name in names]]
    return PreparedData(
        train=_joined([domain.splits["train"] for domain in prepared], max_length if packing else None),
        validation=_joined([domain.splits["validation"] for domain in prepared]),
        domains=[domain.summary.name for domain in prepared],
        template=template,
        summaries=[domain.summary for domain in prepared],
        contamination=[domain.contamination for domain in prepared if domain.contamination],
        notes=[note for domain in prepared for note in domain.notes],
        capacity=max_length if packing else None,
    )


def _joined(parts: list[Dataset], capacity: int | None = None) -> TokenRows:
    domains = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    examples = concatenate_datasets(parts)
    return TokenRows(examples, domains, column(examples, "length").astype(np.int64), capacity)


@dataclass
class _Domain:
    """One dataset, tokenised."""

    splits: dict[str, Dataset]
    summary: DomainSummary
    contamination: Contamination | None
    notes: list[str]


@dataclass(frozen=True)
class _Pipeline:
    """What is done to each dataset alike."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    overlong: Overlong
    decontaminated: bool
    skip_bad_rows: bool
    workers: int

    def prepare(self, entry: DatasetEntry, percents: Mapping[str, float], seed: int) -> _Domain:
        """Reads, decontaminates, splits and tokenises one dataset."""
        examples = read_examples(entry, self.template, skip_bad_rows=self.skip_bad_rows)
        check_splits(examples)
        rows, found = examples.rows, None
        if self.decontaminated:
            rows, found = decontaminate(rows, entry.name, workers=self.workers)
        summary = _summary(examples, found)
        domain = _Domain({}, summary, found, [*_skipped_notes(examples), *_contamination_notes(found)])
        for split, percent in percents.items():
            encoded = self._encode(_subset(of_split(rows, split), percent, seed), f"{entry.name} {split}")
            domain.splits[split] = self._fitting(encoded, f"{entry.name} {split}", domain)
        lengths, prompts = (column(domain.splits["train"], name) for name in ("length", "prompt_length"))
        summary.train, summary.validation = len(domain.splits["train"]), len(domain.splits["validation"])
        summary.train_tokens, summary.labelled_tokens = int(lengths.sum()), int((lengths - prompts).sum())
        return domain

    def _encode(self, rows: Dataset, title: str) -> Dataset:
        if not len(rows):
            raise DatasetError(f"{title} has no row left to use; choose other datasets, or a larger part of them")
        key = [rows._fingerprint, _identity(self.tokenizer), self.max_length, self.overlong, code_digest()]
        encode = partial(_encode_batch, self.tokenizer, self.max_length, self.overlong)
        return map_rows(
            rows, encode, Hasher.hash(key), features=_FEATURES, workers=self.workers, title=f"Tokenising {title}"
        )

    def _fitting(self, encoded: Dataset, title: str, domain: _Domain) -> Dataset:
        """Leaves out the examples that were dropped, and says how many."""
        fits = column(encoded, "length") > 0
        if not fits.any():
            raise DatasetError(f"no row of {title} fits --max_seq_length {self.max_length}; raise it")
        dropped, cut = int((~fits).sum()), int(column(encoded, "cut").sum())
        domain.summary.too_long += dropped
        domain.summary.cut += cut
        if dropped or cut:
            counts = f"{dropped:,} dropped (too long), {cut:,} cut at {self.max_length} tokens"
            domain.notes.append(f"{title}: of {len(encoded):,} rows {counts}")
        return encoded.select(np.flatnonzero(fits)) if dropped else encoded


def _encode_batch(
    tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: Overlong, batch: dict[str, Any]
) -> dict[str, Any]:
    return encode_examples(tokenizer, batch["prompt"], batch["response"], max_length, overlong)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer from others; not its own pickle, which changes with what it was used for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (
            f"{type(tokenizer).__name__} {tokenizer.name_or_path} {Hasher.hash(sorted(tokenizer.get_vocab().items()))}"
        )
    state = json.loads(backend.to_str())
    return json.dumps({**state, "truncation": None, "padding": None, "special": tokenizer.special_tokens_map})


def _subset(rows: Dataset, percent: float, seed: int) -> Dataset:
    if percent >= 100 or not len(rows):
        return rows
    count = max(1, round(len(rows) * percent / 100))
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:count])


def _summary(examples: Examples, found: Contamination | None) -> DomainSummary:
    entry = examples.entry
    from_hub = entry.spec.on_hub and not entry.path
    return DomainSummary(
        name=entry.name,
        source=str(entry.path) if entry.path else entry.spec.on_hub or "this machine",
        revision=entry.spec.revision if from_hub else "",
        licence=entry.spec.licence,
        skipped=examples.skipped,
        contaminated=found.dropped if found else 0,
    )


def _contamination_notes(found: Contamination | None) -> list[str]:
    if found is None or not (found.dropped or found.near):
        return []
    kinds = ((found.by_id, "by task id"), (found.by_gram, "by 13-gram"), (found.by_prompt, "by question"))
    why = ", ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    dropped = f"{found.dropped:,} of {found.rows:,} rows dropped as benchmark tasks" + (f" ({why})" if why else "")
    return [f"{found.dataset}: {dropped}; {found.near:,} more share a 10-gram with one and are kept"]


def _skipped_notes(examples: Examples) -> list[str]:
    if not examples.skipped:
        return []
    return [f"{examples.entry.name}: {examples.skipped:,} rows left out; the first: {examples.first_skipped}"]
