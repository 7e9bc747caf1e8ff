"""Routing weights in the forms that the layers need."""

import pytest
import torch

from dylo_moe.core.lora.token_weights import TokenWeights, one_hot_weights
from dylo_moe.core.routing.router import select_topk, sparse_weights


def sparse_routing(batch: int, seq: int, count: int, top_k: int, seed: int = 0) -> TokenWeights:
    logits = torch.randn(batch, seq, count, generator=torch.Generator().manual_seed(seed))
    ids = select_topk(logits, top_k)
    return TokenWeights(sparse_weights(logits, ids), ids)


def test_a_single_token_gives_its_experts_and_weights() -> None:
    routing = sparse_routing(1, 1, 5, 2)
    topk = routing.single_token_topk()
    assert topk is not None and {expert for expert, _ in topk} == set(routing.weights.nonzero()[:, -1].tolist())
    assert all(weight == routing.weights[0, 0, expert].item() for expert, weight in topk)
    assert one_hot_weights(3, 5).single_token_topk() == [(3, 1.0)]
    assert one_hot_weights(3, 5).weights.flatten().tolist() == [0, 0, 0, 1, 0]
    assert sparse_routing(2, 1, 5, 2).single_token_topk() is None
    assert TokenWeights(torch.ones(1, 1, 3) / 3).single_token_topk() is None, "dense weights have no top-k experts"


@pytest.mark.parametrize(("ranks", "scalings"), [((3, 3), (2.0, 2.0)), ((3, 3), (2.0, 1.0)), ((1, 4), (0.5, 0.5))])
def test_weights_are_spread_over_ranks_with_their_gradient(ranks: tuple[int, ...], scalings: tuple[float, ...]) -> None:
    weights = torch.rand(2, 5, 2, dtype=torch.float64, requires_grad=True)
    spread = TokenWeights(weights).per_rank(ranks, scalings, torch.float64)
    columns = [weights[..., e] * scalings[e] for e in range(2) for _ in range(ranks[e])]
    wanted = torch.stack(columns, dim=-1)
    torch.testing.assert_close(spread, wanted)
    direction = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(spread, weights, direction)[0], torch.autograd.grad(wanted, weights, direction)[0]
    )
