"""A mixture with random experts in a folder next to its base model, and the arguments of every trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dylo_moe import DyLoRA_MoE
from tests.support.families import stir
from tests.support.tiny_folder import tiny_config, tiny_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}
"""Arguments of any trainer of transformers or TRL: on the CPU, with little output and large steps."""


def write_base(folder: Path) -> Path:
    """Write a random Llama, each part of which changes its logits, and a tokenizer with a chat template."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = tiny_config(len(tokenizer))
    config.initializer_range = 0.2
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mixture_on(base: Path, routing: str = "prefix:1", **options: Any) -> DyLoRA_MoE:
    """Return an unsaved mixture whose experts and router have large random values."""
    torch.manual_seed(1)
    model = DyLoRA_MoE(str(base), **{"num_experts": 3, "rank": 4, "routing": routing, **options})
    stir(model, 2)
    with torch.no_grad():
        for gate in model.router.gates:
            gate.mul_(20)
    return model.eval()


def write_mixture(folder: Path, base: Path, routing: str = "prefix:1", **options: Any) -> Path:
    """Write ``mixture_on`` into a folder."""
    mixture_on(base, routing, **options).save_pretrained(folder)
    return folder


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of all tensors of a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def kind_of(name: str) -> str:
    """Return ``experts``, ``router`` or ``base``: the part of a mixture that a tensor belongs to."""
    return "router" if name.startswith("router.") else "experts" if "lora_" in name else "base"


def moved(before: dict[str, Tensor], model: torch.nn.Module) -> set[str]:
    """Return the parts, of experts, router and base, that are not bit-equal to before."""
    after = model.state_dict()
    return {kind_of(name) for name, value in before.items() if not torch.equal(value, after[name])}


def forward_in_child(model: DyLoRA_MoE, ids: Tensor, results: Any) -> None:
    """Put the logits of a forward into a queue; here, because a spawned process can import this module."""
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put(model(ids).logits.tolist())
