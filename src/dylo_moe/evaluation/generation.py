"""Samples code from the given model and no other, in batches, with the key-value cache.

Prompts of similar length share a batch, padded on the left. A sample stops at an end token or a stop string. Each
sample is drawn with its own random generator, so that it depends neither on its batch nor on earlier samples, except
through the rounding of matrix products of another shape, which can change the order of nearly equal logits.

Covered: greedy, sampling with a temperature, beams; mixtures and plain causal LMs. Not covered: judging.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
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

from dylo_moe.core import CACHE_NAME, DyLoRA_MoE, evaluating
from dylo_moe.errors import ConfigError

Model = DyLoRA_MoE | PreTrainedModel


class SamplingSettings(BaseModel):
    """Settings that samples depend on.

    Attributes:
        max_new_tokens: Maximum number of tokens of a sample.
        temperature: Divisor of the logits; 0 takes the most likely token.
        num_beams: Number of beams of a beam search; 1 for none.
        n_samples: Number of samples for each prompt.
        seed: Seed of all samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = 512
    temperature: float = 0.0
    num_beams: int = 1
    n_samples: int = 1
    seed: int = 42


class GenerationSettings(SamplingSettings):
    """Settings of the samples, and how they are computed.

    Attributes:
        batch_size: Number of samples in one batch.
    """

    batch_size: int = 16

    def sampling(self) -> SamplingSettings:
        """Return the settings that samples depend on: all but the batch size."""
        return SamplingSettings(**self.model_dump(exclude={"batch_size"}))


class Prompt(NamedTuple):
    """Text for the model to continue.

    Attributes:
        task_id: Name of the task.
        text: The text itself.
        ids: Token ids of the text.
        stops: Strings at which a completion ends; they are not part of it.
    """

    task_id: str
    text: str
    ids: Sequence[int]
    stops: tuple[str, ...]


class Sample(BaseModel):
    """One completion of a prompt.

    Attributes:
        task_id: Name of the task.
        index: Number of the sample among those of its task.
        completion: Text after the prompt, up to an end token, a stop string or the limit.
        tokens: Number of generated tokens, including the one that ended the completion.
        ended: Whether it ended before the limit.
    """

    task_id: str
    index: int
    completion: str
    tokens: int
    ended: bool


def make_batches(
    prompts: Sequence[Prompt], settings: GenerationSettings, done: set[tuple[str, int]]
) -> list[list[tuple[Prompt, int]]]:
    """Return batches of prompts with sample numbers, each batch with the same stop strings, the longest prompts first.

    Args:
        prompts: All prompts.
        settings: Number of samples for each prompt, and batch size.
        done: Tasks and sample numbers to leave out.
    """
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
    """Check that each prompt and its completion fit into the model's positions.

    Raises:
        ConfigError: The longest prompt leaves fewer than ``max_new_tokens`` positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if positions is not None and len(longest.ids) + settings.max_new_tokens > positions:
        raise ConfigError(
            f"`max_new_tokens` must be at most {positions - len(longest.ids)}, got {settings.max_new_tokens}: the "
            f"model has {positions} positions, and the prompt of {longest.task_id} takes {len(longest.ids)}"
        )


def generate_samples(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[tuple[Prompt, int]]],
    settings: GenerationSettings,
) -> Iterator[list[Sample]]:
    """Yield the samples of one batch after the other.

    The model is in evaluation mode while a batch runs, and in its earlier mode between batches. No global random
    state is read or changed.

    Args:
        model: A mixture or a plain causal LM.
        tokenizer: Tokenizer of the model.
        batches: Batches from ``make_batches``.
        settings: How to sample.
    """
    # made once: it compares each stop string with the whole vocabulary, which takes seconds
    criteria = {stops: StopStringCriteria(tokenizer, list(stops)) for stops in {batch[0][0].stops for batch in batches}}
    for batch in batches:
        with evaluating(model):
            rows = _generate_batch(model, tokenizer, batch, settings, criteria[batch[0][0].stops])
        end_tokens = _end_tokens(model, tokenizer)
        yield [
            _to_sample(tokenizer, prompt, index, row, end_tokens)
            for (prompt, index), row in zip(batch, rows, strict=True)
        ]


def _generate_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Prompt, int]],
    settings: GenerationSettings,
    stops: StopStringCriteria,
) -> list[list[int]]:
    """Return the tokens after each prompt.

    Generates a few tokens at a time and removes finished rows in between: few answers are as long as the longest, and
    a finished row would cost as much as an unfinished one.
    """
    ids, mask = (tensor.to(model.device) for tensor in _pad_left(batch, int(tokenizer.pad_token_id or 0)))
    width, cache = ids.shape[1], None
    end_tokens = _end_tokens(model, tokenizer)
    rows, unfinished = list(range(len(batch))), set(range(len(batch)))
    generated: list[list[int]] = [[] for _ in batch]
    while unfinished and (left := settings.max_new_tokens - (ids.shape[1] - width)):
        draws = [_PerSampleRNG([batch[row] for row in rows], settings, width)] if settings.temperature else []
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            # a beam search cannot be continued
            max_new_tokens=min(_STRETCH, left) if settings.num_beams == 1 else left,
            num_beams=settings.num_beams,
            # _PerSampleRNG samples and masks every other token, so greedy search returns the sample
            do_sample=False,
            logits_processor=LogitsProcessorList(draws),
            stopping_criteria=StoppingCriteriaList([_StopAfterPrompt(stops, width)]),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens,
            return_dict_in_generate=True,
            **{CACHE_NAME: cache},
            **_NEUTRAL,
        )
        for row, tokens in zip(rows, output.sequences[:, width:].tolist(), strict=True):
            if row in unfinished:
                generated[row] = tokens
                if _to_sample(tokenizer, *batch[row], tokens, end_tokens).ended:
                    unfinished.remove(row)
        ids, cache = output.sequences, output[CACHE_NAME]
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
        if _can_drop_rows(cache) and len(unfinished) < len(rows):
            keep = torch.tensor([place for place, row in enumerate(rows) if row in unfinished], device=ids.device)
            rows = [row for row in rows if row in unfinished]
            if rows:
                ids, mask = ids[keep], mask[keep]
                cache.batch_select_indices(keep)
    return generated


def _can_drop_rows(cache: object) -> bool:
    """Return whether rows can be removed from a cache: not if a layer keeps a state instead of keys and values."""
    return isinstance(cache, Cache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


_STRETCH = 32
"""Number of tokens generated before finished rows are removed."""

_NEUTRAL: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Override the model's own defaults, which are made for chats; a benchmark must not depend on them."""


