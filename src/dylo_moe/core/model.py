"""``DyLoRA_MoE``: a frozen causal language model, LoRA experts on it, and a router that mixes them per token.

This is where the parts meet: it owns the experts and the router, runs the one forward that training, evaluation
and generation share, and sums the losses in one place. How to route, adapt, save or load is in its neighbours.

A mixture is a ``PreTrainedModel``: the Trainer, TRL, pipelines and evaluation harnesses ask ``isinstance`` and a dozen
methods of whatever they are given, and a saved mixture is a folder that ``AutoModelForCausalLM`` reads. Its ``config``
is the base model's own, since whoever reads it wants to know of the vocabulary, the positions or the attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from dylo_moe.core import save_and_load
from dylo_moe.core.balance import load_balance_loss, router_z_loss
from dylo_moe.core.base_model import fingerprint, load_base_model, name_of
from dylo_moe.core.caches import with_cache_renamed
from dylo_moe.core.checkpoint import LossEntry
from dylo_moe.core.configuration import DyLoRAConfig, register
from dylo_moe.core.context import real_tokens
from dylo_moe.core.decoder import argument_names, is_wrapped
from dylo_moe.core.expert import ExpertManager, check_blocks
from dylo_moe.core.head import linear_lm_head
from dylo_moe.core.initialise import create_experts, initialise_eva
from dylo_moe.core.losses import causal_lm_loss, linear_causal_lm_loss, without_padding
from dylo_moe.core.ordinary_model import OrdinaryModel, rows_of_experts
from dylo_moe.core.packed import check_segments, positions_in_segments, supports_packing
from dylo_moe.core.routed_forward import check_weights
from dylo_moe.core.router import MATURE, DynamicHybridRouter
from dylo_moe.core.routing import RouterHooks, make_router
from dylo_moe.core.routing_state import ForwardRecord
from dylo_moe.errors import RoutingError
from dylo_moe.routing_mode import RoutingMode


@dataclass
class DyLoRAOutput(CausalLMOutputWithPast):
    """What a forward returns: what any causal LM does, and what became of the router.

    ``loss`` is ``lm_loss + aux_loss`` while training, and ``lm_loss`` alone while evaluating, so that its exponential
    is a perplexity; it is None without labels. ``logits`` are None with ``return_logits=False``.

    Attributes:
        lm_loss: Cross-entropy in nats per labelled token.
        aux_loss: ``balance_coefficient * balance_loss + z_loss_coefficient * z_loss``.
        balance_loss: The balance loss before its coefficient.
        z_loss: The router z-loss before its coefficient.
        router_logits: ``(num_gates, batch, seq, num_active_experts)``; None where the router did not run.
        routing_weights: What the experts were mixed by, of the same shape; None where the router did not run.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: Tensor | None = None
    routing_weights: Tensor | None = None


