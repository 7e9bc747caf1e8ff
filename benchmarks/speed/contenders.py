"""The models that the speed benchmark compares, each built on one frozen base whose weights they share.

A name gives the kind and the size: ``lora_r16`` and ``lora_r64`` are PEFT's plain LoRA; ``peft_4`` is PEFT with four
active adapters, whose updates are summed; ``ours_per_layer_4`` is ``DyLoRA_MoE`` with four experts. The contenders of
other libraries are in ``peers.py``, those with a shared expert and of composed adapters in ``mixtures.py``. All others
have rank 16 and no dropout on the attention projections (MixLoRA: on the MLP).
"""

import copy
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.speed import peers
from dylo_moe.core.model import DyLoRA_MoE

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
REFERENCE = "lora_r16"
BASE = "base"
OURS_TRAIN: dict[str, Any] = {"return_logits": False}
"""Training needs only the losses of our forward. The other models have no such option."""


@dataclass
class Contender:
    """A model to time.

    Attributes:
        model: The model that is called.
        trainable: Parameters that a train step updates; none for the bare base.
        train_options: Further arguments of the forward in a train step, next to input and labels.
    """

    model: Any
    trainable: list[nn.Parameter] = field(default_factory=list)
    train_options: dict[str, Any] = field(default_factory=dict)


class Lineup:
    """The contenders, built on demand and kept, so that all sections of one process use the same models.

    Args:
        base: Frozen base model; it is not changed.
        seed: Seed of every random weight.

    Attributes:
        not_run: Reason why a contender was not run, by its name.
    """

    def __init__(self, base: PreTrainedModel, seed: int = 0) -> None:
        self.base = base
        self.seed = seed
        self.not_run: dict[str, str] = {}
        self._built: dict[str, Contender] = {}

    def get(self, name: str) -> Contender | None:
        """Return the contender of this name; None if its library is not installed."""
        if name not in self._built and name not in self.not_run:
            torch.manual_seed(self.seed)
            try:
                self._built[name] = build(name, shared_copy(self.base))
            except ImportError as error:
                self.not_run[name] = f"not run: {error}"
        return self._built.get(name)


def label(name: str) -> str:
    """Return a contender's name in plain words."""
    fixed = {BASE: "frozen base, no adapter", "lora_r16": "PEFT LoRA, rank 16", "lora_r64": "PEFT LoRA, rank 64"}
    if name in fixed:
        return fixed[name]
    kind, _, number = name.rpartition("_")
    experts = "1 expert" if number == "1" else f"{number} experts"
    if kind.startswith("ours_"):
        return f"ours, {kind.removeprefix('ours_').replace('_', ' ')}, {experts}"
    words = {"peft": f"PEFT, {number} adapters active (their sum)", "naive": f"{int(number) + 1} passes, {experts}"}
    return words.get(kind) or f"{peers.LIBRARIES[kind]}, {experts}"


def shared_copy(base: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that has its own modules, which a caller may wrap, and shares the weights of the original."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def build(name: str, base: PreTrainedModel) -> Contender:
    """Build the contender of this name on a base model that it may change."""
    if name == BASE:
        return Contender(base)
    if match := re.fullmatch(r"lora_r(\d+)", name):
        return _trained(lora_model(base, 1, rank=int(match[1])))
    kind, _, number = name.rpartition("_")
    experts = int(number)
    if kind.startswith("ours_"):
        return Contender(*_ours(base, kind.removeprefix("ours_"), experts), OURS_TRAIN)
    if kind == "peft":
        return _trained(lora_model(base, experts))
    if kind == "naive":
        return _trained(peers.OnePassPerExpert(lora_model(base, experts), experts))
    if kind == "mixlora":
        return Contender(*peers.mixlora(base, experts))
    with tempfile.TemporaryDirectory() as folder:
        paths = saved_adapters(shared_copy(base), experts, Path(folder))
        return _trained(peers.xlora(base, paths) if kind == "xlora" else peers.arrow(base, paths))


def lora_model(base: PreTrainedModel, adapters: int, rank: int = 16) -> PeftModel:
    """Return PEFT's LoRA with this many adapters, all active and trainable."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS)
    model = get_peft_model(base, config, adapter_name="expert_0")
    for index in range(1, adapters):
        model.add_adapter(f"expert_{index}", config)
    tuner: Any = model.base_model
    tuner.set_adapter([f"expert_{index}" for index in range(adapters)])
    randomize(model)
    return model


def saved_adapters(base: PreTrainedModel, count: int, folder: Path) -> list[str]:
    """Write random adapters in PEFT's format, for libraries that read them from disk, and return their folders."""
    model = lora_model(base, count)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return [str(folder / f"expert_{index}") for index in range(count)]


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every adapter an effect: a new one has ``B = 0``, and products with zeros prove little."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


def _trained(model: nn.Module) -> Contender:
    return Contender(model, trainable_parameters(model))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _ours(base: PreTrainedModel, routing: str, experts: int) -> tuple[DyLoRA_MoE, list[nn.Parameter]]:
    model = DyLoRA_MoE(base, num_experts=min(experts, 4), rank=16, alpha=32, routing=routing)
    if experts > 4:
        _grow(model, experts)
    randomize(model)
    model.set_maturity()  # sparse, top 2, when evaluating; training stays dense
    return model, trainable_parameters(model)


def _grow(model: DyLoRA_MoE, experts: int) -> None:
    """Add experts by copying the first one.

    ``add_expert`` visits all modules of the model, so its time grows with the number of experts; for 256 experts it
    takes longer than the rest of the benchmark. The result is the same.
    """
    manager, known = model.experts, model.experts.names[0]
    names = [f"expert_{index}" for index in range(len(manager.names), experts)]
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name in names:
            for table in (layer.r, layer.lora_alpha, layer.scaling, layer.lora_bias, layer.use_rslora, layer.use_dora):
                table[name] = table[known]
            layer.lora_dropout[name] = nn.Identity()
            layer.lora_A[name] = copy.deepcopy(layer.lora_A[known])
            layer.lora_B[name] = copy.deepcopy(layer.lora_B[known])
    for name in names:
        model.model.peft_config[name] = model.model.peft_config[known]
        manager.names.append(name)
        model.router.add_expert()
    for gate in model.router.gates:  # equal rows would leave the choice to ties
        nn.init.normal_(gate, std=0.02)
    manager.activate_all()


def random_tokens(base: PreTrainedModel, batch: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids ``(batch, length)``, uniform over the vocabulary."""
    vocabulary = base.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