def _pad_left(batch: Sequence[tuple[Prompt, int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, ``(batch, longest prompt)``, int64, padded on the left."""
    width = max(len(prompt.ids) for prompt, _ in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(batch):
        start = width - len(prompt.ids)
        ids[row, start:] = torch.tensor(prompt.ids)
        mask[row, start:] = 1
    return ids, mask


def _end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens of the model (a chat model may have several) and of the tokenizer."""
    causal_lm = model.experts.base_model if isinstance(model, DyLoRA_MoE) else model
    own = causal_lm.generation_config.eos_token_id if causal_lm.generation_config else None
    known = [own] if isinstance(own, int) else list(own or [])
    return sorted({*known, int(tokenizer.eos_token_id)})


def _to_sample(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int, generated: list[int], end_tokens: Sequence[int]
) -> Sample:
    final = {*end_tokens, tokenizer.pad_token_id}
    length = next((place for place, token in enumerate(generated) if token in final), len(generated))
    # decoded with the prompt, since a tokenizer may drop the space at the start of a text
    whole = _decode(tokenizer, [*prompt.ids, *generated[:length]])
    completion = whole[len(_decode(tokenizer, prompt.ids)) :]
    places = [place for place in (completion.find(stop) for stop in prompt.stops) if place >= 0]
    # after a stop string, the first final token is padding, which was not generated
    end_token = not places and length < len(generated)
    return Sample(
        task_id=prompt.task_id,
        index=index,
        completion=completion[: min(places)] if places else completion,
        tokens=length + end_token,
        ended=bool(places) or end_token,
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _StopAfterPrompt(StoppingCriteria):
    """Stop strings, looked for in the generated text only: the prompt may contain one, or the start of one."""

    def __init__(self, stops: StopStringCriteria, width: int) -> None:
        self._stops, self._width = stops, width

    @override
    def __call__(self, input_ids: LongTensor, scores: Tensor, **kwargs: object) -> Tensor:
        stopped: Tensor = self._stops(input_ids[:, self._width :], scores, **kwargs)
        return stopped


class _PerSampleRNG(LogitsProcessor):
    """Logits processor that draws each row's next token with the row's own generator, and masks all other tokens.

    The draw is inverse transform sampling: the token at which the cumulative distribution passes a uniform number, one
    number a token.

    Args:
        batch: Prompts and sample numbers, one a row.
        settings: Temperature, seed and length.
        width: Length of the padded prompts.
    """

    def __init__(self, batch: Sequence[tuple[Prompt, int]], settings: GenerationSettings, width: int) -> None:
        self._width, self._temperature = width, settings.temperature
        numbers = []
        for prompt, index in batch:
            digest = hashlib.sha256(f"{settings.seed}/{prompt.task_id}/{index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            numbers.append(torch.rand(settings.max_new_tokens, dtype=torch.float64, generator=generator))
        self._numbers = torch.stack(numbers)

    @override
    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._width
        # on the CPU: not every accelerator has float64, and the sum over a large vocabulary must not be rounded
        cumulative = (scores.cpu().double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        number = self._numbers[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, number, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)
