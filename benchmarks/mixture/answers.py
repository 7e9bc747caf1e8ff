"""Answers that arms write, by their longest common subsequence with the right ones."""

import re
from collections.abc import Sequence

import torch
from rapidfuzz.distance import LCSseq

from benchmarks.mixture.arms import Arm
from benchmarks.mixture.setting import Batch
from benchmarks.mixture.study import Study
from benchmarks.mixture.tasks import Task
from dylo_moe.core import IGNORE_INDEX

PROMPTS, NEW_TOKENS = 8, 40


def generated_answers(study: Study, arm: Arm, tasks: Sequence[Task]) -> dict[str, list[list[float]]]:
    """Return ROUGE-L and whether the answer is exactly right, for a few held-out prompts of each task."""
    return {task.name: _of_task(study, arm, task, index) for index, task in enumerate(tasks)}


def _of_task(study: Study, arm: Arm, task: Task, index: int) -> list[list[float]]:
    batch = study.batches(task, dev=False)[0]
    prompts, answers = split(batch, study.tokenizer.pad_token_id)
    extra = arm.extra(prompts, index)
    with torch.no_grad():
        written = arm.model.generate(
            **prompts, **extra, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=study.tokenizer.pad_token_id
        )
    found = []
    for ids, right in zip(written[:, prompts["input_ids"].shape[1] :], answers, strict=True):
        # both as text, the right answer no longer than what may be written
        pair = [study.tokenizer.decode(one, skip_special_tokens=True).strip() for one in (ids, right[:NEW_TOKENS])]
        found.append([round(rouge_l(*pair), 4), float(pair[0] == pair[1])])
    return found


def split(batch: Batch, pad: int) -> tuple[Batch, list[torch.Tensor]]:
    """Return the prompts of a batch, padded on the left, and the tokens of the answers."""
    prompts, answers = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real, answer = mask > 0, labels != IGNORE_INDEX
        prompts.append(ids[real & ~answer])
        answers.append(ids[answer])
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(one, (longest - len(one), 0), value=pad) for one in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(one)).long() for one in prompts])
    return {"input_ids": ids, "attention_mask": mask}, answers


def rouge_l(written: str, right: str) -> float:
    """Return the F measure of ROUGE-L (Lin 2004): words in common, in order."""
    one, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (written, right))
    if not one or not other:
        return float(written == right)
    return 2 * LCSseq.similarity(one, other) / (len(one) + len(other))
