"""Solve the router of a training run from its data, before the first step."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase

from dylo_moe.config import TrainConfig
from dylo_moe.core import DyLoRA_MoE, load_tokenizer
from dylo_moe.data import TokenCollator, TokenRows
from dylo_moe.runs.training_setup import prepare
from dylo_moe.skills import SkillFeatures, cluster_examples, extract_features, route_accuracy, teach_router


def teach(model: DyLoRA_MoE, flags: TrainConfig, console: Console) -> None:
    """Solve the router from a sample of the training rows, as ``--teach_router`` says, and print how right it is.

    Raises:
        DyLoRAError: The data has fewer examples than clusters, or the routing mode reads what experts change.
    """
    args, seed = flags.experts, flags.training.seed
    tokenizer = load_tokenizer(flags.model.model_name, revision=flags.model.revision)
    data = prepare(replace(flags.data, packing=False), tokenizer, seed)
    batch_size = flags.training.eval_batch_size
    features, labels = _sample(model, data.train, tokenizer, args.teach_rows, batch_size, seed)
    if args.num_clusters is not None:
        labels = cluster_examples(features, args.num_clusters, seed)
        teach_router(model, features, labels)
        found, where = route_accuracy(model, features, labels), "the examples that it was solved from"
    else:
        teach_router(model, features, labels)
        held_out = _sample(model, data.validation, tokenizer, args.teach_rows, batch_size, seed)
        found, where = route_accuracy(model, *held_out), "held-out examples"
    console.print(
        f"Solved the router for {len(model.experts)} experts; of {where}, it sends {found.tokens:.1%} of the tokens "
        f"and {found.examples:.1%} of the examples to their expert",
        highlight=False,
        soft_wrap=True,
    )


def _sample(
    model: DyLoRA_MoE, rows: TokenRows, tokenizer: PreTrainedTokenizerBase, per_domain: int, batch_size: int, seed: int
) -> tuple[SkillFeatures, NDArray[np.int64]]:
    """Return the features of a seeded sample of each domain's rows, and their domains."""
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = np.concatenate([order[rows.domains[order] == domain][:per_domain] for domain in np.unique(rows.domains)])
    sample: Subset[object] = Subset(rows, chosen.tolist())
    batches = DataLoader(sample, batch_size=batch_size, collate_fn=TokenCollator(tokenizer.pad_token_id))
    return extract_features(model, batches), rows.domains[chosen]
