"""A mixture can be pickled, copied, and sent to a process."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from dylo_moe import DyLoRA_MoE
from tests.support.saved_mixture import forward_in_child, mixture_on, tensors

IDS = torch.tensor([[5, 6, 7, 8, 9, 40]])
ROUTINGS = ("final", "prefix:1", "context:1", "per_layer")


def through_torch(model: DyLoRA_MoE) -> DyLoRA_MoE:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[DyLoRA_MoE], DyLoRA_MoE]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_copy_computes_the_same_and_shares_nothing(way: str, routing: str, base_folder: Path) -> None:
    model = mixture_on(base_folder, routing)
    with torch.no_grad():
        wanted = model(IDS, labels=IDS)
        twin = WAYS[way](model)
        got = twin(IDS, labels=IDS)
        assert torch.equal(got.logits, wanted.logits)
        assert torch.equal(got.routing_weights, wanted.routing_weights)
        assert torch.equal(
            twin.generate(IDS, max_new_tokens=4, do_sample=False),
            model.generate(IDS, max_new_tokens=4, do_sample=False),
        )
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert not torch.equal(twin(IDS).logits, wanted.logits)
        assert torch.equal(model(IDS).logits, wanted.logits)


def test_a_copy_trains_saves_and_takes_a_new_expert(base_folder: Path, tmp_path: Path) -> None:
    model = mixture_on(base_folder)
    before = tensors(model)
    twin = WAYS["pickle"](model).train()
    twin(IDS, labels=IDS).loss.backward()
    assert all(gate.grad is not None and gate.grad.abs().max() > 0 for gate in twin.router.gates)
    twin.add_expert("late")
    twin.eval().save_pretrained(tmp_path / "twin")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "twin")
    assert torch.allclose(loaded(IDS).logits, twin(IDS).logits, atol=1e-6)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_spawned_process_computes_the_same(base_folder: Path) -> None:
    model = mixture_on(base_folder)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=forward_in_child, args=(model, IDS, results))
    child.start()
    got = torch.tensor(results.get(timeout=60))
    child.join(timeout=60)
    assert child.exitcode == 0
    with torch.no_grad():
        assert torch.allclose(got, model(IDS).logits, atol=1e-6)
