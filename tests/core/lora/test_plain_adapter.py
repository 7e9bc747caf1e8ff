"""Exported experts: a tool that scales by ``lora_alpha / r`` adds the same as the expert."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.checkpoint import write_adapter
from dylo_moe.core.lora.plain_adapter import folded, make_plain
from dylo_moe.errors import CheckpointError, ExpertError
from tests.support.families import mixture, relative_error, stir, tiny, token_ids
from tests.support.tiny_folder import write_tiny_folder

IDS = token_ids(2, 8)
PATTERNS = {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 7}, "alpha_pattern": {"o_proj": 3}}
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, whole": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "patterns": PATTERNS,
    "both": {**PATTERNS, "use_rslora": True},
}


def adapter(folder: Path, family: str = "llama", **options: object) -> Path:
    """Return the folder of an adapter that PEFT alone made and saved."""
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "o_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 5, "lora_alpha": 7, "target_modules": targets, **options})
    torch.manual_seed(9)
    model = get_peft_model(tiny(family), config)
    stir(model)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def exported(source: Path, folder: Path, family: str = "llama", dtype: torch.dtype = torch.float64) -> DyLoRA_MoE:
    model = mixture(family, dtype=dtype)
    model.import_expert(source, "sql")
    model.experts.set_active("sql")
    model.experts.export("sql", folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_an_export_says_one_scaling_and_adds_the_same(
    tmp_path: Path, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = exported(adapter(tmp_path / "sql", **KINDS[kind]), tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not any(config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern"))
    ranks = {tensor.shape["lora_B" in key] for key, tensor in load_file(weights_of(tmp_path / "out")).items()}
    assert ranks == {config["r"]} and isinstance(config["lora_alpha"], int)
    again = PeftModel.from_pretrained(tiny(dtype=dtype), str(tmp_path / "out")).eval()
    with torch.no_grad():
        wanted = model(IDS).logits
        assert relative_error(again(IDS).logits, wanted) < tolerance
        assert relative_error(tiny(dtype=dtype)(IDS).logits, wanted) > 0.01, "the expert must matter"


def weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def test_transposed_weights_are_exported_too(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"c_proj": 2}, "use_rslora": True, "fan_in_fan_out": True}
    model = exported(adapter(tmp_path / "sql", "gpt2", **patterns), tmp_path / "out", "gpt2")
    again = PeftModel.from_pretrained(tiny("gpt2"), str(tmp_path / "out")).eval()
    assert relative_error(again(IDS).logits, model(IDS).logits) < 1e-10


def test_a_plain_adapter_keeps_its_bits(tmp_path: Path) -> None:
    model = exported(adapter(tmp_path / "sql"), tmp_path / "out")
    write_adapter(tmp_path / "peft", model.experts.peft_model, "sql")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()


def test_weights_keep_their_bits_if_an_integer_alpha_fits(tmp_path: Path) -> None:
    source = adapter(tmp_path / "sql", **KINDS["rsLoRA, whole"])
    exported(source, tmp_path / "out")
    before, after = load_file(weights_of(source)), load_file(weights_of(tmp_path / "out"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 12  # 6 / sqrt(4) * 4


def test_a_worked_example() -> None:
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    prefix = "base_model.model.layers.0.up"
    weights = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    wider = {
        "base_model.model.layers.0.down.lora_A.weight": torch.ones(2, 1),
        "base_model.model.layers.0.down.lora_B.weight": torch.ones(1, 2),
    }
    config = {"r": 2, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"up": 5}, "rank_pattern": {"up": 1}}
    said, plain = folded(config, {**weights, **wider})
    assert (said["r"], said["lora_alpha"]) == (2, 2)
    assert plain[f"{prefix}.lora_A.weight"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert plain[f"{prefix}.lora_B.weight"].tolist() == [[15.0, 0.0]]  # 5 / sqrt(1) times 3
    assert plain["base_model.model.layers.0.down.lora_B.weight"].tolist()[0] == pytest.approx([3 / math.sqrt(2)] * 2)


def test_narrow_weights_are_widened_before_they_are_scaled(tmp_path: Path) -> None:
    narrow = {key: tensor.bfloat16() for key, tensor in load_file(weights_of(adapter(tmp_path / "sql"))).items()}
    _, plain = folded({"lora_alpha": 7, "use_rslora": True}, narrow)
    for key in narrow:
        wide = narrow[key].float() * (7 / math.sqrt(5) if "lora_B" in key else 1)
        assert torch.equal(plain[key].float(), wide)


def test_a_mixture_keeps_the_scaling_that_it_trains_with(tmp_path: Path) -> None:
    model = mixture(use_rslora=True)
    model.save_pretrained(tmp_path / "mixture")
    said = json.loads((tmp_path / "mixture" / "experts" / "expert_0" / "adapter_config.json").read_text())
    assert said["use_rslora"] is True


def test_weights_of_another_scaling_are_not_loaded_into_an_expert(tmp_path: Path) -> None:
    model = mixture(use_rslora=True, rank=5, alpha=3)
    model.experts.export("expert_0", tmp_path / "out")
    before = model(IDS).logits
    with pytest.raises(ExpertError, match="scaled by another lora_alpha, rsLoRA or alpha_pattern"):
        model.experts.load_weights("expert_0", tmp_path / "out")
    assert torch.equal(model(IDS).logits, before)


def test_a_folder_that_holds_more_than_an_adapter_is_not_replaced(tmp_path: Path) -> None:
    model = mixture()
    model.experts.export("expert_0", tmp_path / "out")
    model.experts.export("expert_1", tmp_path / "out")  # an export replaces an export
    (tmp_path / "out" / "optimizer.pt").touch()
    with pytest.raises(CheckpointError, match=r"holds other files \(optimizer\.pt\), and writing would replace them"):
        model.experts.export("expert_0", tmp_path / "out")
    assert (tmp_path / "out" / "optimizer.pt").exists()


def test_a_damaged_adapter_is_left_as_it_is(tmp_path: Path) -> None:
    source = adapter(tmp_path / "sql", use_rslora=True)
    weights_of(source).write_bytes(b"no tensors")
    with pytest.raises(ExpertError, match="cannot be read"):
        make_plain(source)
    assert weights_of(source).read_bytes() == b"no tensors"


# --- llama.cpp -------------------------------------------------------------------------------------------------------

CONVERTER = Path(os.environ.get("LLAMA_CPP", "")) / "convert_lora_to_gguf.py"
needs_converter = pytest.mark.skipif(
    not CONVERTER.is_file(), reason="set LLAMA_CPP to a checkout of llama.cpp to convert with its own script"
)
PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}


def as_llama_cpp_rotates(rows: Tensor, heads: int) -> Tensor:
    """Return rows of queries and keys in the order of llama.cpp: the two halves of a head are interleaved."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


