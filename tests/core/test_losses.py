"""The losses, by numbers worked out by hand, and by adding up over parts of a batch."""

import math

import pytest
import torch
from torch import Tensor, nn

from dylo_moe.core import losses
from dylo_moe.core.losses import (
    IGNORE_INDEX,
    ROWS_AT_ONCE,
    causal_lm_loss,
    expert_load,
    linear_causal_lm_loss,
    load_balance_loss,
    router_z_loss,
    token_cross_entropy,
    updated_selection_bias,
    without_padding,
)

# Four tokens, three experts, one gate. Rows are log-probabilities, so that their softmax is what stands here.
PROBABILITIES = torch.tensor(
    [[[[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]]], dtype=torch.float64
)
LOGITS = PROBABILITIES.log()
MASK = torch.tensor([[1, 1, 1, 0]])


def test_cross_entropy_by_hand() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]], dtype=torch.float64)
    labels = torch.tensor([[2, 0, 1]])
    # position 0 predicts token 0, position 1 predicts token 1; the first label and the last position count nothing
    wanted = -(math.log(0.5) + math.log(0.8)) / 2
    assert causal_lm_loss(probabilities.log(), labels).item() == pytest.approx(wanted, rel=1e-12)
    labels[0, 1] = IGNORE_INDEX
    assert causal_lm_loss(probabilities.log(), labels).item() == pytest.approx(-math.log(0.8), rel=1e-12)


def test_label_smoothing_by_hand() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]], dtype=torch.float64)
    labels = torch.tensor([[1, 0]])
    even = -(math.log(0.5) + 2 * math.log(0.25)) / 3
    wanted = 0.7 * -math.log(0.5) + 0.3 * even
    got = causal_lm_loss(probabilities.log(), labels, label_smoothing=0.3).item()
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_adds_up_over_parts(smoothing: float) -> None:
    logits = torch.randn(4, 6, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (4, 6))
    labels[0, :4] = labels[2] = labels[3, 2] = IGNORE_INDEX
    items = int((labels[:, 1:] != IGNORE_INDEX).sum())
    whole = causal_lm_loss(logits, labels, label_smoothing=smoothing)
    parts = [
        causal_lm_loss(logits[row, None], labels[row, None], label_smoothing=smoothing, num_items=items)
        for row in range(4)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert parts[2].item() == 0


def test_each_token_has_its_own_share_of_the_loss() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1, 2:] = IGNORE_INDEX
    shares = token_cross_entropy(logits, labels, label_smoothing=0.1)
    assert shares.shape == (2, 4) and torch.equal(shares[1, 1:], torch.zeros(3))
    whole = causal_lm_loss(logits, labels, label_smoothing=0.1)
    assert (shares.sum() / 5).item() == pytest.approx(whole.item())


@pytest.fixture(params=["fused", "recomputed"])
def chunked_loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the loss in chunks: torch's own, and ours for a torch that has none."""
    if request.param == "recomputed":
        monkeypatch.setattr(losses, "_Options", None)
    elif not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")


@pytest.mark.usefixtures("chunked_loss")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
def test_the_loss_without_logits_is_the_loss_with_them(
    dtype: torch.dtype, tolerance: float, rows: int, biased: bool, smoothing: float
) -> None:
    hidden = torch.randn(rows, 400, 16).to(dtype)  # several chunks
    weight, bias = torch.randn(50, 16).to(dtype), torch.randn(50).to(dtype) if biased else None
    labels = torch.randint(0, 50, (rows, 400))
    labels[0, :70] = IGNORE_INDEX
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    # the truth is in float64: in bfloat16 the logits themselves are rounded, here and there
    precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = causal_lm_loss(nn.functional.linear(*precise), labels, label_smoothing=smoothing, num_items=500)
    got = linear_causal_lm_loss(hidden, weight, labels, bias=bias, label_smoothing=smoothing, num_items=500)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.item() == pytest.approx(wanted.item(), rel=tolerance)
    for gradient, true_gradient in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, precise), strict=True
    ):
        assert ((gradient.double() - true_gradient).norm() / true_gradient.norm()).item() < tolerance


@pytest.mark.usefixtures("chunked_loss")
def test_a_batch_without_labels_has_no_loss() -> None:
    hidden = torch.randn(1, 4, 16, requires_grad=True)
    loss = linear_causal_lm_loss(hidden, torch.randn(50, 16), torch.full((1, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_without_the_kernel_no_more_logits_than_one_chunk_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_Options", None)
    hidden, vocabulary = torch.randn(1, 4 * ROWS_AT_ONCE + 1, 16, requires_grad=True), 500
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.numel()) or saved, lambda saved: saved
    ):
        linear_causal_lm_loss(hidden, torch.randn(vocabulary, 16), torch.ones(hidden.shape[:2], dtype=torch.long))
    assert kept and max(kept) < ROWS_AT_ONCE * vocabulary


def test_labels_that_padding_would_predict_are_left_out() -> None:
    labels = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, -100, 33]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    wanted = [[-100, -100, -100, 13], [20, 21, 22, -100], [30, 31, -100, 33]]
    assert without_padding(labels, mask).tolist() == wanted
    assert labels[0, 2] == 12, "the caller's labels must not change"


def test_a_batch_without_labels_costs_nothing_and_has_a_finite_gradient() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((2, 5), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, labels = torch.randn(2, 50, 30).bfloat16(), torch.randint(0, 30, (2, 50))
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(causal_lm_loss(logits.double(), labels).item(), rel=1e-6)


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
def test_expert_load_by_hand(mask: Tensor | None, top_k: int, wanted: list[float]) -> None:
    load = expert_load(LOGITS.float(), mask, top_k)
    torch.testing.assert_close(load, torch.tensor([wanted]))


def test_balance_loss_by_hand() -> None:
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
    # expert e leads on every e-th token by a hair, so that the choices are even and the probabilities all but even
    leads = torch.eye(experts).repeat(3, 1).double()
    leads = leads + 0.5 * leads.roll(1, dims=-1) if experts > 1 else leads
    assert load_balance_loss(leads[None, None] * 1e-9, None, top_k).item() == pytest.approx(1, abs=1e-6)


def test_balance_loss_is_the_number_of_experts_when_one_takes_all() -> None:
    logits = torch.tensor([50.0, 0, 0, 0]).expand(1, 2, 6, 4)
    assert load_balance_loss(logits, None, 1).item() == pytest.approx(4, rel=1e-6)


def test_balance_gradient_pushes_probability_away_from_the_loaded_expert() -> None:
    logits = LOGITS.clone().requires_grad_()
    load_balance_loss(logits, MASK, 1).backward()
    assert (logits.grad[0, 0, :3, 0] > 0).all(), "expert 0 has most tokens; its logits must fall"
    assert (logits.grad[0, 0, 3] == 0).all(), "padding must feel no push"
    fixed = LOGITS.clone().requires_grad_()
    load_balance_loss(fixed, MASK, 1, load=torch.tensor([[2.0, 1.0, 0.0]])).backward()
    torch.testing.assert_close(logits.grad, fixed.grad)


def test_z_loss_by_hand() -> None:
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


def test_updated_selection_bias_by_hand() -> None:
    bias = torch.tensor([[0.0, 0.5, -0.5], [0.0, 0.0, 0.0]])
    load = torch.tensor([[6.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    wanted = torch.tensor([[-0.1, 0.6, -0.4], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(updated_selection_bias(bias, load, rate=0.1), wanted)
    assert torch.equal(bias, torch.tensor([[0.0, 0.5, -0.5], [0.0, 0.0, 0.0]])), "the old bias must not change in place"
