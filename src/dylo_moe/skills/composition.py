"""Make one mixture of adapters that exist: import each, and solve the router from a few examples of each.

Nothing is trained. The gate reads hidden states of the frozen base, which no adapter changes, so that adapters that
were trained apart do not disturb each other's routes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dylo_moe.core import (
    AuxLossWeights,
    DyLoRA_MoE,
    ExpertManager,
    RouterSpec,
    adapter_folder_of,
    build_parts,
    load_base_model,
    portable_name,
    read_config,
)
from dylo_moe.errors import ExpertError
from dylo_moe.skills.acquisition import Batches, extract_features
from dylo_moe.skills.features import check_frozen_features
from dylo_moe.skills.library import SkillLibrary, SkillRecord
from dylo_moe.skills.teaching import best_experts


def base_name_of(adapters: Mapping[str, Path]) -> str:
    """Return the name of the base model that adapters say they were trained on.

    Args:
        adapters: Folder of each adapter, by its name.

    Raises:
        ExpertError: They name different base models, or none.
    """
    bases = {name: str(read_config(folder).get("base_model_name_or_path") or "") for name, folder in adapters.items()}
    if len(set(bases.values())) > 1:
        found = ", ".join(f"{name}: {base or 'none'}" for name, base in bases.items())
        raise ExpertError(
            f"the adapters name different base models ({found}); give theirs as `base_model` if it is one"
        )
    base = next(iter(bases.values()))
    if not base:
        raise ExpertError("the adapters name no base model; give it as `base_model`")
    return base


def mixture_of(
    adapters: Mapping[str, str | Path],
    base_model: str | PreTrainedModel | None = None,
    *,
    routing: str = "base_context",
    top_k: int = 1,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DyLoRA_MoE:
    """Return a mixture whose experts are existing PEFT LoRA adapters of one base model, frozen; its router is random.

    Args:
        adapters: Folder or Hub id of each adapter, by the name that its expert gets.
        base_model: Its Hub id, its folder, or the loaded model; by default what the adapters name.
        routing: Routing mode; one that reads frozen features can be solved by ``learn_routes``. Adapters in all layers
            need ``base_context``.
        top_k: Adapters per token.
        revision: Revision of the base model on the Hub.
        dtype: Floating type of a base model that is loaded here.

    Raises:
        ExpertError: There is no adapter, or one does not fit the base model or cannot be routed.
        CheckpointError: An adapter cannot be fetched.
        ModelError: The base model cannot be loaded.
        RoutingError: The mode does not fit the model.
    """
    if not adapters:
        raise ExpertError("there is no adapter to compose; name at least one")
    folders = {name: adapter_folder_of(path) for name, path in adapters.items()}
    given = base_name_of(folders) if base_model is None else base_model
    base = load_base_model(given, revision=revision, dtype=dtype) if isinstance(given, str) else given
    base_name, revision = portable_name(given, revision)

    def add_experts(experts: ExpertManager) -> None:
        for name, folder in folders.items():
            experts.import_adapter(folder, name)

    parts = build_parts(
        ExpertManager(base),
        len(folders),
        add_experts,
        RouterSpec(routing, min(top_k, len(folders))),
        base_name=base_name,
        revision=revision,
        loss_weights=AuxLossWeights(0.0, 0.0),
    )
    model = DyLoRA_MoE(parts)
    model.experts.freeze(*model.experts.names)
    model.train(False)
    return model


def learn_routes(model: DyLoRA_MoE, library: SkillLibrary, samples: Mapping[str, Batches]) -> None:
    """Learn which tokens each expert gets from examples of its task, and solve the router.

    Args:
        model: Mixture with a routing mode that reads frozen features.
        library: What was learned so far, which is extended; a new one for a new mixture.
        samples: Examples for experts that the library does not know, by the experts' names.

    Raises:
        RoutingError: The router reads what experts change.
        ExpertError: There is no such expert, an expert has no example, or the library knows it.
    """
    check_frozen_features(model.routing_mode)
    model.experts.check_routed(samples)
    for name in samples:
        if name in library.names:
            raise ExpertError(f"the examples of {name!r} were learned already")
    for name in sorted(samples, key=model.experts.names.index):
        features = extract_features(model, samples[name])
        library.gate.learn(features.tokens, model.experts.names.index(name))
        count = len(features.embeddings)
        # the thresholds of novelty need examples that the means were not made of
        reference, held_out = slice(0, max(1, count - count // 4)), slice(min(count - 1, count - count // 4), count)
        library.add(
            SkillRecord(name=name, expert=name, rows=count),
            features.embeddings[reference],
            features.embeddings[held_out],
            features.routed[held_out],
        )
    with torch.no_grad():
        model.router.gates[0][: library.gate.num_experts].copy_(library.gate.weight())
    model.set_maturity()


def is_as_solved(model: DyLoRA_MoE, library: SkillLibrary) -> bool:
    """Return whether the gate still is what ``learn_routes`` solved, and was not trained since."""
    solved = library.gate.weight()
    gate = model.router.gates[0].detach().cpu()[: len(solved)]
    return torch.allclose(gate, solved.to(gate), rtol=1e-4, atol=1e-6)


def routes_of(model: DyLoRA_MoE, batches: Batches) -> dict[str, float]:
    """Return the share of the examples' tokens whose best expert is each one, by name."""
    best = best_experts(model, extract_features(model, batches).tokens)
    shares = torch.bincount(best, minlength=len(model.experts)).double() / len(best)
    return dict(zip(model.experts.names, shares.tolist(), strict=True))