class DyLoRA_MoE(OrdinaryModel, GenerationMixin):
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

    config_class = DyLoRAConfig

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
        # outside inference mode: what is made in it could not be trained later
        with torch.inference_mode(False):
            experts = ExpertManager(base)
            layers = len(experts.decoder.layers)
            mode = RoutingMode.parse(routing, layers)
            check_blocks(experts_per_layer, num_experts, mode, layers)
            # made before the experts: a router that cannot be is refused before the base model is changed
            per_token = min(2, num_experts) if top_k is None else top_k
            router = make_router(experts, mode, num_experts, per_token, temperature, experts_per_layer)
            experts.carry_on(mode.first_expert_layer, experts_per_layer)
            create_experts(
                experts,
                num_experts,
                init,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                target_modules=target_modules,
                use_rslora=use_rslora,
            )
            losses = LossEntry(balance_coefficient=balance_coefficient, z_loss_coefficient=z_loss_coefficient)
            name, revision = name_of(model, revision)
            self._assemble(name, revision, mode, experts, router, losses)

    def _assemble(
        self,
        base_name: str,
        revision: str | None,
        mode: RoutingMode,
        experts: ExpertManager,
        router: DynamicHybridRouter,
        losses: LossEntry,
        prompt_template: str | None = None,
    ) -> None:
        """Make a model of its parts, whether they are new or were read from a checkpoint."""
        super().__init__(experts)
        self.base_name = base_name
        self.revision = revision
        self.routing_mode = mode
        self.losses = losses
        self.prompt_template = prompt_template
        self.tokenizer: Any = None
        self.model = experts.peft_model
        self.router = router
        base, decoder = experts.base_model, experts.decoder
        # taken while the weights are in one piece; the base never changes
        self._fingerprint = fingerprint(base)
        self._head_is_plain = linear_lm_head(base, decoder.backbone) is not None
        self._argument_names = argument_names(base)
        self._keeps_examples_apart: bool | None = None
        hooks = RouterHooks(base, decoder, mode, router, experts.routing_state, experts.active_indices)
        self._mark_config(hooks.undo)

    @property
    def routing(self) -> str:
        """The routing mode as text, such as ``prefix:4``."""
        return str(self.routing_mode)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        smoothing: float = 0.0,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        expert_load: Tensor | None = None,
        return_logits: bool = True,
        return_dict: bool | None = None,
        segment_ids: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> DyLoRAOutput | tuple[Any, ...]:
        """Run the mixture, and with ``labels`` sum its losses.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, nonzero for real tokens; or ``(batch, 1, seq, seq)``, which tokens each
                token sees.
            labels: ``(batch, seq)``, not shifted, -100 where there is no loss.
            routing_weights: ``(batch, seq, num_active_experts)`` instead of the router's; batch and seq may be 1.
            position_ids: ``(batch, seq)``.
            inputs_embeds: ``(batch, seq, hidden_size)`` instead of ``input_ids``.
            logits_to_keep: Make logits for so many last tokens alone, or at these positions; 0 for all.
            smoothing: Share of each target spread over the vocabulary; also taken as ``label_smoothing``.
            num_items_in_batch: Labelled tokens of the whole global batch, where this is a part of one.
            num_tokens_in_batch: Real tokens of the whole global batch.
            expert_load: How a larger batch's tokens chose the experts, ``(num_gates, num_active_experts)``; see
                ``balance.load_balance_loss``.
            return_logits: False leaves out the logits of a forward with ``labels``. The loss is then computed in
                chunks, at the labelled tokens alone, and ``backward`` can run once; it is what the Trainer does.
            return_dict: False returns a tuple, the loss first where there are labels; the configuration's by default.
            segment_ids: ``(batch, seq)``, for rows that hold several examples: which example of its row a token
                belongs to, counted from 1, and 0 for padding. Examples do not see each other. Takes the place of
                ``attention_mask``.
            adapter_names: The expert of each row, or ``__base__`` for the base alone, instead of the router's choice.
            **kwargs: Passed to the base model; a cache as ``cache`` or ``past_key_values``.

        Returns:
            Losses, logits, cache and router logits.

        Raises:
            RoutingError: ``segment_ids`` have a shape or an attention that cannot keep examples apart, or
                ``adapter_names`` are none of the active experts.
        """
        smoothing = kwargs.pop("label_smoothing", smoothing)
        kwargs = with_cache_renamed(kwargs, self._argument_names)
        mask = attention_mask
        if segment_ids is not None:
            self._check_segments(segment_ids)
            mask, attention_mask = (segment_ids != 0).long(), None
            position_ids = positions_in_segments(segment_ids)
            kwargs["use_cache"] = False
        if labels is not None:
            kwargs.setdefault("use_cache", False)
            if mask is not None:
                labels = without_padding(labels, real_tokens(mask))
        head: Any = None
        if labels is not None and not return_logits and self._head_is_plain:
            head = self.experts.base_model.get_output_embeddings()
            if is_wrapped(head):  # its weight may be somewhere else
                head = None
            else:
                # at no position: the base model itself makes no logits
                kwargs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=head.weight.device)
        given = {
            "routing_weights": self._given_weights(routing_weights, adapter_names),
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "logits_to_keep": logits_to_keep if isinstance(logits_to_keep, Tensor) or logits_to_keep else None,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None and name not in kwargs}
        record = ForwardRecord(wants_features=head is not None)
        with self.experts.routing_state.scoped(record=record):
            outputs = self.experts.base_model(
                input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
            )
        result = _output_of(outputs)
        if labels is not None and not return_logits:
            result.logits = None
        if record.router_logits:
            device = outputs.logits.device
            result.router_logits = torch.stack([logits.to(device) for logits in record.router_logits])
            result.routing_weights = torch.stack([weights.to(device) for weights in record.routing_weights])
        if labels is not None:
            counted: dict[str, Any] = {"label_smoothing": smoothing, "num_items": num_items_in_batch}
            if record.features is None:
                result.lm_loss = causal_lm_loss(outputs.logits, labels, **counted)
            else:
                result.lm_loss = linear_causal_lm_loss(record.features, head.weight, labels, bias=head.bias, **counted)
            self._add_losses(result, None if mask is None else real_tokens(mask), num_tokens_in_batch, expert_load)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def _check_segments(self, segment_ids: Tensor) -> None:
        check_segments(self.experts.base_model, segment_ids)
        if self._keeps_examples_apart is None:
            with self.base_only():
                self._keeps_examples_apart = supports_packing(self.experts.base_model)
        if not self._keeps_examples_apart:
            raise RoutingError(
                f"segment_ids: {type(self.experts.base_model).__name__} lets the examples of a row see each other; "
                "give each example a row of its own"
            )

    def _given_weights(self, routing_weights: Tensor | None, adapter_names: Sequence[str] | None) -> Tensor | None:
        if adapter_names is None:
            return routing_weights
        if routing_weights is not None:
            raise RoutingError("adapter_names and routing_weights both say which expert a row takes; give one of them")
        return rows_of_experts(self.experts.active, list(adapter_names), torch.float32, self.device)

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
        if self.training:
            result.loss = result.lm_loss + result.aux_loss.to(result.lm_loss.device)

    def generate(
        self,
        *args: Any,
        routing_weights: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the mixture: transformers' ``generate``, each new token routed as in training.

        Args:
            *args: As for ``transformers.GenerationMixin.generate``.
            routing_weights: Instead of the router's: ``(1, 1, num_active_experts)`` for all, ``(batch, 1, ...)`` for
                each prompt, or ``(batch, tokens, ...)`` for each token of prompt and answer; tokens beyond the last go
                as it does.
            adapter_names: The expert of each prompt, or ``__base__`` for the base alone.
            **kwargs: As for ``transformers.GenerationMixin.generate``.

        Returns:
            What ``generate`` of transformers returns.
        """
        state = self.experts.routing_state
        weights = self._given_weights(routing_weights, adapter_names)
        if weights is not None:
            weights = check_weights(weights)
        with state.cache_stacks(), state.scoped(weights=weights), self._own_ways_to_generate():
            base: Any = self.experts.base_model
            return base.generate(*args, **kwargs)

    @contextmanager
    def _own_ways_to_generate(self) -> Iterator[None]:
        """Let the base model generate with what was set on this object, such as another way to stop."""
        base, own = vars(self.experts.base_model), vars(self)
        names = [name for name in own if name.startswith("_") and callable(getattr(GenerationMixin, name, None))]
        changed = {name: own[name] for name in names if name not in base}
        base.update(changed)
        try:
            yield
        finally:
            for name in changed:
                base.pop(name, None)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by continuous batching, as ``transformers`` does.

        Raises:
            RoutingError: The mode needs more of earlier tokens than a paged cache holds.
        """
        self._check_paged()
        return self.experts.base_model.generate_batch(*args, **kwargs)  # type: ignore[operator]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Start continuous batching, as ``transformers`` does; raises as ``generate_batch``."""
        self._check_paged()
        return self.experts.base_model.init_continuous_batching(*args, **kwargs)  # type: ignore[operator]

    def _check_paged(self) -> None:
        if self.routing_mode.needs_router_cache:
            raise RoutingError(
                f"`routing` {self.routing_mode.kind.value!r} does not work with continuous batching, whose cache holds "
                "keys and values alone; use generate, or a mixture with routing per_layer or prefix:K"
            )

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Run the base model alone, without any expert, for a block of code."""
        with self.experts.routing_state.scoped(base_only=True):
            yield

    disable_adapter = base_only

    def add_expert(self, name: str | None = None, **options: Any) -> str:
        """Adds a young expert, with the options of ``ExpertManager.create``, and gives the router a row for it.

        No parameter of the older experts changes, and the ratios of their routing weights stay as they were.

        Returns:
            The expert's name.
        """
        name = self.experts.create(name, **options)
        self.router.add_expert()
        return name

    def import_expert(self, path: str | Path, name: str | None = None, revision: str | None = None) -> str:
        """Add a PEFT adapter, a folder or Hub id, as a young expert; see ``ExpertManager.import_adapter``."""
        name = self.experts.import_adapter(path, name, revision)
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
        for batch in inputs[:1]:
            if "segment_ids" in batch:  # asked now: PEFT looks into every forward that follows
                self._check_segments(batch["segment_ids"])
        with self.base_only():
            initialise_eva(self.experts, lambda batch: self(**batch), inputs)

    def set_maturity(self, maturity: int = MATURE, names: Sequence[str] | None = None) -> None:
        """Marks experts mature (1) or young (0); all of them by default. Routing is sparse once all are mature."""
        if maturity not in (0, 1):
            raise RoutingError(f"maturity must be 0 (young) or 1 (mature), got {maturity}")
        self.experts.check_known(names or [])
        for name in self.experts.names if names is None else names:
            self.router.maturity[self.experts.names.index(name)] = maturity

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        in_place: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint folder; what was there before is replaced only once the new one is whole.

        The folder is one that ``AutoModelForCausalLM.from_pretrained`` reads.

        Args:
            save_directory: The folder.
            is_main_process: False writes nothing.
            state_dict: Whole tensors of the experts and the router as in ``state_dict``, where this model holds parts.
            in_place: Rename no folder, as object storage cannot; the old one is gone while the new one is copied.
            push_to_hub: Also upload the folder, to ``repo_id`` or a repository of the folder's name.
            **kwargs: ``max_shard_size``, ``safe_serialization=True`` and ``save_function`` are taken and have no effect
                on files of this size and kind; with ``push_to_hub`` also what ``push_to_hub`` takes.

        Raises:
            CheckpointError: It could not be written, or an argument asks for another format.
        """
        save_and_load.save(self, Path(save_directory), is_main_process, state_dict, in_place, push_to_hub, kwargs)

    def write_files(
        self, folder: Path, state: Mapping[str, Tensor] | None = None, *, beside: Path | None = None
    ) -> None:
        """Write a checkpoint's files into a folder that the caller makes whole, as ``beside``; ``state`` as above."""
        save_and_load.write_files(self, folder, state, beside=beside)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, model: str | PreTrainedModel | None = None, **options: Any
    ) -> Self:
        """Load a checkpoint folder, ready to evaluate.

        Args:
            pretrained_model_name_or_path: The folder, or a Hub id.
            model: The base model, loaded or by name; the one that the checkpoint names by default.
            **options: For the base model that is loaded here: ``dtype`` (or ``torch_dtype``; the checkpoint's by
                default), ``device_map``, ``attn_implementation``, ``quantization_config`` and the like. For a Hub id:
                ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            CheckpointError: The folder is not whole, or belongs to another base model.
            ModelError: The base model cannot be had.
        """
        with torch.inference_mode(False):
            loaded: Self = save_and_load.load(cls, pretrained_model_name_or_path, model, options)
        return loaded

    def load_weights(self, path: str | Path) -> None:
        """Load the weights of a checkpoint into this model, which must have the same experts and routing.

        Raises:
            CheckpointError: The folder is not whole, or has other experts or another routing.
        """
        save_and_load.load_weights(self, Path(path))


def _output_of(outputs: ModelOutput) -> DyLoRAOutput:
    """Return what the base model gave, the cache under whatever name this version of transformers has for it."""
    known = CausalLMOutputWithPast.__dataclass_fields__
    return DyLoRAOutput(**{name: value for name, value in outputs.items() if name in known and name != "loss"})


register(DyLoRA_MoE)
