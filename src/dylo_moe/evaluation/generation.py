"""Samples of code from the model that is handed over, and from no other: in batches, with the key-value cache.

Prompts of similar length share a batch, padded on the left. A sample stops at an end token or a stop string. Sampling
draws with a generator of the sample's own, so that neither the batch that it is in nor what was sampled before it
moves it; what remains is the rounding of a matrix product of another shape, which can turn a near tie.

Covered: greedy, sampling with a temperature, beams; mixtures and plain causal LMs. Not covered: judging.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import LongTensor, Tensor
from transformers import (
    Cache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from dylo_moe.core.caches import CACHE_NAME
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.errors import ConfigError

Model = DyLoRA_MoE | PreTrainedModel


@dataclass(frozen=True)
class GenerationSettings:
    """How to sample.

    Attributes:
        max_new_tokens: Most tokens of a sample.
        temperature: Divides the logits; 0 takes the likeliest token.
        num_beams: Beams of a beam search; 1 for none.
        n_samples: Samples for each prompt.
        batch_size: Samples in one batch.
        seed: Seed of all samples.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    num_beams: int = 1
    n_samples: int = 1
    batch_size: int = 16
    seed: int = 42


class Prompt(NamedTuple):
    """What the model goes on from.

    Attributes:
        task_id: The task's.
        text: As the model sees it.
        ids: Its tokens.
        stops: Texts at which a completion ends, and which are no part of it.
    """

    task_id: str
    text: str
    ids: Sequence[int]
    stops: tuple[str, ...]


class Sample(BaseModel):
    """What the model went on with.

    Attributes:
        task_id: The task's.
        index: Which of the task's samples.
        completion: The text after the prompt, up to an end token, a stop string or the limit.
        tokens: How many tokens were generated for it, with the one that ended it.
        ended: Whether it ended by itself, and not at the limit.
    """

    task_id: str
    index: int
    completion: str
    tokens: int
    ended: bool


def batches_of(
    prompts: Sequence[Prompt], settings: GenerationSettings, done: set[tuple[str, int]]
) -> list[list[tuple[Prompt, int]]]:
    """Prompts and sample numbers that are still to do, the longest first, in batches of equal stop strings."""
    pending = [
        (prompt, index)
        for prompt in prompts
        for index in range(settings.n_samples)
        if (prompt.task_id, index) not in done
    ]
    # the longest first: a batch that does not fit into memory fails at once
    pending.sort(key=lambda entry: (entry[0].stops, -len(entry[0].ids), entry[0].task_id, entry[1]))
    batches: list[list[tuple[Prompt, int]]] = []
    for entry in pending:
        if batches and len(batches[-1]) < settings.batch_size and batches[-1][0][0].stops == entry[0].stops:
            batches[-1].append(entry)
        else:
            batches.append([entry])
    return batches


def check_lengths(model: Model, prompts: Sequence[Prompt], settings: GenerationSettings) -> None:
    """Raises ConfigError where a prompt and its completion would not fit into the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if positions is not None and len(longest.ids) + settings.max_new_tokens > positions:
        raise ConfigError(
            f"--max_new_tokens must be at most {positions - len(longest.ids)}, got {settings.max_new_tokens}: the "
            f"model has {positions} positions, and the prompt of {longest.task_id} takes {len(longest.ids)}"
        )


def generate_samples(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[tuple[Prompt, int]]],
    settings: GenerationSettings,
) -> Iterator[list[Sample]]:
    """Yields the samples of one batch after the other, all of them from ``model`` as it is.

    The model is in evaluation mode while a batch runs, and afterwards in the mode that it was in. No global random
    state is read or changed.

    Args:
        model: A mixture or a plain causal LM.
        tokenizer: The model's.
        batches: From ``batches_of``.
        settings: How to sample.
    """
    # made once: it compares each stop string with the whole vocabulary, which takes seconds
    known = {stops: StopStringCriteria(tokenizer, list(stops)) for stops in {batch[0][0].stops for batch in batches}}
    for batch in batches:
        with _evaluating(model):
            rows = _continued(model, tokenizer, batch, settings, known[batch[0][0].stops])
        yield [
            _sample(tokenizer, prompt, index, row, _end_tokens(model, tokenizer))
            for (prompt, index), row in zip(batch, rows, strict=True)
        ]


def _continued(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Prompt, int]],
    settings: GenerationSettings,
    stops: StopStringCriteria,
) -> list[list[int]]:
    """The tokens after each prompt, generated a stretch at a time: rows that have ended leave the batch in between.

    Few answers are as long as the longest, and a row that has ended would cost as much as one that has not.
    """
    ids, mask = (tensor.to(model.device) for tensor in _padded(batch, int(tokenizer.pad_token_id or 0)))
    width, cache = ids.shape[1], None
    ends = _end_tokens(model, tokenizer)
    rows, unfinished = list(range(len(batch))), set(range(len(batch)))
    found: list[list[int]] = [[] for _ in batch]
    while unfinished and (left := settings.max_new_tokens - (ids.shape[1] - width)):
        here = [batch[row] for row in rows]
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            # a beam search cannot be continued
            max_new_tokens=min(_STRETCH, left) if settings.num_beams == 1 else left,
            num_beams=settings.num_beams,
            # what is sampled is drawn by the processor; the likeliest is then what was drawn
            do_sample=False,
            logits_processor=LogitsProcessorList([_OwnDraws(here, settings, width)] if settings.temperature else []),
            stopping_criteria=StoppingCriteriaList([_StopAfterPrompt(stops, width)]),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            return_dict_in_generate=True,
            **{CACHE_NAME: cache},
            **_NEUTRAL,
        )
        for row, tokens in zip(rows, output.sequences[:, width:].tolist(), strict=True):
            if row in unfinished:
                found[row] = tokens
                if _sample(tokenizer, *batch[row], tokens, ends).ended:
                    unfinished.remove(row)
        ids, cache = output.sequences, output[CACHE_NAME]
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
        if _can_drop(cache) and len(unfinished) < len(rows):
            keep = torch.tensor([place for place, row in enumerate(rows) if row in unfinished], device=ids.device)
            rows = [row for row in rows if row in unfinished]
            if rows:
                ids, mask = ids[keep], mask[keep]
                cache.batch_select_indices(keep)
    return found


def _can_drop(cache: Any) -> bool:
    """Whether rows can leave a cache: not where a model keeps a state in the place of keys and values."""
    return isinstance(cache, Cache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


_STRETCH = 32
"""Tokens between two looks at which rows have ended."""

_NEUTRAL: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Models bring defaults of their own for chatting; a benchmark must not depend on those."""


