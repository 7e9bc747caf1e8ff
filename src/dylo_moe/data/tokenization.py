"""Tokenization of prompts and examples, the same in training, evaluation and generation."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from datasets import Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

Overlong = Literal["cut", "drop"]
"""Treatment of an example that is too long: cut off the end of its response, or drop the example."""

TOKEN_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "cut": Value("bool"),
    }
)
"""Types of the columns in ``TokenColumns``."""


class TokenColumns(TypedDict):
    """Tokenized examples by column.

    Attributes:
        input_ids: Token ids of each example; empty for a dropped one.
        prompt_length: Number of prompt tokens of each example.
        length: Number of tokens of each example; 0 for a dropped one.
        cut: Whether each example lost the end of its response.
    """

    input_ids: list[list[int]]
    prompt_length: list[int]
    length: list[int]
    cut: list[bool]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a prompt with the special tokens that the tokenizer puts in front of a text."""
    return _encode_prompts(tokenizer, [prompt])[0]


def _encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of many prompts; see ``encode_prompt``."""
    bos = tokenizer.bos_token
    ids: list[list[int]] = tokenizer(list(prompts)).input_ids
    for index, prompt in enumerate(prompts):
        # chat templates write BOS themselves, and the tokenizer would add a second one
        if bos and prompt.startswith(bos):
            ids[index] = tokenizer(prompt, add_special_tokens=False).input_ids
        # some tokenizers append EOS to every text, which would end the prompt
        if ids[index] and ids[index][-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids[index] = ids[index][:-1]
    return ids


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    overlong: Overlong = "cut",
) -> TokenColumns:
    """Return the token ids of examples, each ended by the end-of-text token, which is learned too.

    Prompt and response are tokenized separately, so that the boundary between them is the same in training and in
    generation.

    Args:
        tokenizer: Tokenizer of the base model.
        prompts: Prompts of the examples.
        responses: Responses of the examples, which are learned.
        max_length: Most tokens of an example.
        overlong: ``cut`` to cut off the end of a response that is too long, ``drop`` to drop the example. An example
            whose prompt leaves no room for a response is dropped in either case.
    """
    heads = _encode_prompts(tokenizer, prompts)
    tails: list[list[int]] = tokenizer(list(responses), add_special_tokens=False).input_ids
    columns = TokenColumns(input_ids=[], prompt_length=[], length=[], cut=[])
    for head, tail in zip(heads, tails, strict=True):
        if not tail or tail[-1] != tokenizer.eos_token_id:
            tail = [*tail, tokenizer.eos_token_id]
        too_long = len(head) + len(tail) > max_length
        dropped = len(head) >= max_length or (too_long and overlong == "drop")
        ids = [] if dropped else (head + tail)[:max_length]
        columns["input_ids"].append(ids)
        columns["prompt_length"].append(len(head))
        columns["length"].append(len(ids))
        columns["cut"].append(too_long and not dropped)
    return columns


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: Overlong, batch: Mapping[str, list[str]]
) -> TokenColumns:
    """Return ``encode_examples`` of a batch with the columns ``prompt`` and ``response``."""
    return encode_examples(tokenizer, batch["prompt"], batch["response"], max_length, overlong)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a cache key of a tokenizer; its pickle is not one, since it changes with use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = Hasher.hash(sorted(tokenizer.get_vocab().items()))
        return f"{type(tokenizer).__name__} {tokenizer.name_or_path} {vocabulary}"
    state = json.loads(backend.to_str())
    return json.dumps({**state, "truncation": None, "padding": None, "special": tokenizer.special_tokens_map})
