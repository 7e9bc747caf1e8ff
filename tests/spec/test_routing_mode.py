"""Routing modes as text and as objects."""

import pytest

from dylo_moe.errors import RoutingError
from dylo_moe.spec.routing_mode import RoutingKind, RoutingMode


@pytest.mark.parametrize(
    ("text", "layers", "wanted", "first"),
    [
        ("final", 12, "final", 0),
        ("per_layer", 12, "per_layer", 0),
        ("prefix:0", 12, "prefix:0", 0),
        ("prefix:11", 12, "prefix:11", 11),
        ("prefix", 12, "prefix:3", 3),
        ("prefix", 3, "prefix:0", 0),
        ("context", 8, "context:2", 2),
    ],
)
def test_modes_are_read_and_written(text: str, layers: int, wanted: str, first: int) -> None:
    mode = RoutingMode.parse(text, layers)
    assert str(mode) == wanted and RoutingMode.parse(wanted) == mode
    assert mode.first_expert_layer == first


@pytest.mark.parametrize(
    ("text", "gates", "layers_read", "frozen", "cached"),
    [
        ("final", 1, [], True, True),
        ("prefix:2", 1, [2], True, False),
        ("context:2", 1, [2], True, True),
        ("per_layer", 4, [0, 1, 2, 3], False, False),
    ],
)
def test_each_mode_says_what_the_router_reads(
    text: str, gates: int, layers_read: list[int], frozen: bool, cached: bool
) -> None:
    mode = RoutingMode.parse(text)
    assert (mode.num_gates(4), list(mode.layers_read(4))) == (gates, layers_read)
    assert (mode.reads_frozen_features, mode.needs_router_cache) == (frozen, cached)


def test_without_a_model_k_is_open() -> None:
    assert RoutingMode.parse("context") == RoutingMode(RoutingKind.CONTEXT)
    assert RoutingMode.parse("prefix:99").layer == 99


@pytest.mark.parametrize("text", ["first", "", "prefix:", "prefix:-1", "prefix:1.5", "final:1", "per_layer:0"])
def test_unknown_modes_are_refused(text: str) -> None:
    with pytest.raises(RoutingError, match=f"^`routing` must be .*, got '{text}'$"):
        RoutingMode.parse(text)


def test_a_k_beyond_the_last_layer_is_refused() -> None:
    with pytest.raises(RoutingError, match="context:K needs K from 0 to 2 for this model, got 'context:3'"):
        RoutingMode.parse("context:3", 3)
