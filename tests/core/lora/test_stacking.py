"""Weights of several adapters as one tensor: never stale, trainable, and where possible without a copy."""

import torch
from torch import nn

from dylo_moe.core.lora.stacking import concat_rows, stacked_view

IN, RANK = 24, 4


def weights(count: int, *shape: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape or (RANK, IN))) for _ in range(count)]


def test_stacked_weights_are_the_weights_themselves_whatever_is_done_to_them() -> None:
    parameters = weights(3)
    wanted = torch.stack([p.detach().clone() for p in parameters])
    stack = stacked_view(parameters)
    assert torch.equal(stack, wanted) and all(p.requires_grad for p in parameters)
    assert stacked_view(parameters).data_ptr() == stack.data_ptr(), "the second call must not copy"
    parameters[1].data.mul_(2)  # behind the back of autograd's version counter
    with torch.no_grad():
        parameters[2].add_(1)
    parameters[0].data = torch.zeros(RANK, IN)
    parameters[1] = nn.Parameter(torch.ones(RANK, IN))
    assert torch.equal(stacked_view(parameters), torch.stack([p.detach() for p in parameters]))


def test_stacked_weights_train_like_others() -> None:
    parameters = weights(2)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    with torch.inference_mode():
        stacked_view(parameters)
    before = [p.detach().clone() for p in parameters]
    (parameters[0].sum() - parameters[1].sum()).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert torch.equal(stacked_view(parameters), torch.stack([p.detach() for p in parameters]))


def test_a_stack_grows() -> None:
    parameters = weights(2)
    stacked_view(parameters)
    parameters += weights(2)
    wanted = torch.stack([p.detach().clone() for p in parameters])
    stack = stacked_view(parameters)
    assert torch.equal(stack, wanted) and stacked_view(parameters).data_ptr() == stack.data_ptr()
    assert torch.equal(stacked_view(parameters[1:3]), wanted[1:3])


def test_weights_whose_memory_holds_something_else_stay_where_they_are() -> None:
    flat = torch.randn(3 * RANK * IN)
    parameters = [nn.Parameter(flat[i * RANK * IN : (i + 1) * RANK * IN].view(RANK, IN)) for i in (2, 0)]
    addresses = [p.data_ptr() for p in parameters]
    assert torch.equal(stacked_view(parameters), torch.stack([p.detach() for p in parameters]))
    assert [p.data_ptr() for p in parameters] == addresses
    shared = weights(2)
    for parameter in shared:
        parameter.share_memory_()
    stacked_view(shared)
    assert all(p.is_shared() for p in shared), "another process may map them"


def test_rows_are_stacked_with_their_gradient() -> None:
    parameters = [*weights(1, 2, 5), *weights(1, 3, 5)]
    direction = torch.randn(5, 5)
    (concat_rows(parameters) * direction).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parameters]), direction)
    with torch.no_grad():
        assert torch.equal(concat_rows(parameters), torch.cat([p.detach() for p in parameters]))


def test_weights_adjacent_by_chance_are_not_taken_for_one_block() -> None:
    memory = bytearray(2 * 6 * 4)
    weights = [nn.Parameter(torch.frombuffer(memory, dtype=torch.float32, count=6, offset=at)) for at in (0, 24)]
    assert weights[0].data_ptr() + 24 == weights[1].data_ptr()
    with torch.no_grad():
        for number, weight in enumerate(weights):
            weight.copy_(torch.arange(6) + 6.0 * number)
    assert torch.equal(stacked_view(weights), torch.arange(12.0).view(2, 6))
