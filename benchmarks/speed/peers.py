"""Other methods with several LoRA experts: PEFT's Arrow and X-LoRA, the package ``mixlora``, and a pass per expert.

Not covered: methods whose code is not on PyPI. ``mixlora`` is not a dependency of this project; if it is not installed
(``pip install --no-deps mixlora==0.2.3``) the benchmark reports that and continues.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

LIBRARIES = {"arrow": "PEFT Arrow (top-2)", "xlora": "PEFT X-LoRA", "mixlora": "MixLoRA 0.2.3 (MLP, top-2)"}
"""Titles of the other libraries and methods."""


def arrow(base: PreTrainedModel, adapter_paths: list[str]) -> PeftModel:
    """Return Arrow, where each layer weighs its experts by similarity to the token; nothing in it trains."""
    model: PeftModel = create_arrow_model(base, adapter_paths, ArrowConfig(top_k=2, rng_seed=0))
    return model


def xlora(base: PreTrainedModel, adapter_paths: list[str]) -> PeftModel:
    """Return X-LoRA with a trainable classifier and trainable experts."""
    base.config.use_cache = False  # X-LoRA refuses a base model that would use its cache
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        xlora_depth=1,
        use_trainable_adapters=True,
        adapters={str(index): path for index, path in enumerate(adapter_paths)},
    )
    return get_peft_model(base, config)


def mixlora(base: PreTrainedModel, experts: int) -> tuple[PreTrainedModel, list[nn.Parameter]]:
    """Return MixLoRA, where the MLP's three projections have experts and each token takes two, and its parameters.

    The package has no loss for its router, and does not register its experts as modules, so they are collected here.
    """
    import mixlora as package  # optional, see above

    targets = ["gate_proj", "up_proj", "down_proj"]
    # the package requires a dropout above 0; it is set to 0 below
    options = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": targets,
        "act_fn": base.config.hidden_act,
    }
    routing = {"routing_strategy": "mixlora", "num_experts": experts, "top_k": 2}
    names = {"base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA"}
    config = package.MixLoraConfig.from_config({**names, **options, **routing})
    config.adapter_name_, config.dtype_ = "default", torch.float32
    weights = dict(_mixlora_weights(base, targets, experts))
    package.inject_adapter_in_model(base, config, weights)
    parameters: list[nn.Parameter] = []
    for layer in base.model.layers:
        moe = layer.mlp.mixlora_moes["default"]
        parameters.append(moe.gate_)
        for expert in moe.experts_.values():
            expert.dropout_.p = 0.0
            parameters.extend([expert.lora_A.weight, expert.lora_B.weight])
    return base, parameters


def _mixlora_weights(base: PreTrainedModel, targets: list[str], experts: int) -> Any:
    """Yield the tensors of a random adapter, under the names that the package uses."""
    for index, layer in enumerate(base.model.layers):
        prefix = f"mixlora.layers.{index}.mlp"
        yield f"{prefix}.moe_gate.weight", nn.Parameter(torch.randn(experts, base.config.hidden_size) * 0.02)
        for target, expert in itertools.product(targets, range(experts)):
            linear = getattr(layer.mlp, target)
            path = f"{prefix}.{target}.experts.{expert}"
            yield f"{path}.lora_A.weight", torch.randn(16, linear.in_features) * 0.02
            yield f"{path}.lora_B.weight", torch.randn(linear.out_features, 16) * 0.01


class OnePassPerExpert(nn.Module):
    """A mixture without a routed layer: the base runs once for the router, and the model once per expert.

    The experts' last hidden states are mixed and the head runs once, which is cheaper than mixing logits.
    """

    def __init__(self, model: PeftModel, experts: int) -> None:
        super().__init__()
        self.model = model
        self.names = [f"expert_{index}" for index in range(experts)]
        self.router = nn.Linear(model.config.hidden_size, experts)
        self.adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        """Return the logits, and with labels the loss."""
        causal_lm: Any = self.model.get_base_model()
        backbone = causal_lm.model
        with torch.no_grad(), self.model.disable_adapter():
            features = backbone(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        weights = self.router(features).softmax(dim=-1)
        mixed = torch.zeros_like(features)
        for index, name in enumerate(self.names):
            self.model.set_adapter(name)
            hidden = backbone(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            mixed = mixed + weights[..., index, None] * hidden
        for parameter in self.adapters:  # set_adapter froze the other adapters
            parameter.requires_grad_(True)
        logits = causal_lm.lm_head(mixed)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
