"""Teach a router which expert a kind of text belongs to, before the experts are trained.

The kinds are the datasets that the examples come from, or clusters of examples. The gate is solved in closed form from
features that no expert changes, so it stays right while the experts train.
"""

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dylo_moe.core import DyLoRA_MoE
from dylo_moe.errors import ConfigError, ExpertError
from dylo_moe.skills.acquisition import SkillFeatures
from dylo_moe.skills.features import check_frozen_features
from dylo_moe.skills.ridge_gate import RidgeGate

Labels = NDArray[np.int64]
"""The kind of each example, an index into the model's experts: ``(examples,)``."""


class RouteAccuracy(NamedTuple):
    """Share of what a gate sends to the right expert.

    Attributes:
        tokens: Share of the tokens.
        examples: Share of the examples, each routed by the mean of its features.
    """

    tokens: float
    examples: float


def check_clustering() -> None:
    """Raise ``ConfigError`` unless scikit-learn is installed, which finds clusters."""
    if find_spec("sklearn") is None:
        raise ConfigError(
            "`teach_router` clusters needs scikit-learn, which is not installed: pip install 'dylora-moe[clusters]'"
        )


def cluster_examples(features: SkillFeatures, num_clusters: int, seed: int) -> Labels:
    """Return the k-means cluster of each example, by the mean of what the router reads at its tokens.

    Raises:
        ConfigError: There are fewer examples than clusters, or scikit-learn is not installed.
    """
    check_clustering()
    from sklearn.cluster import KMeans

    count = len(features.routed)
    if num_clusters > count:
        raise ConfigError(
            f"`teach_router` must be clusters of at most the number of examples ({count}), got {num_clusters}"
        )
    found: Labels = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(features.routed.numpy())
    return found.astype(np.int64)


def teach_router(model: DyLoRA_MoE, features: SkillFeatures, labels: Labels) -> None:
    """Solve the gate of a model from examples of each expert, and make all experts mature, so that routing is sparse.

    Args:
        model: Model with a routing mode that reads frozen features.
        features: Features of the examples in the base; see ``extract_features``.
        labels: The expert of each example.

    Raises:
        RoutingError: The router reads what experts change.
        ExpertError: An expert has no example.
    """
    check_frozen_features(model.routing_mode)
    gate, of_token = RidgeGate(model.router.hidden_size), torch.from_numpy(labels)[features.example]
    for index, name in enumerate(model.experts.names):
        tokens = features.tokens[of_token == index]
        if not len(tokens):
            raise ExpertError(f"no example belongs to the expert {name!r}; teach the router with fewer experts")
        gate.learn(tokens, index)
    with torch.no_grad():
        model.router.gates[0].copy_(gate.weight())
    model.set_maturity()


def best_experts(model: DyLoRA_MoE, features: Tensor) -> Tensor:
    """Return the expert that the gate prefers for each feature: from ``(n, hidden_size)`` to ``(n,)``, on the CPU."""
    gate: Tensor = model.router.gates[0].detach().cpu().to(features)
    return (features @ gate.T).argmax(dim=-1)


def route_accuracy(model: DyLoRA_MoE, features: SkillFeatures, labels: Labels) -> RouteAccuracy:
    """Return how often the gate of a model prefers the right expert."""
    wanted = torch.from_numpy(labels)
    tokens = best_experts(model, features.tokens) == wanted[features.example]
    examples = best_experts(model, features.routed) == wanted
    return RouteAccuracy(float(tokens.double().mean()), float(examples.double().mean()))
