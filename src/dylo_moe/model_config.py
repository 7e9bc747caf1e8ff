"""The flags of the model: its base, its experts and their router.

Part of the configuration; the flags of data, training and the programs are in ``config.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

from dylo_moe.flags import flag as _flag
from dylo_moe.flags import require as _require
from dylo_moe.flags import split_names
from dylo_moe.routing_mode import RoutingMode

INITIALISATIONS = ("default", "gaussian", "orthogonal", "eva", "pissa")
BALANCES = ("switch", "bias", "none")


@dataclass
class ModelArguments:
    """Which base model."""

    _argument_group_name: ClassVar[str] = "base model"

    model_name: str = _flag(
        default="google/codegemma-2b",
        aliases=["--base_model"],
        help="Hub id, folder, or 'demo' for the embedded SmolLM2-135M-Instruct, which needs no Hub.",
    )
    revision: str | None = _flag(default=None, help="Commit, tag or branch of the model on the Hub.")
    attn_implementation: str | None = _flag(
        default=None,
        help="sdpa, eager, flash_attention_2, ...: as transformers calls them; its own choice if not given.",
    )
    load_in_4bit: bool = _flag(default=False, help="Quantise the base to 4 bits (NF4, as QLoRA); needs bitsandbytes.")
    load_in_8bit: bool = _flag(default=False, help="Quantise the base to 8 bits (LLM.int8()); needs bitsandbytes.")

    def __post_init__(self) -> None:
        both = self.load_in_4bit and self.load_in_8bit
        _require(not both, "load_in_8bit", "left out where --load_in_4bit is given", "both")

    @property
    def bits(self) -> int | None:
        """Bits of a quantised base; None for a plain one."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class ExpertArguments:
    """The experts and their router."""

    _argument_group_name: ClassVar[str] = "experts and router"

    num_experts: int = _flag(default=4, help="How many experts to train.")
    lora_r: int = _flag(default=16, aliases=["--rank"], help="Rank of each expert.")
    lora_alpha: float | None = _flag(default=None, help="Updates are scaled by alpha / rank; 2 x rank if not given.")
    lora_dropout: float = _flag(default=0.0, help="Dropout on the experts' input while training.")
    use_rslora: bool = _flag(default=False, help="Scale updates by alpha / sqrt(rank) instead.")
    init: str = _flag(
        default="default",
        help="How experts begin: default, gaussian, orthogonal, eva (from data) or pissa (from the base).",
    )
    target_modules: str | None = _flag(
        default=None, help="Linear modules to adapt, comma-separated, or all-linear; the attention if not given."
    )
    routing: str = _flag(
        default="per_layer",
        help="Where the router reads: per_layer, prefix:K or context:K (without :K, K = layers / 4), or final.",
    )
    experts_per_layer: str | None = _flag(
        default=None, help="How many of the experts each block of layers carries, lowest first: 2,4; all if not given."
    )
    top_k: int | None = _flag(default=None, help="Experts per token, once routing is sparse; 2 if not given.")
    router_temperature: float = _flag(default=1.0, help="Divides the router's logits; lower is sharper.")
    balance: str = _flag(
        default="switch",
        help="Even load by a loss (switch), by a bias on the choice alone (bias), or not at all (none).",
    )
    balance_coefficient: float | None = _flag(
        default=None,
        aliases=["--router_aux_loss_coef"],
        help="Weight of the balance loss; 0.01 if not given, and 0 without --balance switch.",
    )
    balance_update_rate: float = _flag(default=0.001, help="Step of the bias of --balance bias.")
    z_loss_coefficient: float = _flag(default=0.0, help="Weight of the router z-loss.")

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, "num_experts", "at least 1", self.num_experts)
        if self.top_k is None:
            self.top_k = min(2, self.num_experts)
        _require(self.lora_r >= 1, "lora_r", "at least 1", self.lora_r)
        _require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", "above 0", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "from 0 up to but not including 1", self.lora_dropout)
        _require(
            1 <= self.top_k <= self.num_experts,
            "top_k",
            f"from 1 to the number of experts ({self.num_experts})",
            self.top_k,
        )
        _require(self.router_temperature > 0, "router_temperature", "above 0", self.router_temperature)
        _require(self.init in INITIALISATIONS, "init", f"one of {', '.join(INITIALISATIONS)}", repr(self.init))
        self._check_balance()
        self._check_blocks()
        _require(self.z_loss_coefficient >= 0, "z_loss_coefficient", "0 or more", self.z_loss_coefficient)

    def _check_balance(self) -> None:
        _require(self.balance in BALANCES, "balance", f"one of {', '.join(BALANCES)}", repr(self.balance))
        if self.balance_coefficient is None:
            self.balance_coefficient = 0.01 if self.balance == "switch" else 0.0
        _require(self.balance_coefficient >= 0, "balance_coefficient", "0 or more", self.balance_coefficient)
        _require(
            self.balance == "switch" or not self.balance_coefficient,
            "balance_coefficient",
            f"left out where --balance is {self.balance}",
            self.balance_coefficient,
        )
        _require(self.balance_update_rate > 0, "balance_update_rate", "above 0", self.balance_update_rate)

    def _check_blocks(self) -> None:
        if self.experts_per_layer is None:
            return
        _require(
            RoutingMode.parse(self.routing).has_gate_per_layer,
            "experts_per_layer",
            "left out unless --routing is per_layer",
            f"--routing {self.routing} with it",
        )
        _require(
            all(part.isdigit() and 1 <= int(part) <= self.num_experts for part in split_names(self.experts_per_layer))
            and str(self.num_experts) in split_names(self.experts_per_layer),
            "experts_per_layer",
            f"numbers from 1 to the number of experts ({self.num_experts}), and that number among them",
            repr(self.experts_per_layer),
        )

    @property
    def blocks(self) -> list[int] | None:
        """``experts_per_layer`` as numbers."""
        return None if self.experts_per_layer is None else [int(part) for part in split_names(self.experts_per_layer)]

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
        if self.target_modules is None or self.target_modules == "all-linear":
            return self.target_modules
        return split_names(self.target_modules)
