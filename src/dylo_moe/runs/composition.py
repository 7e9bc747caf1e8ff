"""Read the examples that say what adapters are for, and train a router on them alone."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from dylo_moe.config import ComposeArgs
from dylo_moe.core import DyLoRA_MoE
from dylo_moe.data import TokenCollator, prepare_sample, template_of


class RouteSamples(NamedTuple):
    """Examples of what each adapter is for.

    Attributes:
        batches: Batches with ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, seq)``, by adapter.
        template: Name of the template around their conversations.
        examples: All of them, for training.
        collator: Makes batches of examples.
    """

    batches: dict[str, list[dict[str, Tensor]]]
    template: str
    examples: Dataset[object]
    collator: TokenCollator


def read_route_samples(args: ComposeArgs, tokenizer: PreTrainedTokenizerBase) -> RouteSamples:
    """Read the files of examples that the flags name, at most ``--sample_rows`` of each.

    Raises:
        DatasetError: A file cannot be read, or a row of it cannot be used.
    """
    template, collator = template_of(args.template, tokenizer), TokenCollator(tokenizer.pad_token_id)
    batches, parts = {}, list[Dataset[object]]()
    for name, file in args.samples.items():
        sample = prepare_sample(
            f"{name}={file}",
            tokenizer,
            args.sample_rows,
            max_length=args.max_seq_length,
            template=template,
            seed=args.seed,
        )
        parts.append(sample)
        batches[name] = list(DataLoader(sample, batch_size=args.batch_size, collate_fn=collator))
    return RouteSamples(batches, template.name, ConcatDataset(parts), collator)


def finetune_router(model: DyLoRA_MoE, samples: RouteSamples, args: ComposeArgs) -> None:
    """Train the gate alone on the examples' own loss, as X-LoRA does (Buehler & Buehler 2024, arXiv 2402.07148).

    While training, a token's adapters are mixed densely; afterwards routing is sparse again.
    """
    model.experts.freeze(*model.experts.names)
    model.router.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.finetune_router,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.router_learning_rate,
        lr_scheduler_type="cosine",
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
    )
    Trainer(model, arguments, train_dataset=samples.examples, data_collator=samples.collator).train()
    model.train(False)
