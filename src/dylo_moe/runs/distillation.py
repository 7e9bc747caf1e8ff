"""Make one plain LoRA of a saved mixture, and measure what it kept of the mixture's loss."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup, set_seed

from dylo_moe.core import IGNORE_INDEX, DyLoRA_MoE, check_target, token_cross_entropy
from dylo_moe.data import AUTO, TokenCollator, prepare_sample, template_of
from dylo_moe.errors import ExpertError
from dylo_moe.runs.mixtures import load_mixture
from dylo_moe.skills import STUDENT, KeptLoss, add_student, distillation_loss, mean_weights, student_logits

Batches = dict[str, list[dict[str, Tensor]]]
Forward = Callable[[Tensor, Tensor], Tensor]
"""From token ids and attention mask, ``(batch, seq)``, to logits."""

_BATCH_SIZE = 4
_NUM_ROWS = 128


def distill(
    path: Path,
    folder: Path,
    samples: Mapping[str, str],
    steps: int = 60,
    rank: int | None = None,
    base_model: str | None = None,
    *,
    learning_rate: float = 5e-4,
    seed: int = 42,
) -> dict[str, KeptLoss]:
    """Write one LoRA that does about what a mixture does, as a PEFT adapter folder.

    A quarter of each sample is held out, and the losses are measured on it.

    Args:
        path: The mixture.
        folder: Folder of the adapter.
        samples: File of examples of each kind of text, by name.
        steps: Optimizer steps of distillation; 0 for the low-rank copy of the mean update alone.
        rank: Rank of the LoRA; the largest rank of an expert by default.
        base_model: Where the base model is now.
        learning_rate: Peak learning rate.
        seed: Seed of the choice and the order of examples.

    Returns:
        The losses on each kind of text.

    Raises:
        DyLoRAError: The mixture or a sample cannot be read, or the folder cannot be written.
    """
    check_target(folder)
    set_seed(seed)
    model, tokenizer = load_mixture(path, base_model)
    training, held_out = _read(samples, tokenizer, model.prompt_template or AUTO, seed)
    rank = rank or max(model.experts[name].r for name in model.experts.adapters)
    weights = mean_weights(model, training)
    with model.base_only():
        base = _losses(lambda ids, mask: model(ids, mask).logits, held_out, model)
    mixture = _losses(lambda ids, mask: model(ids, mask).logits, held_out, model)
    teachers = [*model.experts.active]
    add_student(model, rank, weights)

    def student(ids: Tensor, mask: Tensor) -> Tensor:
        return student_logits(model, ids, mask)

    start = _losses(student, held_out, model)
    if steps:
        _train(model, teachers, [batch for batches in training.values() for batch in batches], steps, learning_rate)
    end = _losses(student, held_out, model)
    model.experts.export(STUDENT, folder)
    return {name: KeptLoss(base[name], mixture[name], start[name], end[name]) for name in samples}


def _read(
    samples: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, template: str, seed: int
) -> tuple[Batches, Batches]:
    """Return batches to distill on and held-out ones, a quarter of each sample."""
    training, held_out, collate = Batches(), Batches(), TokenCollator(tokenizer.pad_token_id)
    for name, file in samples.items():
        around = template_of(template, tokenizer)
        rows = prepare_sample(f"{name}={file}", tokenizer, _NUM_ROWS, max_length=1024, template=around, seed=seed)
        if len(rows) < 2:
            raise ExpertError(f"the sample {name!r} has {len(rows)} example; distilling and measuring need two or more")
        kept = max(1, len(rows) // 4)
        for batches, part in ((held_out, range(kept)), (training, range(kept, len(rows)))):
            subset: Subset[object] = Subset(rows, part)
            batches[name] = list(DataLoader(subset, batch_size=_BATCH_SIZE, collate_fn=collate))
    return training, held_out


@torch.no_grad()
def _losses(forward: Forward, samples: Batches, model: DyLoRA_MoE) -> dict[str, float]:
    """Return the cross-entropy per labelled token of each sample, in nats."""
    found = {}
    for name, batches in samples.items():
        total, count = 0.0, 0
        for batch in batches:
            ids, mask, labels = _on_device(batch, model)
            total += float(token_cross_entropy(forward(ids, mask), labels).sum())
            count += int((labels[:, 1:] != IGNORE_INDEX).sum())
        found[name] = total / max(1, count)
    return found


def _train(
    model: DyLoRA_MoE, teachers: list[str], batches: Sequence[dict[str, Tensor]], steps: int, learning_rate: float
) -> None:
    """Train the student on the logits of the mixture of the other experts."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    order = torch.randperm(len(batches)).tolist()
    for index in track(list(islice(cycle(order), steps)), description="Distilling"):
        ids, mask, labels = _on_device(batches[index], model)
        model.experts.set_active(teachers)
        with torch.no_grad():
            wanted = model(ids, mask).logits
        model.experts.activate_all()
        loss = distillation_loss(student_logits(model, ids, mask), wanted, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _on_device(batch: dict[str, Tensor], model: DyLoRA_MoE) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
    return ids, mask, labels
