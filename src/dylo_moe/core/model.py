"""``DyLoRA_MoE``: a frozen causal language model, LoRA experts on it, and a router that mixes them per token.

This is where the parts meet: it owns the experts and the router, runs the one forward that training, evaluation
and generation share, and sums the losses in one place. How to route, adapt, save or load is in its neighbours.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from dylo_moe.core import checkpoint
from dylo_moe.core.base_model import DTYPES, fingerprint, load_base_model, same_base_model
from dylo_moe.core.checkpoint import LossEntry
from dylo_moe.core.expert import ExpertManager, carried_by_layers, check_blocks, count_parameters
from dylo_moe.core.head import BackboneOutput, plain_head
from dylo_moe.core.initialise import create_experts, initialise_eva
from dylo_moe.core.losses import (
    causal_lm_loss,
    linear_causal_lm_loss,
    load_balance_loss,
    router_z_loss,
    without_padding,
)
from dylo_moe.core.packed import check_segments, positions_in_segments
from dylo_moe.core.router import MATURE, DynamicHybridRouter
from dylo_moe.core.routing import attach_router, decoder_layers, prefix_layer, resolve_routing
from dylo_moe.errors import CheckpointError, RoutingError


@dataclass
class DyLoRAOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: ``lm_loss + aux_loss``; None without labels.
        lm_loss: Cross-entropy in nats per labelled token.
        aux_loss: ``balance_coefficient * balance_loss + z_loss_coefficient * z_loss``.
        balance_loss: The balance loss before its coefficient.
        z_loss: The router z-loss before its coefficient.
        logits: ``(batch, seq, vocab)``; None with ``return_logits=False``.
        router_logits: ``(num_gates, batch, seq, num_active_experts)``; None where the router did not run.
        routing_weights: What the experts were mixed by, of the same shape; None where the router did not run.
        past_key_values: The cache, where one was asked for.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    logits: Tensor | None = None
    router_logits: Tensor | None = None
    routing_weights: Tensor | None = None
    past_key_values: Any = None


class DyLoRA_MoE(nn.Module):
    """A mixture of LoRA experts on one frozen causal language model.

    Args:
        model: A Hub id, a folder, ``"demo"``, or a loaded causal LM.
        num_experts: How many experts to create; at least 1.
        rank: Rank of each expert.
        alpha: Updates are scaled by ``alpha / rank``; ``2 * rank`` by default.
        dropout: Dropout on the experts' input while training.
        target_modules: Names of linear modules, ``"all-linear"``, or None for the attention projections.
        use_rslora: Scale updates by ``alpha / sqrt(rank)``.
        init: How experts begin: ``default``, ``gaussian`` or ``orthogonal`` as in PEFT, or ``pissa``, see
            ``initialise.initialise_pissa``. For EVA, which needs data, call ``initialise_eva`` afterwards.
        experts_per_layer: How many of the experts each block of layers carries, lowest first; see
            ``expert.carried_by_layers``. Needs ``per_layer``, where each layer has a gate for its own experts.
        routing: ``per_layer``, ``prefix:K``, ``context:K`` (both also without ``:K``, for a quarter of the layers) or
            ``final``; the default is what ``benchmarks/quality.py`` found best.
        top_k: Experts per token when routing is sparse; 2 by default, or 1 where there is one expert.
        temperature: Divides the router's logits.
        balance_coefficient: Weight of the balance loss; 0 leaves it out.
        z_loss_coefficient: Weight of the router z-loss; 0 leaves it out.
        revision: Revision of the base model on the Hub.
        dtype: Floating type of a base model that is loaded here.
        attn_implementation: Attention of a base model that is loaded here; see ``load_base_model``.
        bits: 4 or 8 quantises a base model that is loaded here.

    Attributes:
        prompt_template: What stood around conversations in training, ``chat`` or ``plain``; saved with the model.

    Raises:
        ModelError: The base model cannot be had or has no target module.
        ExpertError: A number of the experts is out of its range.
        RoutingError: The mode does not fit the model, or a number of the router is out of its range.
    """

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"
    """Tell the HF Trainer to pass ``num_items_in_batch``, and to count the labels that are left after shifting."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        num_experts: int = 4,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        use_rslora: bool = False,
        init: str = "default",
        experts_per_layer: Sequence[int] | None = None,
        routing: str = "per_layer",
        top_k: int | None = None,
        temperature: float = 1.0,
        balance_coefficient: float = 0.01,
        z_loss_coefficient: float = 0.0,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        bits: int | None = None,
    ) -> None:
        base = model
        if isinstance(base, str):
            base = load_base_model(
                base, revision=revision, dtype=dtype, attn_implementation=attn_implementation, bits=bits
            )
        mode = resolve_routing(routing, len(decoder_layers(base)))
        check_blocks(experts_per_layer, num_experts, mode, len(decoder_layers(base)))
        # made before the experts: a router that cannot be is refused before the base model is changed
        per_token = min(2, num_experts) if top_k is None else top_k
        router = _make_router(base, mode, num_experts, per_token, temperature, experts_per_layer)
        experts = create_experts(
            ExpertManager(base, prefix_layer(mode), experts_per_layer),
            num_experts,
            init,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            use_rslora=use_rslora,
        )
        self._assemble(
            model if isinstance(model, str) else base.config._name_or_path,
            revision,
            mode,
            experts,
            router,
            LossEntry(balance_coefficient=balance_coefficient, z_loss_coefficient=z_loss_coefficient),
        )

    def _assemble(
        self,
        base_name: str,
        revision: str | None,
        routing: str,
        experts: ExpertManager,
        router: DynamicHybridRouter,
        losses: LossEntry,
        prompt_template: str | None = None,
    ) -> None:
        """The one place where the parts become a model, whether they are new or were read from a checkpoint."""
        super().__init__()
        self.base_name = base_name
        self.revision = revision
        self.routing = routing
        self.losses = losses
        self.prompt_template = prompt_template
        self.experts = experts
        self.model = experts.peft_model
        self.router = router
        # taken while the weights are in one piece; the base never changes
        self._fingerprint = fingerprint(experts.base_model)
        self._head_is_plain = plain_head(experts.base_model) is not None
        self._backbone_output = BackboneOutput(experts.base_model)
        attach_router(experts.base_model, routing, router, experts.routing_state, experts.active_indices)

    @property
    def config(self) -> PretrainedConfig:
        """The base model's configuration."""
        return self.experts.base_model.config

    @property
    def _no_split_modules(self) -> list[str] | set[str] | None:
        """The layers that FSDP shards each on its own; accelerate looks for this name."""
        return self.experts.base_model._no_split_modules

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.experts.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's floating type."""
        return self.experts.base_model.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        expert_load: Tensor | None = None,
        return_logits: bool = True,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> DyLoRAOutput:
        """Runs the mixture, and with ``labels`` sums its losses.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, nonzero for real tokens.
            labels: ``(batch, seq)``, not shifted, -100 where there is no loss.
            routing_weights: ``(batch, seq, num_active_experts)`` in the place of the router's.
            label_smoothing: Share of each target spread over the vocabulary.
            num_items_in_batch: Labelled tokens of the whole global batch, where this is a part of one.
            num_tokens_in_batch: Real tokens of the whole global batch.
            expert_load: How a larger batch's tokens chose the experts, ``(num_gates, num_active_experts)``; see
                ``losses.load_balance_loss``.
            return_logits: False leaves out the logits of a forward with ``labels``. The loss is then computed in
                chunks, at the labelled tokens alone, and ``backward`` can run once; it is what the Trainer does.
            segment_ids: ``(batch, seq)``, for rows that hold several examples: which example of its row a token
                belongs to, counted from 1, and 0 for padding. Examples do not see each other. Takes the place of
                ``attention_mask``.
            **kwargs: Passed to the base model.

        Returns:
            Losses, logits and router logits.

        Raises:
            RoutingError: ``segment_ids`` have a shape or an attention that cannot keep examples apart.
        """
        mask = attention_mask
        if segment_ids is not None:
            check_segments(self.experts.base_model, segment_ids)
            mask, attention_mask = (segment_ids != 0).long(), None
            kwargs |= {"position_ids": positions_in_segments(segment_ids), "use_cache": False}
        if labels is not None:
            kwargs.setdefault("use_cache", False)
            if mask is not None:
                labels = without_padding(labels, mask)
        head: Any = None
        if labels is not None and not return_logits and self._head_is_plain:
            head = self.experts.base_model.get_output_embeddings()
            # at no position: the base model itself makes no logits
            kwargs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=head.weight.device)
        with self.experts.routing_state.recording() as recorded, self._backbone_output.held(head is not None):
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, routing_weights=routing_weights, **kwargs
            )
            features = self._backbone_output.hidden_states
        result = DyLoRAOutput(past_key_values=outputs.get("past_key_values"))
        if labels is None or return_logits:
            result.logits = outputs.logits
        if recorded:
            result.router_logits = torch.stack([output.logits for output in recorded])
            result.routing_weights = torch.stack([output.weights for output in recorded])
        if labels is not None:
            counted: dict[str, Any] = {"label_smoothing": label_smoothing, "num_items": num_items_in_batch}
            if features is None:
                result.lm_loss = causal_lm_loss(outputs.logits, labels, **counted)
            else:
                result.lm_loss = linear_causal_lm_loss(features, head.weight, labels, bias=head.bias, **counted)
            self._add_losses(result, mask, num_tokens_in_batch, expert_load)
        return result

    def _add_losses(
        self, result: DyLoRAOutput, mask: Tensor | None, num_tokens: Tensor | int | None, load: Tensor | None
    ) -> None:
        assert result.lm_loss is not None
        result.loss = result.lm_loss
        if result.router_logits is None:
            return
        result.balance_loss = load_balance_loss(
            result.router_logits, mask, self.router.top_k, load=load, num_tokens=num_tokens
        )
        result.z_loss = router_z_loss(result.router_logits, mask, num_tokens=num_tokens)
        weights = self.losses
        result.aux_loss = weights.balance_coefficient * result.balance_loss + weights.z_loss_coefficient * result.z_loss
        result.loss = result.lm_loss + result.aux_loss.to(result.lm_loss.device)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with the mixture: transformers' ``generate``, each new token routed as in training."""
        with self.experts.routing_state.keeping_stacks():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Runs the base model alone, without any expert, for a block of code."""
        with self.experts.routing_state.scope(base_only=True):
            yield

    def add_expert(self, name: str | None = None, **options: Any) -> str:
        """Adds a young expert, with the options of ``ExpertManager.create``, and gives the router a row for it.

        No parameter of the older experts changes, and the ratios of their routing weights stay as they were.

        Returns:
            The expert's name.
        """
        name = self.experts.create(name, **options)
        self.router.add_expert()
        return name

    def import_expert(self, path: str | Path, name: str | None = None) -> str:
        """Adds an existing PEFT adapter as a young expert; see ``ExpertManager.import_adapter``."""
        name = self.experts.import_adapter(path, name)
        self.router.add_expert()
        return name

    def initialise_eva(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Begins the experts anew with the directions in which their inputs vary; see ``initialise.initialise_eva``.

        Args:
            batches: Of training data, each a mapping with ``input_ids``, ``attention_mask`` and, for packed rows,
                ``segment_ids``, all ``(batch, seq)``.

        Raises:
            ExpertError: The batches are too small, a layer too narrow, or the components do not settle.
        """
        known = ("input_ids", "attention_mask", "segment_ids")
        inputs = [{name: batch[name].to(self.device) for name in known if name in batch} for batch in batches]
        with self.base_only():
            initialise_eva(self.experts, lambda batch: self(**batch), inputs)

    def set_maturity(self, maturity: int = MATURE, names: Sequence[str] | None = None) -> None:
        """Marks experts mature (1) or young (0); all of them by default. Routing is sparse once all are mature."""
        if maturity not in (0, 1):
            raise RoutingError(f"maturity must be 0 (young) or 1 (mature), got {maturity}")
        self.experts.check_known(names or [])
        for name in self.experts.names if names is None else names:
            self.router.maturity[self.experts.names.index(name)] = maturity

    def num_trainable_parameters(self) -> int:
        """How many parameters train: those with a gradient, without the constants that an expert holds."""
        held = self.experts.held & set(self.experts.active) - self.experts.frozen
        return count_parameters(self, trainable=True) - sum(self.experts.num_parameters(name) // 2 for name in held)

    def num_base_parameters(self) -> int:
        """How many parameters the frozen base has, counted."""
        return count_parameters(self.model) - sum(map(self.experts.num_parameters, self.experts.names))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Trades time for memory in training; the recomputation routes as the first run did.

        Under routing ``context:K`` each backward has to come before the next forward, as in the Trainer.

        Args:
            activation_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``.
            **options: Passed to the base model's method of the same name.

        Raises:
            RoutingError: ``use_reentrant`` was asked for: it would lose the gradient to the router.
        """
        for_torch = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if for_torch["use_reentrant"]:
            raise RoutingError("activation checkpointing needs use_reentrant=False here, got True")
        self.experts.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs=for_torch, **options)

    def activation_checkpointing_disable(self) -> None:
        """Ends activation checkpointing."""
        self.experts.base_model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The older name of ``activation_checkpointing_enable``."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of ``activation_checkpointing_disable``."""
        self.activation_checkpointing_disable()

    def save_pretrained(
        self, path: str | Path, state: dict[str, Tensor] | None = None, *, in_place: bool = False
    ) -> None:
        """Writes a checkpoint folder; what was there before is replaced only once the new one is whole.

        Args:
            path: The folder.
            state: Whole tensors of the experts and the router as in ``state_dict``, where this model holds parts.
            in_place: Rename no folder, as object storage cannot; the old one is gone while the new one is copied.

        Raises:
            CheckpointError: It could not be written.
        """
        with checkpoint.atomic_directory(Path(path), marker=checkpoint.DESCRIPTION_FILE, in_place=in_place) as folder:
            self.write_files(folder, state)

    def write_files(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes the files of a checkpoint into a folder that is the caller's to make whole; ``state`` as above."""
        adapters, router = None, self.router.state_dict()
        if state is not None:
            adapters, router = _beginning_with("model.", state), _beginning_with("router.", state)
        checkpoint.write_files(folder, self.model, router, self._describe(), adapters)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, model: str | PreTrainedModel | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Loads a checkpoint folder, ready to evaluate.

        Args:
            path: The folder.
            model: The base model, loaded or by name; the one that the checkpoint names by default.
            dtype: Floating type of a base model that is loaded here; the checkpoint's by default.

        Raises:
            CheckpointError: The folder is not whole, or belongs to another base model.
            ModelError: The base model cannot be had.
        """
        path = Path(path)
        description = checkpoint.read_description(path)
        base, name, revision = _base_of(path, description.base_model, model, dtype)
        routing = description.routing
        mode = resolve_routing(routing.mode, len(decoder_layers(base)))
        blocks = routing.experts_per_layer
        router = _make_router(base, mode, len(description.experts), routing.top_k, routing.temperature, blocks)
        experts = ExpertManager(base, prefix_layer(mode), blocks)
        for expert in description.experts:
            experts.import_adapter(path / checkpoint.EXPERTS_FOLDER / expert.name, expert.name)
        self = cls.__new__(cls)
        self._assemble(name, revision, mode, experts, router, description.losses, description.prompt_template)
        self.router.load_state_dict(checkpoint.read_router(path, router.state_dict()))
        self.router.maturity = [expert.maturity for expert in description.experts]
        self.experts.freeze(*(expert.name for expert in description.experts if expert.frozen))
        return self.eval()

    def load_weights(self, path: str | Path) -> None:
        """Loads the weights of a checkpoint into this model, which must have the same experts and routing.

        Raises:
            CheckpointError: The folder is not whole, or has other experts or another routing.
        """
        path = Path(path)
        description = checkpoint.read_description(path)
        theirs = ([expert.name for expert in description.experts], description.routing.mode)
        ours = (self.experts.names, self.routing)
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint {path} has experts {', '.join(theirs[0])} under routing {theirs[1]}, and this run "
                f"has {', '.join(ours[0])} under {ours[1]}; give the flags of the run that wrote it"
            )
        if not same_base_model(self._fingerprint, description.base_model.fingerprint):
            raise CheckpointError(
                f"the checkpoint {path} belongs to another base model, {description.base_model.name!r}"
            )
        router = checkpoint.read_router(path, self.router.state_dict())
        folders = {name: path / checkpoint.EXPERTS_FOLDER / name for name in self.experts.names}
        for name, folder in folders.items():
            self.experts.fitting_weights(name, folder)
        # all of it fits: a checkpoint that does not has changed nothing
        for name, folder in folders.items():
            self.experts.load_weights(name, folder)
        self.router.load_state_dict(router)
        self.router.maturity = [expert.maturity for expert in description.experts]

    def _describe(self) -> checkpoint.Description:
        router = self.router
        entries = [
            checkpoint.ExpertEntry(name=name, maturity=maturity, frozen=name in self.experts.frozen)
            for name, maturity in zip(self.experts.names, router.maturity, strict=True)
        ]
        return checkpoint.Description(
            dylo_moe_version=version("dylora-moe"),
            base_model=checkpoint.BaseModelEntry(
                name=self.base_name,
                revision=self.revision,
                dtype=str(self.dtype).removeprefix("torch."),
                fingerprint=self._fingerprint,
            ),
            experts=entries,
            routing=checkpoint.RoutingEntry(
                mode=self.routing,
                top_k=router.top_k,
                temperature=router.temperature,
                experts_per_layer=self.experts.blocks,
            ),
            losses=self.losses,
            prompt_template=self.prompt_template,
        )


def _beginning_with(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _make_router(
    base: PreTrainedModel,
    routing: str,
    num_experts: int,
    top_k: int,
    temperature: float,
    blocks: Sequence[int] | None,
) -> DynamicHybridRouter:
    gates = len(decoder_layers(base)) if routing == "per_layer" else 1
    carried = None if blocks is None else carried_by_layers(blocks, gates)
    hidden_size = base.config.get_text_config().hidden_size
    return DynamicHybridRouter(hidden_size, num_experts, top_k, temperature, gates, carried).to(base.device)


def _base_of(
    path: Path, entry: checkpoint.BaseModelEntry, given: str | PreTrainedModel | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, str, str | None]:
    """The base model of a checkpoint, its name and its revision; what the caller gives comes first."""
    if isinstance(given, PreTrainedModel):
        base, name, revision = given, entry.name, entry.revision
    else:
        name, revision = (entry.name, entry.revision) if given is None else (given, None)
        if not name:
            raise CheckpointError(f"the checkpoint {path} was made on a base model in memory; pass that as model=")
        base = load_base_model(name, revision=revision, dtype=dtype or DTYPES[entry.dtype])
    if not same_base_model(fingerprint(base), entry.fingerprint):
        raise CheckpointError(
            f"the checkpoint {path} belongs to the base model {entry.name!r}, and "
            f"{type(base).__name__} {given if isinstance(given, str) else name!r} is another one"
        )
    return base, name, revision
