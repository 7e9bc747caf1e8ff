"""The flags of acquiring skills, and of looking after the experts that learned them.

Part of the configuration; the flags of data, training and the other programs are in ``config.py``.
"""

from dataclasses import dataclass
from typing import ClassVar

from dylo_moe.flags import flag as _flag
from dylo_moe.flags import require as _require
from dylo_moe.flags import split_names
from dylo_moe.model_config import ExpertArguments
from dylo_moe.routing_mode import RoutingMode

EXTEND = ("auto", "never", "always")
NOVELTY = ("auto", "cosine", "mahalanobis", "entropy")


@dataclass
class AcquireArguments:
    """Which skills to learn, one after the other."""

    _argument_group_name: ClassVar[str] = "skills"

    skills: str | None = _flag(
        default=None, help="Datasets to learn in this order, comma-separated: names, or name=path for your own files."
    )
    skill: list[str] | None = _flag(default=None, help="One or more name=path, learned after those of --skills.")
    extend: str = _flag(
        default="auto",
        help="Train the nearest expert further and make no new one: for skills that are not new (auto), never, always.",
    )
    novelty: str = _flag(
        default="auto",
        help="What tells a new skill: distance in the base's hidden states (cosine or mahalanobis; auto takes the one "
        "that tells the known skills apart better), or how unsure the router is (entropy).",
    )
    rank_from_data: bool = _flag(
        default=False, help="Give each new expert the rank that its tokens call for, and --lora_r at most."
    )
    sample_rows: int = _flag(default=128, help="Rows of a skill to judge it and to teach the router by.")

    def __post_init__(self) -> None:
        _require(bool(self.names), "skills", "at least one dataset, or --skill name=path", repr(self.skills))
        plain = self.plain_names
        twice = sorted({name for name in plain if plain.count(name) > 1})
        _require(not twice, "skills", "different skills", f"{', '.join(twice)} more than once")
        for given in self.skill or []:
            _require("=" in given and "," not in given, "skill", "name=path, without a comma", repr(given))
        _require(self.extend in EXTEND, "extend", f"one of {', '.join(EXTEND)}", repr(self.extend))
        _require(self.novelty in NOVELTY, "novelty", f"one of {', '.join(NOVELTY)}", repr(self.novelty))
        _require(self.sample_rows >= 2, "sample_rows", "at least 2", self.sample_rows)

    @property
    def names(self) -> list[str]:
        """The skills as datasets are named, in order."""
        return [*split_names(self.skills or ""), *(self.skill or [])]

    @property
    def plain_names(self) -> list[str]:
        """The same without their paths."""
        return [name.partition("=")[0] for name in self.names]

    @property
    def measure(self) -> str | None:
        """What novelty is judged by; None for the better distance."""
        return None if self.novelty == "auto" else self.novelty

    @property
    def forced(self) -> bool | None:
        """Whether to extend whatever the data looks like; None where that is to be judged."""
        return {"auto": None, "never": False, "always": True}[self.extend]


@dataclass
class GrowingExpertArguments(ExpertArguments):
    """The experts, one for each skill, and their router."""

    _argument_group_name: ClassVar[str] = "experts and router"

    num_experts: int = _flag(default=1, help="What to begin with: 1, as each skill adds its own.")
    routing: str = _flag(
        default="context",
        help="Where the router reads what no expert changes: the mean over the tokens so far of what enters layer K "
        "(context:K, or context for K = layers / 4), what enters it at each token (prefix:K, prefix), or final.",
    )

    def __post_init__(self) -> None:
        _require(self.num_experts == 1, "num_experts", "1 where skills are acquired", self.num_experts)
        _require(
            RoutingMode.parse(self.routing).reads_frozen_features,
            "routing",
            "context:K, prefix:K or final where skills are acquired",
            "per_layer",
        )
        _require(self.init != "eva", "init", "another one where skills are acquired", "eva")
        super().__post_init__()


@dataclass
class ExpertsArguments:
    """Which checkpoint, and what to do with its experts."""

    _argument_group_name: ClassVar[str] = "experts"

    checkpoint: str = _flag(default="./results/model", help="Checkpoint folder; it may also be named without the flag.")
    rename: str | None = _flag(default=None, help="OLD=NEW: give an expert another name.")
    freeze: str | None = _flag(default=None, help="Let no later skill train this expert any further.")
    unfreeze: str | None = _flag(default=None, help="Lift --freeze.")
    remove: str | None = _flag(default=None, help="Remove this expert, and the skills that it alone learned.")
    merge: str | None = _flag(default=None, help="ONE,OTHER: make one expert that adds what both of them do.")
    export: list[str] | None = _flag(
        default=None, help="NAME FOLDER: write this expert to a new folder, as a PEFT adapter for any tool."
    )
    import_: str | None = _flag(
        default=None,
        aliases=["--import"],
        help="Add this PEFT adapter, a folder or a Hub id, as a young expert; routing is dense while one is young.",
    )
    as_: str | None = _flag(
        default=None,
        aliases=["--as"],
        help="Name of the imported expert; that of the folder or repository if not given.",
    )
    revision: str | None = _flag(default=None, help="Commit, tag or branch of what --import names on the Hub.")
    base_model: str | None = _flag(
        default=None,
        help="Where the base model is now, a folder or Hub id, for --rename and --import; where the checkpoint says if "
        "not given.",
    )

    def __post_init__(self) -> None:
        changes = ("rename", "freeze", "unfreeze", "remove", "merge", "export", "import_")
        given = [name.rstrip("_") for name in changes if getattr(self, name) is not None]
        _require(len(given) <= 1, given[-1] if given else "rename", "left out where another change is given", given)
        for name, sign in (("rename", "="), ("merge", ",")):
            value = getattr(self, name)
            parts = [] if value is None else [part.strip() for part in value.split(sign)]
            ok = value is None or (len(parts) == 2 and all(parts) and parts[0] != parts[1])
            _require(ok, name, f"two different names with {sign!r} between them", repr(value))
        ok = self.export is None or len(self.export) == 2
        _require(ok, "export", "the name of an expert and a folder", " ".join(self.export or []))
        for name, value in (("as", self.as_), ("revision", self.revision)):
            _require(value is None or self.import_ is not None, name, "left out without --import", repr(value))
