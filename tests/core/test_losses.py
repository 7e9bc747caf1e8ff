"""The language-modelling loss by worked numbers, and by adding up over parts of a batch."""

import math

import pytest
import torch
from torch import nn

from dylo_moe.core import losses
from dylo_moe.core.losses import (
    IGNORE_INDEX,
    ROWS_AT_ONCE,
    causal_lm_loss,
    linear_causal_lm_loss,
    token_cross_entropy,
    without_padding,
)


def test_cross_entropy_by_worked_numbers() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]], dtype=torch.float64)
    labels = torch.tensor([[2, 0, 1]])
    # position 0 predicts token 0, position 1 predicts token 1; the first label and the last position count nothing
    wanted = -(math.log(0.5) + math.log(0.8)) / 2
    assert causal_lm_loss(probabilities.log(), labels).item() == pytest.approx(wanted, rel=1e-12)
    labels[0, 1] = IGNORE_INDEX
    assert causal_lm_loss(probabilities.log(), labels).item() == pytest.approx(-math.log(0.8), rel=1e-12)


def test_label_smoothing_by_worked_numbers() -> None:
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


def test_the_loss_is_a_mean_over_tokens() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1, 2:] = IGNORE_INDEX
    shares = token_cross_entropy(logits, labels, label_smoothing=0.1)
    assert shares.shape == (2, 4) and torch.equal(shares[1, 1:], torch.zeros(3))
    whole = causal_lm_loss(logits, labels, label_smoothing=0.1)
    assert (shares.sum() / 5).item() == pytest.approx(whole.item())


@pytest.fixture(params=["fused", "recomputed"])
def chunked_loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with both chunked losses: torch's own, and ours for a torch that has none."""
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
    # in float64: bfloat16 would round the logits of the reference too
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
