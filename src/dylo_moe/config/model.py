"""The flags of the model: its base, its experts and their router."""

import re
from dataclasses import dataclass

from dylo_moe.config.parser import Group, flag, require, split_names
from dylo_moe.spec import RoutingMode

INITIALIZATIONS = ("default", "gaussian", "orthogonal", "eva", "pissa")
PLACES = ("attention", "mlp", "all-linear")
SCALES = ("sum_to_one", "unit")
BALANCES = ("switch", "bias", "none")


@dataclass
class ModelArgs(Group):
    """The base model."""

    title = "base model"

    model_name: str = flag(
        "google/codegemma-2b",
        "Hub id, folder, or 'demo' for the embedded SmolLM2-135M-Instruct, which needs no Hub.",
        aliases=["base_model"],
    )
    revision: str | None = flag(None, "Commit, tag or branch of the model on the Hub.")
    attn_implementation: str | None = flag(
        None, "sdpa, eager, flash_attention_2, ...: as transformers calls them; its own choice if not given."
    )
    load_in_4bit: bool = flag(False, "Quantize the base to 4 bits (NF4, as QLoRA); needs bitsandbytes.")
    load_in_8bit: bool = flag(False, "Quantize the base to 8 bits (LLM.int8()); needs bitsandbytes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.load_in_4bit and self.load_in_8bit
        require(not both, "load_in_8bit", "left out where --load_in_4bit is given", "both")

    @property
    def bits(self) -> int | None:
        """Bits of a quantized base; None for one that is not."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class ExpertArgs(Group):
    """The experts and their router."""

    title = "experts and router"

    num_experts: int | None = flag(
        None, "How many experts to train; 4 if not given, or with --teach_router one for each domain or cluster.", ge=1
    )
    lora_r: int = flag(16, "Rank of each expert.", aliases=["rank"], parameter="rank", ge=1)
    lora_alpha: float | None = flag(
        None, "Updates are scaled by alpha / rank; 2 x rank if not given.", parameter="alpha", gt=0
    )
    lora_dropout: float = flag(0.0, "Dropout on the experts' input while training.", parameter="dropout", ge=0, lt=1)
    use_rslora: bool = flag(False, "Scale updates by alpha / sqrt(rank) instead.")
    init: str = flag(
        "default",
        "How experts begin: default, gaussian, orthogonal, eva (from data) or pissa (from the base).",
        choices=INITIALIZATIONS,
    )
    target_modules: str | None = flag(
        None,
        "Linear modules to adapt: names, comma-separated, attention, mlp or all-linear; the attention if not given.",
    )
    shared_rank: int = flag(
        0, "Rank of one more expert that every token has, beside those that the router mixes; 0 for none.", ge=0
    )
    expert_scale: str = flag(
        "sum_to_one",
        "A token's weights sum to 1 (sum_to_one), or to the number of experts as in one LoRA of all ranks (unit).",
        choices=SCALES,
    )
    sparse_training: bool = flag(False, "Mix and train only the --top_k best experts of each token.")
    routing: str = flag(
        "auto",
        "Where the router reads: per_layer, final, prefix:K, context:K, base_context:K (without :K, K = layers / 4); "
        "auto is per_layer, or context with --teach_router.",
    )
    teach_router: str = flag(
        "none",
        "Solve the router before the first step, for one expert a dataset (domains) or for N clusters of examples "
        "(clusters:N); none leaves it to training.",
    )
    teach_rows: int = flag(128, "Rows of each dataset to solve the router from.", ge=2)
    train_router: bool = flag(False, "Train the solved router further; it stays as it is if not given.")
    experts_per_layer: str | None = flag(
        None, "How many of the experts each block of layers carries, lowest first: 2,4; all if not given."
    )
    top_k: int | None = flag(
        None, "Experts per token, once routing is sparse; 2 if not given, or 1 with --teach_router."
    )
    router_temperature: float = flag(
        1.0, "Divides the router's logits; lower is sharper.", parameter="temperature", gt=0
    )
    balance: str = flag(
        "switch",
        "Even load by a loss (switch), by a bias on the choice alone (bias), or not at all (none).",
        choices=BALANCES,
    )
    balance_coefficient: float | None = flag(
        None,
        "Weight of the balance loss; 0.01 if not given, and 0 without --balance switch.",
        aliases=["router_aux_loss_coef"],
        ge=0,
    )
    balance_update_rate: float = flag(0.001, "Step of the bias of --balance bias.", gt=0)
    z_loss_coefficient: float = flag(0.0, "Weight of the router z-loss.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resolve_teaching()
        if self.num_experts is not None:
            self.resolve_num_experts(self.num_experts)
        if self.balance_coefficient is None:
            self.balance_coefficient = 0.01 if self.balance == "switch" and not self.taught else 0.0
        require(
            not (self.taught and self.balance_coefficient),
            "balance_coefficient",
            "left out where --teach_router is given",
            self.balance_coefficient,
        )
        require(
            self.balance == "switch" or not self.balance_coefficient,
            "balance_coefficient",
            f"left out where --balance is {self.balance}",
            self.balance_coefficient,
        )
        self._check_blocks()

    def _resolve_teaching(self) -> None:
        match = re.fullmatch(r"none|domains|clusters:(\d+)", self.teach_router)
        known = match is not None and (match[1] is None or int(match[1]) > 1)
        require(known, "teach_router", "none, domains, or clusters:N with N of at least 2", repr(self.teach_router))
        if self.routing == "auto":
            self.routing = "context" if self.taught else "per_layer"
        if not self.taught:
            require(not self.train_router, "train_router", "left out without --teach_router", self.train_router)
            self.num_experts = 4 if self.num_experts is None else self.num_experts
            return
        require(
            RoutingMode.parse(self.routing).reads_frozen_features,
            "routing",
            "context:K, base_context:K, prefix:K or final where --teach_router is given",
            self.routing,
        )
        require(self.balance != "bias", "balance", "left out where --teach_router is given", self.balance)
        if self.num_clusters is not None:
            self.resolve_num_experts(self.num_clusters)

    def resolve_num_experts(self, number: int) -> None:
        """Set the number of experts, and what depends on it.

        Raises:
            ConfigError: Another number was given, or there are fewer experts than ``top_k``.
        """
        require(self.num_experts in (None, number), "num_experts", f"left out, or {number} here", self.num_experts)
        self.num_experts = number
        self.top_k = (1 if self.taught else min(2, number)) if self.top_k is None else self.top_k
        require(1 <= self.top_k <= number, "top_k", f"from 1 to the number of experts ({number})", self.top_k)

    def _check_blocks(self) -> None:
        if self.experts_per_layer is None:
            return
        require(
            RoutingMode.parse(self.routing).has_gate_per_layer,
            "experts_per_layer",
            "left out unless --routing is per_layer",
            f"--routing {self.routing} with it",
        )
        counts = split_names(self.experts_per_layer)
        require(
            all(count.isdigit() and 1 <= int(count) <= self.expert_count for count in counts)
            and str(self.num_experts) in counts,
            "experts_per_layer",
            f"numbers from 1 to the number of experts ({self.num_experts}), and that number among them",
            repr(self.experts_per_layer),
        )

    @property
    def taught(self) -> bool:
        """Whether the router is solved before the first step."""
        return self.teach_router != "none"

    @property
    def num_clusters(self) -> int | None:
        """Number of clusters of examples to solve the router for; None where it is not solved from clusters."""
        number = self.teach_router.partition(":")[2]
        return int(number) if number else None

    @property
    def expert_count(self) -> int:
        """``num_experts``, resolved."""
        assert self.num_experts is not None
        return self.num_experts

    @property
    def blocks(self) -> list[int] | None:
        """``experts_per_layer`` as numbers."""
        return None if self.experts_per_layer is None else [int(count) for count in split_names(self.experts_per_layer)]

    @property
    def balance_weight(self) -> float:
        """``balance_coefficient``, resolved."""
        assert self.balance_coefficient is not None
        return self.balance_coefficient

    @property
    def experts_per_token(self) -> int:
        """``top_k``, resolved."""
        assert self.top_k is not None
        return self.top_k

    @property
    def targets(self) -> str | list[str] | None:
        """The target modules as ``DyLoRA_MoE`` takes them."""
        if self.target_modules in (None, *PLACES):
            return self.target_modules
        return split_names(self.target_modules or "")
