"""The flags of making one mixture of adapters that exist."""

from dataclasses import dataclass
from pathlib import Path

from dylo_moe.config.parser import Group, flag, require
from dylo_moe.spec import RoutingMode

DEFAULT_ROUTING = "base_context"


@dataclass
class ComposeArgs(Group):
    """Which adapters, and examples of what each is for."""

    title = "composition"

    adapter: list[str] | None = flag(None, "NAME=PATH_OR_ID: a PEFT LoRA adapter, by the name that its expert gets.")
    sample: list[str] | None = flag(
        None, "NAME=FILE: a few dozen examples of what this adapter is for, in any format that train reads."
    )
    output_dir: str = flag("./results/composed", "Folder of the mixture.")
    mixture: str | None = flag(None, "Add the adapters to this mixture, made by compose before, instead of a new one.")
    base_model: str | None = flag(
        None, "Base model, a Hub id, a folder or demo; what the adapters or the mixture name if not given."
    )
    revision: str | None = flag(None, "Commit, tag or branch of the base model on the Hub.")
    routing: str | None = flag(
        None,
        "Where the router reads: base_context:K (if not given), context:K, prefix:K or final; without :K, K = layers / "
        "4. With context:K and prefix:K, no adapter may sit below layer K.",
    )
    top_k: int | None = flag(None, "Adapters per token; 1 if not given.", ge=1)
    sample_rows: int = flag(64, "Examples of each adapter to solve the router from, at most.", ge=2)
    max_seq_length: int = flag(1024, "Most tokens of an example.", parameter="max_length", ge=8, wording="{} tokens")
    template: str = flag(
        "auto",
        "Around conversations: the model's own (chat), Alpaca's (plain), or auto: chat if it has one.",
        choices=("auto", "chat", "plain"),
    )
    batch_size: int = flag(8, "Examples in one forward.", ge=1)
    finetune_router: int = flag(0, "Steps to train the router alone on the examples, after it was solved.", ge=0)
    router_learning_rate: float = flag(1e-3, "Peak learning rate of --finetune_router.", gt=0)
    seed: int = flag(42, "Seed of everything random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        adapters, samples = pairs("adapter", self.adapter), pairs("sample", self.sample)
        require(bool(adapters), "adapter", "given at least once, as NAME=PATH_OR_ID", "none")
        missing = sorted(adapters.keys() - samples.keys())
        require(not missing, "sample", "given for each adapter, as NAME=FILE", f"none for {', '.join(missing)}")
        unknown = sorted(samples.keys() - adapters.keys())
        require(not unknown, "sample", "of an adapter that --adapter names", ", ".join(unknown))
        files = {name: Path(file).resolve() for name, file in samples.items()}
        twice = sorted(name for name, file in files.items() if list(files.values()).count(file) > 1)
        require(not twice, "sample", "a file of its own for each adapter", f"one file for {', '.join(twice)}")
        frozen = RoutingMode.parse(self.routing or DEFAULT_ROUTING).reads_frozen_features
        require(frozen, "routing", "base_context:K, context:K, prefix:K or final here", repr(self.routing))
        for name in ("routing", "top_k", "revision"):
            given = getattr(self, name)
            require(self.mixture is None or given is None, name, "left out where --mixture is given", given)

    @property
    def adapters(self) -> dict[str, str]:
        """Folder or Hub id of each adapter, by its name."""
        return pairs("adapter", self.adapter)

    @property
    def samples(self) -> dict[str, str]:
        """File of examples of each adapter, by its name."""
        return pairs("sample", self.sample)


def pairs(name: str, given: list[str] | None) -> dict[str, str]:
    """Return the ``NAME=VALUE`` entries of a flag by name.

    Raises:
        ConfigError: An entry has another form, or two have one name.
    """
    found: dict[str, str] = {}
    for entry in given or []:
        key, sign, value = (part.strip() for part in entry.partition("="))
        require(bool(key and sign and value) and "," not in value, name, "NAME=VALUE, without a comma", repr(entry))
        require(key not in found, name, "given once for each name", f"{key} twice")
        found[key] = value
    return found
