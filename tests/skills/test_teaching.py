"""Routers that are solved before training, from the kind of each example."""

import numpy as np
import pytest
import torch

from dylo_moe.errors import ConfigError, ExpertError, RoutingError
from dylo_moe.skills.acquisition import extract_features
from dylo_moe.skills.teaching import cluster_examples, route_accuracy, teach_router
from tests.skills.test_acquisition import HIGH, LOW, MIDDLE, batches
from tests.support.families import mixture

KINDS = [LOW, MIDDLE, HIGH]
LABELS = np.repeat(np.arange(3), 24)


@pytest.mark.parametrize("routing", ["context:1", "base_context:1", "prefix:1", "final"])
def test_the_gate_sends_other_examples_of_each_kind_to_their_expert(routing: str) -> None:
    model = mixture(routing=routing, dtype=torch.float32)
    teach_router(model, extract_features(model, [one for kind in KINDS for one in batches(*kind)]), LABELS)
    held_out = [one for kind in KINDS for one in batches(*kind, seed=1)]
    found = route_accuracy(model, extract_features(model, held_out), LABELS)
    assert found.examples == 1
    assert found.tokens > 0.8
    chosen = model(**held_out[0]).routing_weights[0].argmax(dim=-1)
    assert chosen[held_out[0]["attention_mask"].bool()].eq(0).float().mean() > 0.8


def test_clusters_find_the_kinds_without_their_labels() -> None:
    pytest.importorskip("sklearn", reason="the extra clusters is not installed")
    model = mixture(routing="context:1", dtype=torch.float32)
    features = extract_features(model, [one for low, _ in KINDS for one in batches(low, low + 2)])
    labels = cluster_examples(features, 3, seed=0)
    for kind in range(3):
        assert len(set(labels[kind == LABELS])) == 1
    assert len(set(labels)) == 3
    teach_router(model, features, labels)
    assert route_accuracy(model, features, labels).examples == 1
    with pytest.raises(ConfigError, match=r"clusters of at most the number of examples \(72\), got 73"):
        cluster_examples(features, 73, seed=0)


def test_a_router_that_cannot_be_solved_is_refused() -> None:
    model = mixture(routing="context:1", dtype=torch.float32)
    features = extract_features(model, batches(*LOW))
    with pytest.raises(ExpertError, match="no example belongs to the expert 'expert_1'"):
        teach_router(model, features, np.zeros(24, dtype=np.int64))
    with pytest.raises(RoutingError, match="`routing` must be context:K"):
        teach_router(mixture(routing="per_layer", dtype=torch.float32), features, np.zeros(24, dtype=np.int64))
