"""The ways to make one model of adapters that were trained apart."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import create_arrow_model
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from benchmarks.mixture.plain_lora import DTYPE, train
from benchmarks.mixture.setting import Batch, answers_of, batches_of, load_base
from dylo_moe.core import DyLoRA_MoE
from dylo_moe.data import TokenRows
from dylo_moe.skills import SkillFeatures, extract_features, mixture_of
from dylo_moe.skills.discriminant import Discriminant, solve_discriminant
from dylo_moe.skills.features import base_features
from dylo_moe.skills.ridge_gate import RidgeGate

TUNE_STEPS = 60
"""Steps that a gate is trained for, the mixture's and X-LoRA's."""


@dataclass
class Arm:
    """One model made of adapters.

    Attributes:
        model: The model, with ``forward`` and ``generate``.
        seconds: Time that making it took, without loading the base and the adapters.
        extra: From a batch and its task's number to further arguments of ``forward`` and ``generate``.
        routes: From those arguments and the result of a forward to the adapter of each token, ``(batch, seq)``; None
            where there is none.
    """

    model: Any
    seconds: float = 0.0
    extra: Callable[[Batch, int], dict[str, Any]] = lambda batch, task: {}
    routes: Callable[[dict[str, Any], Any], Tensor] | None = None


@dataclass(frozen=True)
class Setting:
    """What the arms are made of.

    Attributes:
        adapters: Folder of each task's adapter, by the task's name.
        samples: Examples of each task that say where its texts go.
        tokenizer: The base's tokenizer.
        work: Folder for what is kept between runs.
        seed: Seed of this repetition.
    """

    adapters: Mapping[str, Path]
    samples: Mapping[str, TokenRows]
    tokenizer: PreTrainedTokenizerBase
    work: Path
    seed: int
    features: dict[str, SkillFeatures] = field(default_factory=dict)
    """What the frozen base makes of the examples, by task; computed once."""
    ends: dict[str, Tensor] = field(default_factory=dict)
    """What the router reads at the end of each example's prompt, by task; computed once."""

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [*self.adapters]

    def without(self, name: str) -> "Setting":
        """Return the same without one task."""
        adapters, samples = dict(self.adapters), dict(self.samples)
        del adapters[name], samples[name]
        return replace(self, adapters=adapters, samples=samples)

    def solve(self, model: DyLoRA_MoE) -> float:
        """Solve the router of a mixture from the examples, and return the seconds that it took."""
        started = time.monotonic()
        for name in self.names:
            if name not in self.features:
                self.features[name] = extract_features(model, batches_of(self.samples[name], self.tokenizer))
        gate = RidgeGate(model.router.hidden_size)
        for index, name in enumerate(self.names):
            gate.learn(self.features[name].tokens, index)
        with torch.no_grad():
            model.router.gates[0].copy_(gate.weight())
        model.set_maturity()
        return time.monotonic() - started

    def tune(self, model: torch.nn.Module, rate: float) -> None:
        """Train what has gradients on the examples of all tasks."""
        rows: Dataset[Any] = ConcatDataset([self.samples[name] for name in self.names])
        set_seed(self.seed)
        train(model, rows, self.tokenizer, self.work / "tune", rate=rate, seed=self.seed, steps=TUNE_STEPS)
        model.train(False)


def base_arm(setting: Setting) -> Arm:
    """Return the base model alone."""
    return Arm(load_base(DTYPE).eval())


def oracle_arm(setting: Setting) -> Arm:
    """Return each task's own adapter, loaded by PEFT."""
    names = setting.names
    model = peft_model(setting)

    def extra(batch: Batch, task: int) -> dict[str, Any]:
        model.set_adapter(names[task])
        return {}

    return Arm(model, extra=extra)


def composed(setting: Setting) -> tuple[DyLoRA_MoE, float]:
    """Return the mixture that ``compose`` makes, and the seconds that solving its router took."""
    model = mixture_of(setting.adapters, load_base(DTYPE))
    return model, setting.solve(model)