@needs_converter
@pytest.mark.parametrize("kind", ["plain", "rsLoRA", "rsLoRA, whole", "patterns", "both", "pissa"])
def test_an_export_adds_the_same_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    base = write_tiny_folder(tmp_path / "base")
    if kind == "pissa":
        model = DyLoRA_MoE(str(base), 1, rank=2, init="pissa", use_rslora=True)
        stir(model)
        name = "expert_0"
    else:
        model, name = DyLoRA_MoE(str(base), 1, rank=2), "sql"
        options = {"r": 5, "lora_alpha": 7, "target_modules": list(PARTS), **KINDS[kind]}
        foreign = get_peft_model(
            DyLoRA_MoE(str(base), 1).experts.peft_model.unload(), LoraConfig(task_type="CAUSAL_LM", **options)
        )
        stir(foreign)
        foreign.save_pretrained(str(tmp_path / "sql"), save_embedding_layers=False)
        model.import_expert(tmp_path / "sql")
    model.experts.export(name, tmp_path / "out")
    command = [sys.executable, str(CONVERTER), "--base", str(base), "--outfile", str(tmp_path / "a.gguf")]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    compared = 0
    for path, layer in model.experts.peft_model.named_modules():
        if not hasattr(layer, "get_delta_weight") or name not in layer.scaling:
            continue
        number, part = path.split(".layers.")[1].split(".")[0], path.rpartition(".")[2]
        down, up = (tensors[f"blk.{number}.{PARTS[part]}.weight.lora_{one}"] for one in "ab")
        wanted = layer.get_delta_weight(name).detach()
        if part in ("q_proj", "k_proj"):
            wanted = as_llama_cpp_rotates(wanted, {"q_proj": 4, "k_proj": 2}[part])
        assert wanted.abs().max() > 1e-3
        assert relative_error(alpha / up.shape[1] * up @ down, wanted) < 1e-6
        compared += 1
    assert compared == 4 * 4
