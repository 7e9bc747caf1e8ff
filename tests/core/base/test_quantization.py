"""Experts on a base in 4 or 8 bits if bitsandbytes runs, and the errors if it does not."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.base import quantization
from dylo_moe.core.base.loading import load_base_model
from dylo_moe.core.lora.manager import count_parameters
from dylo_moe.errors import ModelError
from tests.support.families import gradients, relative_error, stir, token_ids
from tests.support.tiny_folder import write_tiny_folder

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def on(folder: Path, bits: int | None, **options: object) -> DyLoRA_MoE:
    torch.manual_seed(3)
    model = DyLoRA_MoE(str(folder), 2, rank=4, routing="prefix:1", bits=bits, **options).eval()
    stir(model)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bitsandbytes_the_flag_and_the_remedy_are_named(
    folder: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=f"`bits`={bits} .*needs bitsandbytes.*pip install") as raised:
        load_base_model(str(folder), bits=bits)
    assert "\n" not in str(raised.value)


def test_without_a_device_that_can_the_flag_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(quantization, "validate_bnb_backend_availability", lambda: False)
    with pytest.raises(ModelError, match=r"`bits`=8 .* supports none of this machine's"):
        load_base_model(str(folder), bits=8)


def test_other_bits_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="`bits` must be 4 or 8, got 3"):
        load_base_model(str(folder), bits=3)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_routed_experts_work_on_a_quantized_base(folder: Path, bits: int) -> None:
    model, plain = on(folder, bits), on(folder, None)
    ids = token_ids(2, 9)
    layer = model.experts.base_model.model.layers[2].self_attn.q_proj
    assert type(layer.base_layer).__module__.startswith("bitsandbytes")
    error = relative_error(model(ids).logits.float(), plain(ids).logits)
    assert 0 < error < 0.5, "near the full-precision mixture, and not it"
    one_hot = torch.nn.functional.one_hot(torch.ones(2, 9, dtype=torch.long), 2).float()
    given = model(ids, routing_weights=one_hot).logits
    model.experts.set_active("expert_1")
    torch.testing.assert_close(model(ids).logits, given, rtol=1e-4, atol=1e-4)
    with model.base_only():
        assert relative_error(model(ids).logits, given) > 1e-3


@needs_bitsandbytes
@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_train_on_a_quantized_base(folder: Path, bits: int, init: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = DyLoRA_MoE(str(folder), 2, rank=4, routing="prefix:1", bits=bits, init=init).train()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = token_ids(4, 12), []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in base.items())
    model.eval().save_pretrained(tmp_path / "mixture")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", load_base_model(str(folder), bits=bits))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert DyLoRA_MoE.from_pretrained(tmp_path / "mixture", str(folder)).experts.names == model.experts.names


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_on_the_dequantized_base(folder: Path, bits: int) -> None:
    model, plain_base = on(folder, bits), load_base_model(str(folder))
    # from another copy: on a CPU, PEFT's function breaks an 8-bit layer that has run before
    for name, module in load_base_model(str(folder), bits=bits).named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            plain = plain_base.get_submodule(name)
            plain.weight.data = dequantize_module_weight(module).detach().to(plain.weight)
    plain_model = DyLoRA_MoE(plain_base, 2, rank=4, routing="prefix:1").train()
    plain_model.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "lora_" in name or "router" in name},
        strict=False,
    )
    ids = token_ids(4, 12)
    with torch.no_grad():
        model(ids)  # training continues after an evaluation
    found = []
    for each in (model.train(), plain_model):
        each(ids, labels=ids).loss.backward()
        found.append(gradients(each))
    assert found[0].keys() == found[1].keys() and any("gates" in name for name in found[0])
    for name, gradient in found[1].items():
        assert gradient.any(), name
        assert relative_error(found[0][name], gradient) < 1e-3, name


@needs_bitsandbytes
def test_parameters_in_4_bits_are_counted_as_parameters(folder: Path) -> None:
    whole = count_parameters(load_base_model(str(folder)))
    assert count_parameters(load_base_model(str(folder), bits=4)) == whole
    assert count_parameters(load_base_model(str(folder), bits=8)) == whole
