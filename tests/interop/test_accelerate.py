"""accelerate: the recipe for saving, and weights that lie elsewhere until a module is called."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from torch import nn

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.base_model import load_base_model
from dylo_moe.core.routing_state import Record  # noqa: F401
from saved_mixture import mixture_on, moved, tensors, write_mixture

IDS = torch.tensor([[5, 6, 7, 8, 9, 40], [9, 30, 7, 100, 5, 41]])
CPU = torch.device("cpu")
ROUTINGS = ("final", "prefix:1", "context:1", "per_layer")


def dispatched(model: nn.Module, folder: Path) -> None:
    """Put half of the decoder layers on the disk."""
    names = [name for name, _ in model.named_modules() if name.endswith((".layers.2", ".layers.3"))]
    names = names or ["model.layers.2", "model.layers.3"]
    places: dict[str, str] = dict.fromkeys(names, "disk")
    layers = names[0].rpartition(".")[0]
    whole = {name: "cpu" for name, _ in model.named_modules() if name and not list(model.get_submodule(name).children())}
    places |= {name: "cpu" for name in whole if not name.startswith(tuple(f"{layer}." for layer in names))}
    del layers
    dispatch_model(model, places, main_device=CPU, offload_dir=str(folder), force_hooks=True)


WAYS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), CPU),
    "dispatch_model": dispatched,
}


def test_the_recipe_for_saving_writes_a_mixture(folder: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(DyLoRA_MoE.from_pretrained(folder))
    model = accelerator.unwrap_model(wrapped)
    model.save_pretrained(
        tmp_path / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(wrapped),
    )
    assert moved(tensors(DyLoRA_MoE.from_pretrained(folder)), DyLoRA_MoE.from_pretrained(tmp_path / "saved")) == set()


def test_only_the_main_process_saves(folder: Path, tmp_path: Path) -> None:
    DyLoRA_MoE.from_pretrained(folder).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_offloaded_mixture_computes_the_same(way: str, routing: str, base_folder: Path, tmp_path: Path) -> None:
    model = mixture_on(base_folder, routing)
    with torch.no_grad():
        wanted = model(IDS, labels=IDS)
        alone = model.generate(IDS, max_new_tokens=4, do_sample=False)
    WAYS[way](model, tmp_path)
    with torch.no_grad():
        got = model(IDS, labels=IDS)
        in_chunks = model(IDS, labels=IDS, return_logits=False)
        generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.allclose(got.logits, wanted.logits, atol=1e-5)
    assert torch.allclose(got.routing_weights, wanted.routing_weights, atol=1e-6)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert in_chunks.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert torch.equal(generated, alone)


@pytest.mark.parametrize("way", WAYS)
def test_a_mixture_is_loaded_onto_an_offloaded_base(way: str, base_folder: Path, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mixture", base_folder)
    with torch.no_grad():
        wanted = DyLoRA_MoE.from_pretrained(folder)(IDS).logits
    base = load_base_model(str(base_folder))
    WAYS[way](base, tmp_path / "offloaded")
    model = DyLoRA_MoE.from_pretrained(folder, model=base)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-5)


def test_an_offloaded_mixture_is_saved_whole(base_folder: Path, tmp_path: Path) -> None:
    model = mixture_on(base_folder)
    before = tensors(model)
    cpu_offload(model, CPU)
    model.save_pretrained(tmp_path / "saved")
    assert moved(before, DyLoRA_MoE.from_pretrained(tmp_path / "saved")) == set()
