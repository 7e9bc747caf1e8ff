"""accelerate: the recipe for saving, and offloaded weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from torch import nn

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.base.loading import load_base_model
from dylo_moe.errors import ModelError
from tests.support.saved_mixture import mixture_on, moved, tensors

IDS = torch.tensor([[5, 6, 7, 8, 9, 40], [9, 30, 7, 100, 5, 41]])
CPU = torch.device("cpu")
ROUTINGS = ("final", "prefix:1", "context:1", "per_layer")


def dispatched(model: nn.Module, folder: Path) -> None:
    """Put half of the decoder layers on the disk."""
    base = "model.base_model.model." if isinstance(model, DyLoRA_MoE) else ""
    parts = {f"{base}model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")}
    parts |= {f"{base}model.layers.2": "disk", f"{base}model.layers.3": "disk", f"{base}lm_head": "cpu"}
    if base:
        parts["router"] = "cpu"
    dispatch_model(model, parts, main_device=CPU, offload_dir=str(folder))


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
        wanted_of_one = model(IDS, adapter_names=[model.experts.names[0], "__base__"]).logits
        alone = model.generate(IDS, max_new_tokens=4, do_sample=False)
    WAYS[way](model, tmp_path)
    with torch.no_grad():
        got = model(IDS, labels=IDS)
        in_chunks = model(IDS, labels=IDS, return_logits=False)
        one = model(IDS, adapter_names=[model.experts.names[0], "__base__"]).logits
        generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.allclose(got.logits, wanted.logits, atol=1e-5)
    assert torch.allclose(got.routing_weights, wanted.routing_weights, atol=1e-6)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert in_chunks.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert torch.allclose(one, wanted_of_one, atol=1e-5)
    assert torch.equal(generated, alone)
    assert model.device == CPU


def test_a_base_with_a_device_map_carries_a_mixture(folder: Path, base_folder: Path, tmp_path: Path) -> None:
    before = DyLoRA_MoE.from_pretrained(folder)
    base = load_base_model(str(base_folder))
    dispatched(base, tmp_path / "weights")
    model = DyLoRA_MoE.from_pretrained(folder, model=base)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, before(IDS).logits, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", model=str(base_folder))
    assert moved(tensors(before), again) == set()


@pytest.mark.parametrize("way", WAYS)
def test_what_would_be_lost_on_an_offloaded_base_is_refused(
    way: str, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Refuse what PEFT would do silently: write into offloaded weights without an effect."""
    base = load_base_model(str(base_folder))
    WAYS[way](base, tmp_path / "base")
    with pytest.raises(ModelError, match="no expert can be made"):
        DyLoRA_MoE(base)
    if way != "dispatch_model":
        with pytest.raises(ModelError, match="no adapter can be loaded"):
            DyLoRA_MoE.from_pretrained(folder, model=base)
    model = DyLoRA_MoE.from_pretrained(folder)
    WAYS[way](model, tmp_path / "mixture")
    with pytest.raises(ModelError, match="no expert can be made"):
        model.add_expert()
    with pytest.raises(ModelError, match="no weights can be loaded"):
        model.load_weights(folder)
    assert len(model.experts) == 3


def test_an_offloaded_mixture_is_saved_whole(base_folder: Path, tmp_path: Path) -> None:
    model = mixture_on(base_folder)
    before = tensors(model)
    cpu_offload(model, CPU)
    model.save_pretrained(tmp_path / "saved")
    assert moved(before, DyLoRA_MoE.from_pretrained(tmp_path / "saved")) == set()
    name = model.experts.names[1]
    model.experts.export(name, tmp_path / "one")
    files = (place / "adapter_model.safetensors" for place in (tmp_path / "one", tmp_path / "saved" / "experts" / name))
    assert len({file.read_bytes() for file in files}) == 1
