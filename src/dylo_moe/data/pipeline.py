"""Data pipeline from named datasets to rows of tokens with a loss on the responses alone.

Datasets are read, decontaminated, split, tokenized and packed. Each step caches its output on the disk by the content
of its input. The order of training is in ``mixing.py``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.decontamination import Contamination, decontaminate
from dylo_moe.data.examples import Examples, check_splits, code_digest, column, read_examples, rows_of_split
from dylo_moe.data.map_rows import map_rows
from dylo_moe.data.mixing import MixingSampler
from dylo_moe.data.packing import TokenRows
from dylo_moe.data.registry import DatasetEntry, resolve
from dylo_moe.data.templates import PlainTemplate, Template
from dylo_moe.data.tokenization import TOKEN_FEATURES, Overlong, encode_batch, tokenizer_identity
from dylo_moe.errors import DatasetError


@dataclass
class DomainSummary:
    """Source of one dataset and the numbers of its rows and tokens.

    Attributes:
        name: Name of the dataset.
        source: Hub id or path, or "this machine" for a local dataset.
        revision: Revision on the Hub, or "".
        licence: License as the dataset's page states it.
        skipped: Number of rows left out because they have no response or cannot be used.
        contaminated: Number of rows dropped because they are benchmark tasks.
        train: Number of training rows.
        validation: Number of held-out rows.
        too_long: Number of rows dropped because the prompt, or with ``overlong="drop"`` the example, is too long.
        cut: Number of rows that lost the end of their response.
        train_tokens: Number of training tokens.
        labelled_tokens: Number of training tokens with a loss.
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
        train: Training rows, packed or not.
        validation: Held-out rows of all domains, one example each.
        domains: Name of each domain, by the number that a row has as ``domain``.
        template: Prompt template of conversations.
        summaries: Summary of each domain.
        contamination: Benchmark tasks found in each domain; empty without decontamination.
        notes: Lines to show to the user.
        capacity: Most tokens of a packed row; None without packing.
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
        """Fraction of the packed rows that is tokens and not padding; None without packing."""
        return None if self.capacity is None else float(self.train.lengths.mean() / self.capacity)

    def sampler(
        self, *, temperature: float = 1.0, seed: int = 0, batch_size: int = 1, processes: int = 1
    ) -> MixingSampler:
        """Return the sampler of the training rows, which batches rows of similar length unless they are packed."""
        lengths = None if self.train.packed else self.train.lengths
        return MixingSampler(
            self.train.domains,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            processes=processes,
            lengths=lengths,
        )

    def identity(self, **order: object) -> str:
        """Return the SHA-256 of the training rows and of the parameters of their order, which JSON must hold."""
        key = json.dumps([self.train.digest(), self.capacity, order], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()

    def record(self) -> dict[str, object]:
        """Return the part of a run's report that describes its data, for JSON."""
        return {
            "template": self.template.name,
            "datasets": [asdict(summary) for summary in self.summaries],
            "contamination": [asdict(found) for found in self.contamination],
            "packing_efficiency": self.packing_efficiency,
        }


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
    """Read, decontaminate, split, tokenize and pack datasets.

    Args:
        names: Datasets of the registry, or ``name=path``.
        tokenizer: Tokenizer of the base model.
        max_length: Most tokens of an example and, with ``packing``, of a row.
        training_percent: Percentage of the training rows to use, chosen at random by ``seed``.
        validation_percent: Percentage of the held-out rows to use.
        packing: Whether to join training examples into full rows.
        overlong: Treatment of longer examples; see ``tokenization.encode_examples``.
        template: Prompt template of conversations; the plain one by default.
        data_dir: Folder with files or with a ``datasets`` cache.
        decontaminated: Whether to drop rows that are benchmark tasks.
        skip_bad_rows: Whether to leave out rows that cannot be used instead of raising an error.
        workers: Number of processes that tokenize and compare rows.
        seed: Seed of the choice of rows; the splits do not depend on it.

    Raises:
        DatasetError: A dataset is unknown, unreachable or empty, a row of it cannot be used, or none fits
            ``max_length``.
    """
    template = template or PlainTemplate()
    pipeline = _Pipeline(tokenizer, template, max_length, overlong, decontaminated, skip_bad_rows, workers)
    percents = {"train": training_percent, "validation": validation_percent}
    prepared = [pipeline.prepare(entry, percents, seed) for entry in [resolve(name, data_dir) for name in names]]
    return PreparedData(
        train=_build_token_rows([domain.splits["train"] for domain in prepared], max_length if packing else None),
        validation=_build_token_rows([domain.splits["validation"] for domain in prepared]),
        domains=[domain.summary.name for domain in prepared],
        template=template,
        summaries=[domain.summary for domain in prepared],
        contamination=[domain.contamination for domain in prepared if domain.contamination],
        notes=[note for domain in prepared for note in domain.notes],
        capacity=max_length if packing else None,
    )


def prepare_sample(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    *,
    max_length: int,
    template: Template | None = None,
    data_dir: str | Path | None = None,
    seed: int = 42,
) -> TokenRows:
    """Read and tokenize some rows of a dataset, whatever split they are in; not decontaminated.

    Args:
        name: Dataset of the registry, or ``name=path``.
        tokenizer: Tokenizer of the base model.
        num_rows: Number of rows to choose at random by ``seed``; all if there are fewer.
        max_length: Most tokens of an example; longer ones are cut.
        template: Prompt template of conversations; the plain one by default.
        data_dir: Folder with files or with a ``datasets`` cache.
        seed: Seed of the choice.

    Raises:
        DatasetError: The dataset is unknown, unreachable or empty, or a row of it cannot be used.
    """
    template = template or PlainTemplate()
    rows = read_examples(resolve(name, data_dir), template).rows
    chosen = rows.select(np.random.default_rng(seed).permutation(len(rows))[:num_rows])
    return _build_token_rows([_Pipeline(tokenizer, template, max_length, "cut", False, False, 1).encode(chosen, name)])


def _build_token_rows(parts: list[Dataset], capacity: int | None = None) -> TokenRows:
    domains = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    examples = concatenate_datasets(parts)
    return TokenRows(examples, domains, column(examples, "length"), capacity)


@dataclass
class _Domain:
    """Tokenized splits of one dataset."""

    splits: dict[str, Dataset]
    summary: DomainSummary
    contamination: Contamination | None
    notes: list[str]


@dataclass(frozen=True)
class _Pipeline:
    """Settings of the preparation, which are the same for all datasets."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    overlong: Overlong
    decontaminated: bool
    skip_bad_rows: bool
    workers: int

    def prepare(self, entry: DatasetEntry, percents: Mapping[str, float], seed: int) -> _Domain:
        """Read, decontaminate, split and tokenize one dataset."""
        examples = read_examples(entry, self.template, skip_bad_rows=self.skip_bad_rows)
        check_splits(examples)
        rows, found = examples.rows, None
        if self.decontaminated:
            rows, found = decontaminate(rows, entry.name, workers=self.workers)
        summary = _summary(examples, found)
        domain = _Domain({}, summary, found, [])
        if examples.skipped:
            domain.notes.append(
                f"{entry.name}: {examples.skipped:,} rows left out; the first: {examples.first_skipped}"
            )
        domain.notes += _contamination_notes(found)
        for split, percent in percents.items():
            chosen = rows_of_split(rows, split)
            if percent < 100 and len(chosen):
                count = max(1, round(len(chosen) * percent / 100))
                chosen = chosen.select(np.random.default_rng(seed).permutation(len(chosen))[:count])
            encoded = self.encode(chosen, f"{entry.name} {split}")
            domain.splits[split] = self._fitting(encoded, f"{entry.name} {split}", domain)
        lengths, prompts = (column(domain.splits["train"], name) for name in ("length", "prompt_length"))
        summary.train, summary.validation = len(domain.splits["train"]), len(domain.splits["validation"])
        summary.train_tokens, summary.labelled_tokens = int(lengths.sum()), int((lengths - prompts).sum())
        return domain

    def encode(self, rows: Dataset, title: str) -> Dataset:
        """Tokenize examples."""
        if not len(rows):
            raise DatasetError(f"{title} has no row left to use; choose other datasets, or a larger part of them")
        key = [rows._fingerprint, tokenizer_identity(self.tokenizer), self.max_length, self.overlong, code_digest()]
        return map_rows(
            rows,
            partial(encode_batch, self.tokenizer, self.max_length, self.overlong),
            Hasher.hash(key),
            features=TOKEN_FEATURES,
            workers=self.workers,
            title=f"Tokenizing {title}",
        )

    def _fitting(self, encoded: Dataset, title: str, domain: _Domain) -> Dataset:
        """Return the examples that were not dropped, and count the others in the domain's summary and notes."""
        fits = column(encoded, "length") > 0
        if not fits.any():
            raise DatasetError(f"no row of {title} fits `max_seq_length` {self.max_length}; raise it")
        dropped, cut = int((~fits).sum()), int(column(encoded, "cut").sum())
        domain.summary.too_long += dropped
        domain.summary.cut += cut
        if dropped or cut:
            counts = f"{dropped:,} dropped (too long), {cut:,} cut at {self.max_length} tokens"
            domain.notes.append(f"{title}: of {len(encoded):,} rows {counts}")
        return encoded.select(np.flatnonzero(fits)) if dropped else encoded


def _summary(examples: Examples, found: Contamination | None) -> DomainSummary:
    entry = examples.entry
    from_hub = entry.spec.on_hub and not entry.path
    return DomainSummary(
        name=entry.name,
        source=str(entry.path) if entry.path else entry.spec.on_hub or "this machine",
        revision=entry.spec.revision if from_hub else "",
        licence=entry.spec.license,
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
