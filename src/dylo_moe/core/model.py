"""``DyLoRA_MoE``: a frozen causal language model, LoRA experts on it, and a router that mixes them per token.

It has the one forward that training, evaluation and generation share, and sums the losses in one place. How to route,
adapt, save or load is in the neighboring modules.

A mixture is a ``PreTrainedModel``, since the Trainer, TRL, pipelines and evaluation harnesses check for that and call a
dozen of its methods, and a saved mixture is a folder that ``AutoModelForCausalLM`` reads. Its ``config`` is that of the
base model, in which tools look up the vocabulary, the positions or the attention.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import can_return_tuple

from dylo_moe.core import save_and_load
from dylo_moe.core.base import argument_names, fingerprint, is_wrapped, linear_lm_head, positions_in_segments
from dylo_moe.core.configuration import DyLoRAConfig, register
from dylo_moe.core.lora import ForwardRecord, check_weights, initialize_eva
from dylo_moe.core.losses import without_padding
from dylo_moe.core.ordinary_model import OrdinaryModel
from dylo_moe.core.output import AuxLossWeights, DyLoRAOutput, LossOptions, lm_loss, make_output, sum_losses
from dylo_moe.core.parts import Parts, RouterSpec, new_parts
from dylo_moe.core.prompt_route import TOKEN, find_prompt_weights, weights_to_generate
from dylo_moe.core.routing import MATURE, RouterHooks, real_tokens, with_cache_renamed
from dylo_moe.errors import RoutingError
from dylo_moe.spec import ExpertSpec

__all__ = ["DyLoRAOutput", "DyLoRA_MoE"]


class DyLoRA_MoE(OrdinaryModel, GenerationMixin):
    """A mixture of LoRA experts on one frozen causal language model.

    Args:
        model: A Hub id, a folder, ``"demo"``, or a loaded causal LM. ``from_pretrained`` passes ``Parts`` that it has
            loaded, and no other argument.
        num_experts: Number of experts to create; at least 1.
        expert_names: Their names; ``expert_0`` and so on by default.
        rank: Rank of each expert.
        alpha: Updates are scaled by ``alpha / rank``; ``2 * rank`` by default.
        dropout: Dropout on the experts' input while training.
        target_modules: Names of linear modules, or a place; see ``ExpertSpec``.
        use_rslora: Whether to scale updates by ``alpha / sqrt(rank)``.
        init: How experts start; see ``ExpertSpec``. For EVA, which needs data, call ``initialize_eva`` afterwards.
        shared_rank: Rank of a further expert that every token has at weight 1; 0 for none.
        experts_per_layer: Number of the first experts that each block of layers carries, lowest block first; see
            ``targets.experts_per_layer``. Needs ``per_layer``, where each layer has a gate for its own experts.
        routing: Routing mode, see ``spec.routing_mode``; the default did best in ``benchmarks/quality``.
        top_k: Experts per token when routing is sparse; 2 by default, or 1 if there is one expert.
        temperature: Divisor of the router's logits.
        expert_scale: ``sum_to_one``, or ``unit`` to add up the experts as one LoRA of all their ranks does; see
            ``DynamicHybridRouter``.
        balance_coefficient: Weight of the balance loss; 0 leaves it out.
        z_loss_coefficient: Weight of the router z-loss; 0 leaves it out.
        revision: Revision of the base model on the Hub.
        dtype: Floating type of a base model that is loaded here.
        attn_implementation: Attention of a base model that is loaded here; see ``load_base_model``.
        bits: 4 or 8 quantizes a base model that is loaded here.

    Attributes:
        losses: Weights of the router's losses.
        prompt_template: Template around conversations in training, ``chat`` or ``plain``; saved with the model.
        route: How ``generate`` routes by default, ``token`` or ``prompt``; saved with the model.

    Raises:
        ModelError: The base model cannot be loaded or has no target module.
        ExpertError: An option of the experts is out of its range.
        RoutingError: The mode does not fit the model, or an option of the router is out of its range.
    """

    config_class = DyLoRAConfig

    def __init__(
        self,
        model: str | PreTrainedModel | Parts,
        num_experts: int = 4,
        *,
        expert_names: Sequence[str] | None = None,
        rank: int = ExpertSpec.rank,
        alpha: float | None = ExpertSpec.alpha,
        dropout: float = ExpertSpec.dropout,
        target_modules: str | Sequence[str] | None = ExpertSpec.target_modules,
        use_rslora: bool = ExpertSpec.use_rslora,
        init: str = ExpertSpec.init,
        shared_rank: int = 0,
        experts_per_layer: Sequence[int] | None = None,
        routing: str = RouterSpec.routing,
        top_k: int | None = RouterSpec.top_k,
        temperature: float = RouterSpec.temperature,
        expert_scale: str = RouterSpec.expert_scale,
        balance_coefficient: float = AuxLossWeights.balance_coefficient,
        z_loss_coefficient: float = AuxLossWeights.z_loss_coefficient,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        bits: int | None = None,
    ) -> None:
        # outside inference mode: tensors made in it could not be trained later
        with torch.inference_mode(False):
            if not isinstance(model, Parts):
                model = new_parts(
                    model,
                    num_experts,
                    ExpertSpec(rank, alpha, dropout, target_modules, use_rslora, init),
                    RouterSpec(routing, top_k, temperature, experts_per_layer, expert_scale),
                    AuxLossWeights(balance_coefficient, z_loss_coefficient),
                    expert_names=expert_names,
                    shared_rank=shared_rank,
                    revision=revision,
                    dtype=dtype,
                    attn_implementation=attn_implementation,
                    bits=bits,
                )
            experts = model.experts
            super().__init__(experts)
            self.base_name, self.revision, self.routing_mode = model.base_name, model.revision, model.routing_mode
            self.losses, self.prompt_template = model.loss_weights, model.prompt_template
            self.route = TOKEN
            self.tokenizer: PreTrainedTokenizerBase | None = None
            self.model = experts.peft_model
            self.router = model.router
            base, decoder = experts.base_model, experts.decoder
            # while the weights are in one piece; the base never changes
            self._fingerprint = fingerprint(base)
            self._head_is_plain = linear_lm_head(base, decoder.backbone) is not None
            self._argument_names = argument_names(base)
            hooks = RouterHooks(
                base, decoder, self.routing_mode, self.router, experts.routing_state, experts.active_indices
            )
            self._mark_config(hooks.undo)

    @can_return_tuple  # type: ignore[untyped-decorator]
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
        segment_ids: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> DyLoRAOutput:
        """Run the mixture, and with ``labels`` sum its losses.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, nonzero for real tokens; or ``(batch, 1, seq, seq)``, nonzero for the
                tokens that each token sees.
            labels: ``(batch, seq)``, not shifted, -100 where there is no loss.
            routing_weights: ``(batch, seq, num_active_experts)`` instead of the router's; batch and seq may be 1. One
                more column is the weight of the shared expert, which is 1 otherwise.
            position_ids: ``(batch, seq)``.
            inputs_embeds: ``(batch, seq, hidden_size)`` instead of ``input_ids``.
            logits_to_keep: Number of last tokens, or positions, to compute logits for; 0 for all tokens.
            smoothing: See ``LossOptions``, as for the next four; also accepted as ``label_smoothing``.
            num_items_in_batch: Labelled tokens in the whole global batch.
            num_tokens_in_batch: Real tokens in the whole global batch.
            expert_load: Expert counts of a larger batch.
            return_logits: Whether a forward with ``labels`` also gives logits; the Trainer needs none.
            segment_ids: ``(batch, seq)``, for rows of several examples: the number of a token's example in its row,
                from 1, and 0 for padding. Examples do not see each other. Replaces ``attention_mask``.
            adapter_names: The expert of each row, or ``__base__`` for the base alone, instead of the router's choice.
            **kwargs: Passed to the base model; a cache as ``cache`` or ``past_key_values``. With ``return_dict=False``
                the result is a tuple, the loss first if there are labels.

        Raises:
            RoutingError: ``segment_ids`` have a shape or an attention that cannot keep examples apart, or
                ``adapter_names`` are not active experts.
        """
        smoothing = kwargs.pop("label_smoothing", smoothing)
        options = LossOptions(smoothing, num_items_in_batch, num_tokens_in_batch, expert_load, return_logits)
        optional: dict[str, object] = {
            "routing_weights": self._given_weights(routing_weights, adapter_names),
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "logits_to_keep": logits_to_keep if isinstance(logits_to_keep, Tensor) or logits_to_keep else None,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        given |= {"input_ids": input_ids, **with_cache_renamed(kwargs, self._argument_names)}
        return self._run(given, attention_mask, segment_ids, labels, options)

    def _run(
        self,
        arguments: dict[str, object],
        mask: Tensor | None,
        segment_ids: Tensor | None,
        labels: Tensor | None,
        options: LossOptions,
    ) -> DyLoRAOutput:
        """Run the base model with the routed experts, and with ``labels`` sum the losses."""
        arguments["attention_mask"] = mask
        if segment_ids is not None:
            self._check_segments(segment_ids)
            mask, positions = (segment_ids != 0).long(), positions_in_segments(segment_ids)
            arguments |= {"attention_mask": None, "position_ids": positions, "use_cache": False}
        if labels is None:
            return self._run_base(arguments)[0]
        arguments.setdefault("use_cache", False)
        head = None if options.return_logits else self._head_for_loss()
        if head is not None:  # an empty list of positions: the base model computes no logits
            arguments["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=head.weight.device)
        result, features = self._run_base(arguments, wants_features=head is not None)
        token_mask = None if mask is None else real_tokens(mask)
        labels = labels if token_mask is None else without_padding(labels, token_mask)
        result.lm_loss = lm_loss(result.logits, features, head, labels, options)
        sum_losses(result, token_mask, self.router.top_k, self.losses, options, self.training)
        if not options.return_logits:
            result.logits = None
        return result

    def _head_for_loss(self) -> nn.Linear | None:
        """Return the head if a loss can be computed from its input and its weight; None otherwise."""
        if not self._head_is_plain:
            return None
        head = self.experts.base_model.get_output_embeddings()
        # the weight of a wrapped head may be offloaded or sharded
        return None if is_wrapped(head) else head

    def _run_base(
        self, arguments: dict[str, object], wants_features: bool = False
    ) -> tuple[DyLoRAOutput, Tensor | None]:
        """Run the base model with the routed experts.

        Returns:
            The output without losses, and with ``wants_features`` the last hidden states.
        """
        record = ForwardRecord(wants_features=wants_features)
        with self.experts.routing_state.scoped(record=record):
            outputs = self.experts.base_model(return_dict=True, **arguments)
        return make_output(outputs, record), record.features

    def generate(
        self,
        *args: object,
        routing_weights: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        route: str | None = None,
        **kwargs: object,
    ) -> Any:
        """Generate with the mixture: transformers' ``generate``, each new token routed as in training.

        Args:
            *args: Passed to ``transformers.GenerationMixin.generate``.
            routing_weights: Weights instead of the router's: ``(1, 1, num_active_experts)`` for all, ``(batch, 1,
                ...)`` for each prompt, or ``(batch, tokens, ...)`` for each token of prompt and answer; later tokens
                use the last one.
            adapter_names: The expert of each prompt, or ``__base__`` for the base alone.
            route: ``token`` routes each token by the tokens before it, ``prompt`` all of them by the whole prompt, see
                ``prompt_weights``; by default as ``self.route`` says.
            **kwargs: Passed to ``transformers.GenerationMixin.generate``.

        Returns:
            The result of ``generate`` of transformers.
        """
        state = self.experts.routing_state
        weights = self._given_weights(routing_weights, adapter_names)
        if weights is not None:
            weights = check_weights(weights)
        elif not state.scope.base_only:
            weights = weights_to_generate(self, route or self.route, args, kwargs)
        with state.cache_stacks(), state.scoped(weights=weights), self._overrides_of_generate():
            return self._base.generate(*args, **kwargs)

    def prompt_weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return routing weights of prompts as a whole, the router's at their last tokens: ``(batch, 1, experts)``.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, nonzero for real tokens.

        Raises:
            RoutingError: The routing mode has a gate in each layer.
        """
        return find_prompt_weights(self, input_ids, attention_mask)

    def add_expert(self, name: str | None = None, **options: Any) -> str:
        """Add a young expert, with the options of ``ExpertManager.create``; the router grows by one.

        No parameter of the older experts changes, and the ratios of their routing weights stay the same.

        Returns:
            The expert's name.
        """
        return self.experts.create(name, **options)

    def import_expert(self, path: str | Path, name: str | None = None, revision: str | None = None) -> str:
        """Add a PEFT adapter, a folder or Hub id, as a young expert; see ``ExpertManager.import_adapter``."""
        return self.experts.import_adapter(path, name, revision)

    def initialize_eva(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Start the experts again with the directions in which their inputs vary; see ``initialization``.

        Args:
            batches: Batches of training data with ``input_ids``, ``attention_mask`` and, for packed rows,
                ``segment_ids``, all ``(batch, seq)``.

        Raises:
            ExpertError: The batches are too small, a layer too narrow, or the components do not settle.
        """
        known = ("input_ids", "attention_mask", "segment_ids")
        inputs = [{name: batch[name].to(self.device) for name in known if name in batch} for batch in batches]
        for batch in inputs[:1]:
            if "segment_ids" in batch:  # now, since PEFT hooks into every forward that follows
                self._check_segments(batch["segment_ids"])
        with self.base_only():
            initialize_eva(self.experts, lambda batch: self(**batch), inputs)

    def set_maturity(self, maturity: int = MATURE, names: Sequence[str] | None = None) -> None:
        """Mark experts as mature (1) or young (0); all of them by default. Routing is sparse once all are mature.

        Raises:
            RoutingError: The maturity is neither.
            ExpertError: There is no such expert.
        """
        if maturity not in (0, 1):
            raise RoutingError(f"`maturity` must be 0 (young) or 1 (mature), got {maturity}")
        self.experts.check_routed(names or [])
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
        """Write a checkpoint folder; an older one is replaced only once the new one is whole.

        ``AutoModelForCausalLM.from_pretrained`` reads the folder too.

        Args:
            save_directory: The folder.
            is_main_process: False writes nothing.
            state_dict: Whole tensors of experts and router with the keys of ``state_dict``, if this model holds shards.
            in_place: Whether to copy instead of rename, for object storage; the old folder is removed first.
            push_to_hub: Also upload the folder, to ``repo_id`` or a repository of the folder's name.
            **kwargs: ``max_shard_size``, ``safe_serialization=True`` and ``save_function`` are accepted and have no
                effect on files of this kind; with ``push_to_hub``, also the arguments of ``push_to_hub``.

        Raises:
            CheckpointError: The folder could not be written, or an argument asks for another format.
        """
        save_and_load.save(self, Path(save_directory), is_main_process, state_dict, in_place, push_to_hub, kwargs)

    def write_files(
        self, folder: Path, state: Mapping[str, Tensor] | None = None, *, final_folder: Path | None = None
    ) -> None:
        """Write a checkpoint's files into a folder that the caller renames to ``final_folder``; ``state`` as above."""
        save_and_load.write_files(self, folder, state, final_folder=final_folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, model: str | PreTrainedModel | None = None, **options: Any
    ) -> Self:
        """Load a checkpoint folder, ready to evaluate.

        Args:
            pretrained_model_name_or_path: The folder, or a Hub id.
            model: The base model, loaded or by name; by default the one that the checkpoint names.
            **options: For a base model that is loaded here: ``dtype`` (or ``torch_dtype``; the checkpoint's by
                default), ``device_map``, ``attn_implementation``, ``quantization_config`` and others. For a Hub id:
                ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            CheckpointError: A file is missing or damaged, or the folder belongs to another base model.
            ModelError: The base model cannot be loaded.
        """
        with torch.inference_mode(False):
            loaded: Self = save_and_load.load(cls, pretrained_model_name_or_path, model, options)
        return loaded

    def load_weights(self, path: str | Path) -> None:
        """Load the weights of a checkpoint into this model, which must have the same experts and routing.

        Raises:
            CheckpointError: A file is missing or damaged, or the experts or the routing differ.
        """
        save_and_load.load_weights(self, Path(path))


register(DyLoRA_MoE)