def compose_arm(setting: Setting) -> Arm:
    """Return what ``compose`` makes: the closed-form gate, one adapter a token."""
    model, seconds = composed(setting)
    return Arm(model, seconds, routes=router_choice)


def dense_arm(setting: Setting) -> Arm:
    """Return the same gate, with all adapters mixed by their softmax."""
    model, seconds = composed(setting)
    model.set_maturity(0)
    return Arm(model, seconds, routes=router_choice)


def finetuned_arm(setting: Setting, rate: float) -> Arm:
    """Return what ``compose --finetune_router`` makes: the gate trained on the examples' loss."""
    model, seconds = composed(setting)
    started = time.monotonic()
    model.router.requires_grad_(True)
    setting.tune(model, rate)
    return Arm(model, seconds + time.monotonic() - started, routes=router_choice)


def request_arm(setting: Setting) -> Arm:
    """Choose one adapter for each request, by the mean of the gate's logits over the prompt."""
    model, seconds = composed(setting)
    gate = model.router.gates[0].detach().float()
    names = setting.names

    def extra(batch: Batch, task: int) -> dict[str, Any]:
        prompts = batch["attention_mask"]
        if "labels" in batch:
            prompts = prompts * (batch["labels"] == -100)
        features = extract_features(model, [{"input_ids": batch["input_ids"], "attention_mask": prompts}])
        chosen = (features.routed.to(gate) @ gate.T).argmax(dim=-1)
        return {"adapter_names": [names[index] for index in chosen.tolist()]}

    def routes(extra: dict[str, Any], output: Any) -> Tensor:
        return torch.tensor([[names.index(name)] for name in extra["adapter_names"]])

    return Arm(model, seconds, extra, routes)


def discriminant_request_arm(setting: Setting) -> Arm:
    """Choose one adapter for each request, by a linear discriminant of what the router reads at the prompt's end."""
    model, seconds, discriminant = with_discriminant(setting)
    names = setting.names

    def extra(batch: Batch, task: int) -> dict[str, Any]:
        chosen = discriminant.logits(at_prompt_end(model, batch)).argmax(dim=-1)
        return {"adapter_names": [names[index] for index in chosen.tolist()]}

    def routes(extra: dict[str, Any], output: Any) -> Tensor:
        return torch.tensor([[names.index(name)] for name in extra["adapter_names"]])

    return Arm(model, seconds, extra, routes)


def mixed_request_arm(setting: Setting) -> Arm:
    """Mix the adapters of each request by the probabilities of the same discriminant."""
    model, seconds, discriminant = with_discriminant(setting)

    def extra(batch: Batch, task: int) -> dict[str, Any]:
        weights = discriminant.logits(at_prompt_end(model, batch)).softmax(dim=-1)
        return {"routing_weights": weights.float()[:, None]}

    def routes(extra: dict[str, Any], output: Any) -> Tensor:
        return extra["routing_weights"].argmax(dim=-1)  # type: ignore[no-any-return]

    return Arm(model, seconds, extra, routes)


def discriminant_token_arm(setting: Setting) -> Arm:
    """Choose an adapter for each token, by the discriminant as the router's gate."""
    model, seconds, discriminant = with_discriminant(setting)
    # a gate has no bias: its input has about the same part along the mean in every text
    ends = torch.cat([setting.ends[name] for name in setting.names]).double().mean(dim=0)
    with torch.no_grad():
        model.router.gates[0].copy_(discriminant.weight + discriminant.bias[:, None] * ends / ends.square().sum())
    return Arm(model, seconds, routes=router_choice)


def with_discriminant(setting: Setting) -> tuple[DyLoRA_MoE, float, Discriminant]:
    """Return a mixture of the adapters, the seconds that solving took, and the discriminant of the samples."""
    model = mixture_of(setting.adapters, load_base(DTYPE))
    model.set_maturity()
    started = time.monotonic()
    for name in setting.names:
        if name not in setting.ends:
            batches = batches_of(setting.samples[name], setting.tokenizer)
            setting.ends[name] = torch.cat([at_prompt_end(model, batch) for batch in batches])
    discriminant = solve_discriminant([setting.ends[name] for name in setting.names])
    return model, time.monotonic() - started, discriminant