def _padded(batch: Sequence[tuple[Prompt, int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, ``(batch, longest prompt)``, int64, padded on the left."""
    width = max(len(prompt.ids) for prompt, _ in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(batch):
        start = width - len(prompt.ids)
        ids[row, start:] = torch.tensor(prompt.ids)
        mask[row, start:] = 1
    return ids, mask


def _end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's own end tokens (a chat model may have several) and the tokenizer's."""
    causal_lm = model.experts.base_model if isinstance(model, DyLoRA_MoE) else model
    own = causal_lm.generation_config.eos_token_id if causal_lm.generation_config else None
    known = [own] if isinstance(own, int) else list(own or [])
    return sorted({*known, int(tokenizer.eos_token_id)})


def _sample(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int, generated: list[int], ends: Sequence[int]
) -> Sample:
    over = {*ends, tokenizer.pad_token_id}
    length = next((place for place, token in enumerate(generated) if token in over), len(generated))
    # with the prompt, since a tokenizer may drop the space that a text begins with
    whole = _text(tokenizer, [*prompt.ids, *generated[:length]])
    completion = whole[len(_text(tokenizer, prompt.ids)) :]
    places = [place for place in (completion.find(stop) for stop in prompt.stops) if place >= 0]
    # behind a stop string comes padding, which was not generated
    end_token = not places and length < len(generated)
    return Sample(
        task_id=prompt.task_id,
        index=index,
        completion=completion[: min(places)] if places else completion,
        tokens=length + end_token,
        ended=bool(places) or end_token,
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _StopAfterPrompt(StoppingCriteria):
    """Looks for stop strings in what was generated alone: the prompt may hold one, or begin one."""

    def __init__(self, stops: StopStringCriteria, width: int) -> None:
        self._stops, self._width = stops, width

    @override
    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Any:
        return self._stops(input_ids[:, self._width :], scores, **kwargs)


class _OwnDraws(LogitsProcessor):
    """Draws each row's next token with the row's own generator, and leaves no other token a chance.

    The draw is where the cumulative distribution passes a number from the generator: one number a token.
    """

    def __init__(self, batch: Sequence[tuple[Prompt, int]], settings: GenerationSettings, width: int) -> None:
        self._width, self._temperature = width, settings.temperature
        self._numbers = torch.stack(
            [
                torch.rand(
                    settings.max_new_tokens,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(_seed(settings.seed, prompt.task_id, index)),
                )
                for prompt, index in batch
            ]
        )

    @override
    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Any:
        step = input_ids.shape[1] - self._width
        # float64 is not on every accelerator, and rounding the sum of a large vocabulary matters
        reached = (scores.cpu().double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        number = self._numbers[:, step : step + 1] * reached[:, -1:]
        token = torch.searchsorted(reached, number, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)


def _seed(seed: int, task_id: str, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}/{index}".encode()).digest()[:8], "little") >> 1


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode for a block of code, then each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
