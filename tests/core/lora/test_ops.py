"""Every path of the mixture against one token and one expert after the other, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.core.lora.ops import (
    add_lora_single_token,
    addmm_lora,
    has_sparse_kernel,
    prefer_sparse,
    sparse_down,
    sparse_up,
)
from dylo_moe.core.lora.token_weights import TokenWeights
from dylo_moe.core.routing.router import select_topk, sparse_weights
from tests.support.families import relative_error

IN, OUT = 24, 40
TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]
"""Relative errors allowed; in bfloat16 two products of inputs with 8 significant bits, and a rounded sum of them."""
GROUPED = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")


def experts(count: int, ranks: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], tuple[float, ...]]:
    generator = torch.Generator().manual_seed(count)
    lora_a = [torch.randn(rank, IN, generator=generator).to(dtype) for rank in ranks]
    lora_b = [torch.randn(OUT, rank, generator=generator).to(dtype) for rank in ranks]
    return lora_a, lora_b, tuple(0.5 + index / count for index in range(count))


def sparse_routing(batch: int, seq: int, count: int, top_k: int, seed: int = 0) -> TokenWeights:
    logits = torch.randn(batch, seq, count, generator=torch.Generator().manual_seed(seed))
    ids = select_topk(logits, top_k)
    return TokenWeights(sparse_weights(logits, ids), ids)


def loop(x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], scalings: tuple[float, ...], weights: Tensor) -> Tensor:
    rows = []
    for token, row in zip(x.flatten(0, 1).double(), weights.flatten(0, 1).double(), strict=True):
        parts = [
            w * s * (b.double() @ (a.double() @ token))
            for w, s, a, b in zip(row, scalings, lora_a, lora_b, strict=True)
        ]
        rows.append(torch.stack(parts).sum(dim=0))
    return torch.stack(rows).view(*x.shape[:-1], OUT)


def sparse_delta(
    x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], scalings: tuple[float, ...], routing: TokenWeights
) -> Tensor:
    """Down and up again, for one layer."""
    return sparse_up(sparse_down(x, lora_a, scalings, routing)[:, 0], lora_b, routing).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("even", [True, False], ids=["even ranks", "uneven ranks"])
@pytest.mark.parametrize(
    ("shape", "grouped"), [pytest.param((3, 11), True, marks=GROUPED), ((2, 1), False), ((1, 2), False)]
)
def test_the_sparse_paths_equal_the_loop(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    grouped: bool,
    even: bool,
    top_k: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    count = 13
    ranks = [8] * count if even else [8 if index % 3 else 16 for index in range(count)]
    lora_a, lora_b, scalings = experts(count, ranks, dtype)
    routing = sparse_routing(*shape, count, top_k)
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls: list[object] = []
    if grouped:
        real = F.grouped_mm
        monkeypatch.setattr(F, "grouped_mm", lambda *args, **options: calls.append(args) or real(*args, **options))
    with torch.no_grad():
        assert has_sparse_kernel(lora_a, lora_b, routing)
        got = sparse_delta(x, lora_a, lora_b, scalings, routing)
    assert len(calls) == (2 if grouped else 0) and got.dtype == dtype
    assert relative_error(got.double(), loop(x, lora_a, lora_b, scalings, routing.weights)) < tolerance


@pytest.mark.parametrize("shape", [pytest.param((3, 11), marks=GROUPED), (2, 1)])
@pytest.mark.parametrize("even", [True, False], ids=["even ranks", "uneven ranks"])
def test_layers_with_the_same_input_are_projected_together(shape: tuple[int, int], even: bool) -> None:
    count, layers = 13, 3
    ranks = [8] * count if even else [8 if index % 3 else 16 for index in range(count)]
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1))
    routing = sparse_routing(*shape, count, 2)
    of_layers = [experts(count, ranks, torch.float32) for _ in range(layers)]
    for layer, (lora_a, _, _) in enumerate(of_layers):
        for matrix in lora_a:
            matrix += layer
    scalings = of_layers[0][2]
    expert_major = [lora_a[expert] for expert in range(count) for lora_a, _, _ in of_layers]
    with torch.no_grad():
        spaces = sparse_down(x, expert_major, scalings, routing, layers)
        for space, (lora_a, lora_b, _) in zip(spaces.unbind(1), of_layers, strict=True):
            got = sparse_up(space, lora_b, routing).view(*shape, -1)
            assert relative_error(got.double(), loop(x, lora_a, lora_b, scalings, routing.weights)) < 1e-5


@GROUPED
def test_an_expert_without_tokens_does_no_harm() -> None:
    lora_a, lora_b, scalings = experts(9, [4] * 9, torch.float32)
    ids = torch.full((2, 8, 1), 3)
    weights = torch.zeros(2, 8, 9).scatter(-1, ids, 1.0)
    x = torch.randn(2, 8, IN)
    got = sparse_delta(x, lora_a, lora_b, scalings, TokenWeights(weights, ids))
    assert relative_error(got.double(), loop(x, lora_a, lora_b, scalings, weights)) < 1e-5


@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.float64), (3, torch.float32)])
def test_without_a_grouped_product_there_is_no_sparse_kernel(rank: int, dtype: torch.dtype) -> None:
    lora_a, lora_b, _ = experts(5, [rank] * 5, dtype)
    assert not has_sparse_kernel(lora_a, lora_b, sparse_routing(2, 9, 5, 1))
    assert has_sparse_kernel(lora_a, lora_b, sparse_routing(1, 1, 5, 1)), "few tokens work in any dtype"


def test_a_torch_without_grouped_products_computes_only_few_tokens_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_a, lora_b, _ = experts(5, [8] * 5, torch.float32)
    many, few = sparse_routing(2, 9, 5, 1), sparse_routing(1, 1, 5, 1)
    assert has_sparse_kernel(lora_a, lora_b, many) == hasattr(F, "grouped_mm")
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert not has_sparse_kernel(lora_a, lora_b, many)
    assert has_sparse_kernel(lora_a, lora_b, few)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_token_of_one_expert_is_added(dtype: torch.dtype, in_place: bool) -> None:
    (down,), (up,), _ = experts(1, [4], torch.float64 if dtype == torch.float64 else torch.float32)
    x, result = torch.randn(1, 1, IN).to(down.dtype), torch.randn(1, 1, OUT).to(dtype)
    wanted = result.double() + 1.5 * (up.double() @ (down.double() @ x[0, 0].double()))
    got = add_lora_single_token(result.clone(), x, down, up, scale=1.5, in_place=in_place)
    assert got.dtype == dtype
    assert relative_error(got.double(), wanted) < (1e-12 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize(("count", "top_k", "wanted"), [(4, 1, False), (4, 2, False), (64, 2, True), (16, 1, True)])
def test_few_experts_are_computed_in_one_product(count: int, top_k: int, wanted: bool) -> None:
    assert prefer_sparse(count, top_k) == wanted


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_product_is_added(in_place: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    result, rank_space, up = torch.randn(2, 3, 7).to(dtypes[0]), torch.randn(2, 3, 4), torch.randn(7, 4)
    before = result.clone()
    got = addmm_lora(result, rank_space, up.to(dtypes[1]), scale=0.5, in_place=in_place)
    wanted = before.double() + 0.5 * rank_space.double() @ up.double().T
    assert got.dtype == dtypes[0]
    assert relative_error(got.double(), wanted) < (1e-5 if dtypes[0] == torch.float32 else 0.01)
    assert in_place or torch.equal(result, before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("frozen", [None, "rank_space", "up"])
def test_the_gradients_of_an_added_product(in_place: bool, frozen: str | None) -> None:
    leaves = {
        "result": torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True),
        "rank_space": torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=frozen != "rank_space"),
        "up": torch.randn(7, 4, dtype=torch.float64, requires_grad=frozen != "up"),
    }
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    # not a leaf, as a leaf cannot be written to
    output = leaves["result"] * 1
    got = addmm_lora(output, leaves["rank_space"], leaves["up"], in_place=in_place)
    assert (got is output) == in_place, "autograd must know of the write in place"
    wanted = leaves["result"] + leaves["rank_space"] @ leaves["up"].T
    torch.testing.assert_close(got, wanted)
    direction = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got, trained, direction), torch.autograd.grad(wanted, trained, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
