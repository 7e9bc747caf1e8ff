"""A mixture's folder in transformers and PEFT: Auto classes, pipelines, and one expert by PEFT."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from dylo_moe import DyLoRA_MoE, DyLoRAConfig

IDS = torch.tensor([[5, 6, 7, 8, 9, 40]])


def logits_of_a_new_process(code: str, folder: Path, cache: Path) -> torch.Tensor:
    """Run code that makes ``model`` in a new process, and return the mixture's logits for ``IDS``."""
    program = f"""
import sys, json
folder = sys.argv[1]
{code}
import torch
print(json.dumps([type(model).__name__, model(torch.tensor({IDS.tolist()})).logits.tolist()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    name, logits = json.loads(done.stdout.splitlines()[-1])
    assert name == "DyLoRA_MoE"
    return torch.tensor(logits)


def wanted(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return DyLoRA_MoE.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize(
    "code",
    [
        "import dylo_moe\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "from transformers import AutoModelForCausalLM\nimport dylo_moe\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n",
    ],
    ids=["imported before transformers", "imported after transformers", "not imported"],
)
def test_a_new_process_loads_the_folder(code: str, folder: Path, tmp_path: Path) -> None:
    assert torch.allclose(logits_of_a_new_process(code, folder, tmp_path), wanted(folder), atol=1e-6)


def test_without_the_import_and_without_trust_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="trust_remote_code=True"):
        logits_of_a_new_process(
            "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(folder)",
            folder,
            tmp_path,
        )


def test_the_auto_classes_know_a_mixture(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is DyLoRA_MoE
    assert torch.equal(model(IDS).logits, wanted(folder))
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is DyLoRAConfig
    assert config.get_text_config().max_position_embeddings == model.config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("def f(x):").input_ids) == "def f(x):"


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}], ids=str)
def test_the_asked_dtype_is_that_of_the_base(options: dict[str, torch.dtype], folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert model.dtype == model.experts.base_model.lm_head.weight.dtype == torch.bfloat16


def test_attention_and_device_reach_the_base(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", device_map="cpu")
    assert model.experts.base_model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"


@pytest.mark.parametrize("by", ["folder", "object"])
def test_a_pipeline_generates_what_generate_does(by: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = DyLoRA_MoE.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if by == "folder":
        generate = pipeline("text-generation", str(folder), device="cpu")
    else:
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    got = generate("def f(x):", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert len(new) > 1
    assert got == tokenizer.decode(new, skip_special_tokens=True)
    assert "is not supported" not in capfd.readouterr().err


def test_peft_alone_loads_one_expert(folder: Path) -> None:
    model = DyLoRA_MoE.from_pretrained(folder)
    name = model.experts.names[1]
    expert = AutoPeftModelForCausalLM.from_pretrained(folder / "experts" / name).eval()
    with torch.no_grad():
        got = expert(input_ids=IDS).logits
        assert torch.allclose(got, model(IDS, adapter_names=[name]).logits, atol=1e-5)
        assert not torch.allclose(got, model(IDS).logits, atol=1e-2)


def test_peft_says_that_a_mixture_is_no_adapter(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
