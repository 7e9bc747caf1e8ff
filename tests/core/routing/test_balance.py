"""The router's losses and the selection bias by worked numbers, and by adding up over parts of a batch."""

import math

import pytest
import torch
from torch import Tensor

from dylo_moe.core.routing.balance import expert_load, load_balance_loss, router_z_loss, updated_selection_bias

# four tokens, three experts, one gate; the logits are log-probabilities, so that their softmax is these values
PROBABILITIES = torch.tensor(
    [[[[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]]], dtype=torch.float64
)
LOGITS = PROBABILITIES.log()
MASK = torch.tensor([[1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("mask", "top_k", "wanted"),
    [
        (None, 1, [2.0, 1.0, 1.0]),
        (MASK, 1, [2.0, 1.0, 0.0]),
        (None, 2, [1.0, 1.5, 1.5]),  # choices 01, 02, 12, 12, each worth a half
        (MASK, 2, [1.0, 1.0, 1.0]),
        (None, 3, [4 / 3] * 3),
        (None, 9, [4 / 3] * 3),
    ],
)
def test_expert_load_by_worked_numbers(mask: Tensor | None, top_k: int, wanted: list[float]) -> None:
    load = expert_load(LOGITS.float(), mask, top_k)
    torch.testing.assert_close(load, torch.tensor([wanted]))


def test_balance_loss_by_worked_numbers() -> None:
    # f = (2, 1, 1) / 4 and P = (1.6, 1.1, 1.3) / 4
    wanted = 3 * (0.5 * 0.4 + 0.25 * 0.275 + 0.25 * 0.325)
    assert load_balance_loss(LOGITS, None, 1).item() == pytest.approx(wanted, rel=1e-6)
    # without the last token: f = (2, 1, 0) / 3 and P = (1.5, 0.8, 0.7) / 3
    wanted = 3 * (2 / 3 * 0.5 + 1 / 3 * 0.8 / 3)
    assert load_balance_loss(LOGITS, MASK, 1).item() == pytest.approx(wanted, rel=1e-6)


def test_balance_loss_is_the_mean_over_gates() -> None:
    both = torch.cat([LOGITS, LOGITS.roll(1, dims=-1) * 2])
    wanted = (load_balance_loss(both[:1], MASK, 1) + load_balance_loss(both[1:], MASK, 1)) / 2
    assert load_balance_loss(both, MASK, 1).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert load_balance_loss(both[:1], MASK, 1) != load_balance_loss(both[1:], MASK, 1)


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_1_at_uniform(experts: int, top_k: int) -> None:
    # expert e leads on every e-th token by very little: even choices, nearly even probabilities
    leads = torch.eye(experts).repeat(3, 1).double()
    leads = leads + 0.5 * leads.roll(1, dims=-1) if experts > 1 else leads
    assert load_balance_loss(leads[None, None] * 1e-9, None, top_k).item() == pytest.approx(1, abs=1e-6)


def test_balance_loss_is_the_number_of_experts_when_one_takes_all() -> None:
    logits = torch.tensor([50.0, 0, 0, 0]).expand(1, 2, 6, 4)
    assert load_balance_loss(logits, None, 1).item() == pytest.approx(4, rel=1e-6)


def test_balance_gradient_pushes_probability_away_from_the_loaded_expert() -> None:
    logits = LOGITS.clone().requires_grad_()
    load_balance_loss(logits, MASK, 1).backward()
    assert (logits.grad[0, 0, :3, 0] > 0).all(), "expert 0 has most tokens, so its logits must fall"
    assert (logits.grad[0, 0, 3] == 0).all(), "padding must have no gradient"
    fixed = LOGITS.clone().requires_grad_()
    load_balance_loss(fixed, MASK, 1, load=torch.tensor([[2.0, 1.0, 0.0]])).backward()
    torch.testing.assert_close(logits.grad, fixed.grad)


def test_z_loss_by_worked_numbers() -> None:
    logits = torch.tensor([[[[1.0, 3.0], [0.0, 0.0], [7.0, 7.0]]]], dtype=torch.float64)
    first, second = math.log(math.exp(1) + math.exp(3)), math.log(2)
    assert router_z_loss(logits, torch.tensor([[1, 1, 0]])).item() == pytest.approx((first**2 + second**2) / 2)
    assert router_z_loss(logits, None).item() == pytest.approx((first**2 + second**2 + (7 + math.log(2)) ** 2) / 3)
    assert router_z_loss(LOGITS, None).item() == pytest.approx(0, abs=1e-12), "log-probabilities sum to 1"


def test_router_losses_add_up_over_parts() -> None:
    logits = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    mask = (torch.rand(6, 5) > 0.3).long()
    mask[:, 0] = 1
    tokens, load = int(mask.sum()), expert_load(logits, mask, 2)
    parts = [(logits[:, row : row + 2], mask[row : row + 2]) for row in (0, 2, 4)]
    torch.testing.assert_close(sum(expert_load(*part, 2) for part in parts), load)
    for function, whole, more in (
        (load_balance_loss, load_balance_loss(logits, mask, 2), {"top_k": 2, "load": load}),
        (router_z_loss, router_z_loss(logits, mask), {}),
    ):
        total = sum(function(*part, **more, num_tokens=tokens) for part in parts)
        assert total.item() == pytest.approx(whole.item(), rel=1e-6), function.__name__


@pytest.mark.parametrize("junk", [0.0, 100.0, -100.0])
def test_padding_counts_in_no_router_loss(junk: float) -> None:
    logits, mask = torch.randn(1, 2, 6, 3), torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    padded = logits.masked_fill(mask[None, :, :, None] == 0, junk)
    assert torch.equal(expert_load(padded, mask, 2), expert_load(logits, mask, 2))
    assert load_balance_loss(padded, mask, 2).item() == pytest.approx(load_balance_loss(logits, mask, 2).item())
    assert router_z_loss(padded, mask).item() == pytest.approx(router_z_loss(logits, mask).item())


def test_a_batch_of_padding_alone_costs_nothing() -> None:
    mask = torch.zeros(1, 4)
    assert load_balance_loss(LOGITS, mask, 1).item() == router_z_loss(LOGITS * 3, mask).item() == 0


def test_updated_selection_bias_by_worked_numbers() -> None:
    bias = torch.tensor([[0.0, 0.5, -0.5], [0.0, 0.0, 0.0]])
    load = torch.tensor([[6.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    wanted = torch.tensor([[-0.1, 0.6, -0.4], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(updated_selection_bias(bias, load, rate=0.1), wanted)
    assert torch.equal(bias, torch.tensor([[0.0, 0.5, -0.5], [0.0, 0.0, 0.0]])), "the old bias must not change in place"
