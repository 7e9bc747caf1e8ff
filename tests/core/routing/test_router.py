"""The router on its own: what its weights are, when they are sparse, and how it grows."""

import math

import pytest
import torch
from torch import Tensor

from dylo_moe import DynamicHybridRouter
from dylo_moe.core.routing import router as router_module
from dylo_moe.core.routing.router import MATURE, YOUNG, select_topk
from dylo_moe.errors import RoutingError
from tests.support.families import relative_error

WIDTH, EXPERTS = 16, 5


def router(*, mature: bool = False, num_experts: int = EXPERTS, **options: object) -> DynamicHybridRouter:
    """A router whose gates are wide enough that its weights are far from even; evaluating."""
    torch.manual_seed(0)
    made = DynamicHybridRouter(WIDTH, num_experts, **options)
    with torch.no_grad():
        for gate in made.gates:
            gate.mul_(30)
    made.maturity = [MATURE if mature else YOUNG] * num_experts
    return made.eval()


def hidden(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype) * 4


def test_dense_weights_are_the_softmax_of_the_gate_on_normalized_input() -> None:
    x = hidden(torch.float64)
    made = router(temperature=0.7)
    normalized = x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    scores = normalized @ made.gates[0].double().T / 0.7
    wanted = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    output = made(x)
    assert relative_error(output.logits, scores) < 1e-10
    assert relative_error(output.weights, wanted) < 1e-10
    assert output.weights.std() > 0.1, "the gate must matter, or nothing was checked"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_sum_to_1_in_float32(dtype: torch.dtype, mature: bool, autocast: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = router(mature=mature)(hidden(dtype))
    assert output.weights.dtype == output.logits.dtype == torch.float32
    torch.testing.assert_close(output.weights.sum(dim=-1), torch.ones(3, 7), rtol=0, atol=1e-6)
    exact = router(mature=mature)(hidden(dtype).double())
    assert relative_error(output.weights.double(), exact.weights) < 1e-5


def sparse_weights(logits: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    return router_module.sparse_weights(logits, select_topk(logits, top_k, bias))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sparse_weights_renormalize_the_top_k(top_k: int) -> None:
    dense, sparse = router()(hidden()).weights, router(mature=True, top_k=top_k)(hidden()).weights
    assert ((sparse > 0).sum(dim=-1) == top_k).all()
    kept, ids = dense.topk(top_k, dim=-1)
    wanted = torch.zeros_like(dense).scatter(-1, ids, kept / kept.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(sparse, wanted)


def test_sparse_begins_exactly_when_all_are_mature_and_it_evaluates() -> None:
    made = router(top_k=2)
    for mature in range(EXPERTS + 1):
        made.maturity = [MATURE] * mature + [YOUNG] * (EXPERTS - mature)
        for training in (True, False):
            made.train(training)
            sparse = mature == EXPERTS and not training
            assert made.is_sparse() == sparse
            assert ((made(hidden()).weights == 0).any().item()) == sparse


def test_only_the_routed_experts_decide_about_sparseness() -> None:
    made = router(top_k=2)
    made.maturity = [MATURE, MATURE, MATURE, MATURE, YOUNG]
    assert made.is_sparse([0, 1, 2, 3]) and not made.is_sparse([0, 4]) and not made.is_sparse()


@pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
def test_each_token_is_routed_by_itself(mature: bool) -> None:
    made, x = router(mature=mature), hidden()
    edited = x.clone()
    edited[1, 4] += 3
    before, after = made(x).weights, made(edited).weights
    changed = (before != after).any(dim=-1)
    assert changed.nonzero().tolist() == [[1, 4]]


def test_scaling_a_hidden_state_changes_no_weight() -> None:
    torch.testing.assert_close(router()(hidden()).weights, router()(hidden() * 100).weights)


def test_lower_temperature_is_sharper() -> None:
    entropies = []
    for temperature in (0.25, 1.0, 4.0):
        weights = router(temperature=temperature)(hidden()).weights
        entropies.append(torch.special.entr(weights).sum(dim=-1).mean().item())
    assert entropies[0] < entropies[1] < entropies[2] < math.log(EXPERTS)


def test_gates_are_independent() -> None:
    made = router(num_gates=3)
    made(hidden(), gate=1).weights[..., 0].sum().backward()
    assert [gate.grad is not None for gate in made.gates] == [False, True, False]
    assert not torch.equal(made(hidden(), gate=0).weights, made(hidden(), gate=2).weights)


@pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
def test_an_expert_left_out_is_as_if_it_had_never_been(mature: bool) -> None:
    whole, part = router(mature=mature), router(mature=mature)
    part.gates[0] = torch.nn.Parameter(whole.gates[0][:3].detach().clone())
    part.selection_bias, part.maturity = whole.selection_bias[:, :3], whole.maturity[:3]
    got, wanted = whole(hidden(), experts=[0, 1, 2]), part(hidden())
    assert torch.equal(got.weights, wanted.weights) and torch.equal(got.logits, wanted.logits)


def test_top_k_is_no_more_than_the_experts_that_are_routed() -> None:
    weights = router(mature=True, top_k=3)(hidden(), experts=[1, 4]).weights
    assert weights.shape == (3, 7, 2) and (weights > 0).all()


@pytest.mark.parametrize("num_gates", [1, 3])
def test_a_new_expert_keeps_the_old_rows_and_the_ratios_of_their_weights(num_gates: int) -> None:
    made = router(num_gates=num_gates)
    made.selection_bias.uniform_(-1, 1)
    rows, bias = [gate.detach().clone() for gate in made.gates], made.selection_bias.clone()
    before = [made(hidden(), gate).weights for gate in range(num_gates)]
    assert made.add_expert() == EXPERTS
    assert (made.num_experts, made.maturity[-1]) == (EXPERTS + 1, YOUNG)
    assert torch.equal(made.selection_bias, torch.cat([bias, torch.zeros(num_gates, 1)], dim=1))
    for gate in range(num_gates):
        assert torch.equal(made.gates[gate][:-1], rows[gate])
        torch.testing.assert_close(made.gates[gate][-1], rows[gate].mean(dim=0))
        old = made(hidden(), gate).weights[..., :-1]
        torch.testing.assert_close(old / old.sum(dim=-1, keepdim=True), before[gate])


def test_a_new_expert_ends_sparse_routing_until_it_is_mature() -> None:
    made = router(mature=True)
    made.add_expert()
    assert not made.is_sparse()
    made.maturity[-1] = MATURE
    assert made.is_sparse()


def test_a_frozen_gate_stays_frozen_when_it_grows() -> None:
    made = router()
    made.gates.requires_grad_(False)
    made.add_expert()
    assert not made.gates[0].requires_grad


def test_sparse_weights_by_worked_numbers() -> None:
    logits = torch.tensor([[math.log(6), math.log(3), math.log(1), math.log(2)], [0.0, 0.0, -math.inf, math.log(3)]])
    torch.testing.assert_close(sparse_weights(logits, 1), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]]))
    wanted = torch.tensor([[6 / 9, 3 / 9, 0, 0], [0.2, 0.2, 0, 0.6]])
    torch.testing.assert_close(
        torch.stack([sparse_weights(logits[:1], 2)[0], sparse_weights(logits[1:], 3)[0]]), wanted
    )
    torch.testing.assert_close(sparse_weights(logits[:1], 9), torch.tensor([[6.0, 3, 1, 2]]) / 12)