def at_prompt_end(model: DyLoRA_MoE, batch: Batch) -> Tensor:
    """Return what the router reads at the last token of each prompt, ``(batch, hidden_size)``."""
    routed = base_features(model, batch["input_ids"], batch["attention_mask"]).routed
    if "labels" in batch:
        last = answers_of(batch).long().argmax(dim=1)  # predicts the first token of the answer
    else:
        places = torch.arange(routed.shape[1]) * batch["attention_mask"]
        last = places.argmax(dim=1)
    return routed[torch.arange(len(last)), last].float().cpu()


def uniform_arm(setting: Setting) -> Arm:
    """Mix all adapters at equal weights that sum to 1."""
    weights = torch.full((1, 1, len(setting.adapters)), 1 / len(setting.adapters))
    return Arm(mixture_of(setting.adapters, load_base(DTYPE)), extra=lambda batch, task: {"routing_weights": weights})


def arrow_arm(setting: Setting) -> Arm:
    """Return PEFT's Arrow (Ostapenko et al. 2024, arXiv 2405.11157): routes by the adapters' own singular vectors."""
    started = time.monotonic()
    config = ArrowConfig(top_k=min(3, len(setting.adapters)), router_temperature=1.0)
    paths = [str(path) for path in setting.adapters.values()]
    model = create_arrow_model(load_base(DTYPE), paths, config).eval()
    return Arm(model, time.monotonic() - started)


def xlora_arm(setting: Setting, rate: float) -> Arm:
    """Return PEFT's X-LoRA (Buehler and Buehler 2024, arXiv 2402.07148), trained as long as the tuned gate."""
    base = load_base(DTYPE)
    base.config.use_cache = False
    paths = {str(index): str(path) for index, path in enumerate(setting.adapters.values())}  # the names that it gives
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters=paths,
        xlora_depth=1,
        layerwise_scalings=False,
    )
    model = get_peft_model(base, config)
    started = time.monotonic()
    setting.tune(model, rate)
    return Arm(model.eval(), time.monotonic() - started)


def peft_model(setting: Setting) -> PeftModel:
    """Return the base with all adapters, by PEFT."""
    first, *others = setting.names
    model = PeftModel.from_pretrained(load_base(DTYPE), setting.adapters[first], first)
    for name in others:
        model.load_adapter(setting.adapters[name], name)
    return model.eval()


def merge_arm(setting: Setting, kind: str, scale: float, density: float | None) -> Arm:
    """Return one of PEFT's merges, all adapters at ``scale`` divided by their number."""
    names, model = setting.names, peft_model(setting)
    started = time.monotonic()
    set_seed(setting.seed)
    options = {} if density is None else {"density": density}
    model.add_weighted_adapter(names, [scale / len(names)] * len(names), "merged", combination_type=kind, **options)
    model.set_adapter("merged")
    for name in names:
        model.delete_adapter(name)
    return Arm(model.eval(), time.monotonic() - started)


def lora_arm(folder: Path) -> Arm:
    """Return one LoRA, for all tasks."""
    return Arm(PeftModel.from_pretrained(load_base(DTYPE), folder).eval())


def router_choice(extra: dict[str, Any], output: Any) -> Tensor:
    """Return the adapter that a mixture's router gave most weight, at each token."""
    return output.routing_weights[0].argmax(dim=-1)  # type: ignore[no-any-return]


ARMS: dict[str, Callable[[Setting], Arm]] = {
    "base": base_arm,
    "oracle": oracle_arm,
    "compose": compose_arm,
    "compose, dense": dense_arm,
    "by request": request_arm,
    "by request, discriminant": discriminant_request_arm,
    "by request, mixed": mixed_request_arm,
    "compose, discriminant": discriminant_token_arm,
    "uniform mean": uniform_arm,
    "arrow": arrow_arm,
}

TUNED_ARMS: dict[str, Callable[[Setting, float], Arm]] = {"compose, finetuned": finetuned_arm, "x-lora": xlora_arm}
