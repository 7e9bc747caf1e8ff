"""The flags of acquiring skills, and of managing the experts that learned them."""

from dataclasses import dataclass

from dylo_moe.config.composition import pairs
from dylo_moe.config.model import ExpertArgs
from dylo_moe.config.parser import Group, flag, require, split_names
from dylo_moe.spec import RoutingMode

EXTEND = ("auto", "never", "always")
NOVELTY = ("auto", "cosine", "mahalanobis", "entropy")


@dataclass
class AcquireArgs(Group):
    """Which skills to learn, one after another."""

    title = "skills"

    skills: str | None = flag(
        None, "Datasets to learn in this order, comma-separated: names, or name=path for your own files."
    )
    skill: list[str] | None = flag(None, "One or more name=path, learned after those of --skills.")
    extend: str = flag(
        "auto",
        "Train the nearest expert further and make no new one: for skills that are not new (auto), never, always.",
        choices=EXTEND,
    )
    novelty: str = flag(
        "auto",
        "How to judge whether a skill is new: by distance in the base's hidden states (cosine or mahalanobis; auto "
        "takes the one that separates the known skills better), or by how unsure the router is (entropy).",
        choices=NOVELTY,
    )
    rank_from_data: bool = flag(False, "Give each new expert the rank that its tokens call for, and --lora_r at most.")
    sample_rows: int = flag(128, "Rows of a skill to judge it and to fit the router by.", ge=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.names), "skills", "at least one dataset, or --skill name=path", repr(self.skills))
        plain = self.plain_names
        twice = sorted({name for name in plain if plain.count(name) > 1})
        require(not twice, "skills", "different skills", f"{', '.join(twice)} more than once")
        for given in self.skill or []:
            require("=" in given and "," not in given, "skill", "name=path, without a comma", repr(given))

    @property
    def names(self) -> list[str]:
        """The skills as datasets are named, in order."""
        return [*split_names(self.skills or ""), *(self.skill or [])]

    @property
    def plain_names(self) -> list[str]:
        """The names of the skills without their paths."""
        return [name.partition("=")[0] for name in self.names]

    @property
    def measure(self) -> str | None:
        """The measure of novelty; None for the better one of the two distances."""
        return None if self.novelty == "auto" else self.novelty

    @property
    def forced(self) -> bool | None:
        """Whether to extend the nearest expert whatever the data looks like; None to decide by the data."""
        return {"auto": None, "never": False, "always": True}[self.extend]


@dataclass
class GrowingExpertArgs(ExpertArgs):
    """The experts, one for each skill, and their router."""

    num_experts: int | None = flag(1, "How many experts to begin with: 1, as each skill adds its own.")
    routing: str = flag(
        "context",
        "Where the router reads what no expert changes: the mean over the tokens so far of what enters layer K "
        "(context:K, or context for K = layers / 4), what enters it at each token (prefix:K, prefix), or final.",
    )

    def __post_init__(self) -> None:
        require(self.num_experts == 1, "num_experts", "1 where skills are acquired", self.num_experts)
        require(
            RoutingMode.parse(self.routing).reads_frozen_features,
            "routing",
            "context:K, base_context:K, prefix:K or final where skills are acquired",
            "per_layer",
        )
        require(self.init != "eva", "init", "another one where skills are acquired", "eva")
        # a shared expert that trains with a later skill would change the earlier ones
        require(self.teach_router == "none", "teach_router", "left out where skills are acquired", self.teach_router)
        require(not self.shared_rank, "shared_rank", "0 where skills are acquired", self.shared_rank)
        super().__post_init__()


@dataclass
class ExpertsArgs(Group):
    """Which checkpoint, and what to do with its experts."""

    title = "experts"

    checkpoint: str = flag("./results/model", "Checkpoint folder; it may also be named without the flag.")
    rename: str | None = flag(None, "OLD=NEW: give an expert another name.")
    freeze: str | None = flag(None, "Let no later skill train this expert any further.")
    unfreeze: str | None = flag(None, "Lift --freeze.")
    remove: str | None = flag(None, "Remove this expert, and the skills that it alone learned.")
    merge: str | None = flag(None, "ONE,OTHER: make one expert that adds what both of them do.")
    export: list[str] | None = flag(
        None, "NAME FOLDER: write this expert to a new folder, as a PEFT adapter for any tool."
    )
    distill: str | None = flag(
        None, "FOLDER: write one plain LoRA that does about what the mixture does; needs --sample."
    )
    sample: list[str] | None = flag(
        None, "NAME=FILE: examples of a kind of text, to distill on three quarters and measure on the rest."
    )
    rank: int | None = flag(None, "Rank of --distill; the largest rank of an expert if not given.", ge=1)
    distill_steps: int = flag(60, "Optimizer steps of --distill, 4 examples each; 0 for no training.", ge=0)
    import_: str | None = flag(
        None,
        "Add this PEFT adapter, a folder or a Hub id, as a young expert; routing is dense while one is young.",
        aliases=["import"],
    )
    as_: str | None = flag(
        None, "Name of the imported expert; that of the folder or repository if not given.", aliases=["as"]
    )
    revision: str | None = flag(None, "Commit, tag or branch of what --import names on the Hub.")
    base_model: str | None = flag(
        None,
        "Where the base model is now, a folder or Hub id, for --rename, --import and --distill; where the checkpoint "
        "says if not given.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        changes = ("rename", "freeze", "unfreeze", "remove", "merge", "export", "import_", "distill")
        given = [name.rstrip("_") for name in changes if getattr(self, name) is not None]
        require(len(given) <= 1, given[-1] if given else "rename", "left out where another change is given", given)
        for name, sign in (("rename", "="), ("merge", ",")):
            value = getattr(self, name)
            parts = [] if value is None else [part.strip() for part in value.split(sign)]
            ok = value is None or (len(parts) == 2 and all(parts) and parts[0] != parts[1])
            require(ok, name, f"two different names with {sign!r} between them", repr(value))
        ok = self.export is None or len(self.export) == 2
        require(ok, "export", "the name of an expert and a folder", " ".join(self.export or []))
        require(self.distill is None or bool(self.samples), "sample", "given at least once for --distill", "none")
        for name, value in (("sample", self.sample), ("rank", self.rank)):
            require(value is None or self.distill is not None, name, "left out without --distill", repr(value))
        for name, value in (("as", self.as_), ("revision", self.revision)):
            require(value is None or self.import_ is not None, name, "left out without --import", repr(value))

    @property
    def samples(self) -> dict[str, str]:
        """File of examples of each kind of text, by its name."""
        return pairs("sample", self.sample)