def test_selection_bias_changes_the_choice_and_not_the_ratios() -> None:
    logits = torch.tensor([[math.log(6), math.log(3), math.log(1), math.log(2)]])
    bias = torch.tensor([-10.0, 0, 10, 0])
    torch.testing.assert_close(sparse_weights(logits, 2, bias), torch.tensor([[0, 3 / 4, 1 / 4, 0]]))
    torch.testing.assert_close(sparse_weights(logits, 3, bias), torch.tensor([[0, 3.0, 1, 2]]) / 6)


def test_selection_bias_does_not_touch_dense_weights_or_logits() -> None:
    made = router()
    before = made(hidden())
    made.selection_bias.uniform_(-5, 5)
    assert torch.equal(made(hidden()).weights, before.weights)
    made.maturity = [MATURE] * EXPERTS
    sparse = made(hidden())
    assert torch.equal(sparse.logits, before.logits)
    assert not torch.equal(sparse.weights, router(mature=True)(hidden()).weights)


def test_the_gradient_reaches_gate_and_input() -> None:
    made, x = router().train(), hidden().requires_grad_()
    (made(x).weights * torch.arange(EXPERTS)).sum().backward()
    assert (made.gates[0].grad != 0).any(dim=1).all() and (x.grad != 0).any(dim=-1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "`num_experts` must be at least 1, got 0"),
        ({"num_experts": 2, "top_k": 3}, r"`top_k` must be from 1 to the number of experts \(2\), got 3"),
        ({"num_experts": 2, "top_k": 0}, r"`top_k` must be from 1 to the number of experts \(2\), got 0"),
        ({"num_experts": 2, "temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"num_experts": 2, "temperature": -1.0}, "`temperature` must be above 0, got -1.0"),
        ({"num_experts": 2, "temperature": math.nan}, "`temperature` must be above 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(RoutingError, match=f"^{message}$"):
        DynamicHybridRouter(WIDTH, **options)


def test_the_fast_path_for_one_token_gives_the_expert_of_the_forward() -> None:
    router = DynamicHybridRouter(16, 5, top_k=1, num_gates=2, temperature=0.7).eval()
    router.maturity = [MATURE] * 5
    for seed in range(20):
        hidden = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for gate in (0, 1):
                ids = router(hidden, gate).topk_expert_ids
                assert ids is not None and router.top1_fast_path(hidden, gate) == ids.item()
                assert (
                    router.top1_fast_path(hidden.bfloat16(), gate)
                    == router(hidden.bfloat16(), gate).topk_expert_ids.item()
                )


def test_the_fast_path_leaves_everything_else_to_the_forward() -> None:
    router = DynamicHybridRouter(16, 5, top_k=1).eval()
    router.maturity = [MATURE] * 5
    one = torch.randn(1, 1, 16)
    with torch.no_grad():
        assert router.top1_fast_path(one) is not None
        assert (
            router.top1_fast_path(one.expand(2, 1, 16)) is None and router.top1_fast_path(one.expand(1, 2, 16)) is None
        )
        assert router.top1_fast_path(one, experts=[0, 2]) is None
        router.selection_bias[0, 3] = 100.0
        assert router.top1_fast_path(one) is None and router(one).topk_expert_ids.item() == 3
        router.selection_bias.zero_()
        assert router.top1_fast_path(one) is not None
        router.top_k = 2
        assert router.top1_fast_path(one) is None
        router.top_k = 1
        router.maturity[1] = YOUNG
        assert router.top1_fast_path(one) is None
    router.maturity[1] = MATURE
    assert router.top1_fast_path(one) is None, "with gradients"
