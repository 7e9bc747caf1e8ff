"""The options of an expert, with their defaults and limits in one place.

It knows no model and imports no torch: the command line checks its flags with it, and the core builds experts by it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from dylo_moe.errors import ExpertError, did_you_mean

INITIALIZATIONS = ("default", "gaussian", "orthogonal", "pissa")
"""Values of ``ExpertSpec.init``. EVA needs data and follows later, see ``core.lora.initialization.initialize_eva``."""


@dataclass(frozen=True)
class ExpertSpec:
    """Rank, scaling, place and start of an expert.

    Attributes:
        rank: Rank of the update, at least 1.
        alpha: The update is scaled by ``alpha / rank``; ``2 * rank`` by default.
        dropout: Dropout on the expert's input while training, from 0 up to but not including 1.
        target_modules: Names of linear modules, ``"all-linear"``, ``"attention"``, ``"mlp"``, or None for the attention
            projections that go by a common name.
        use_rslora: Whether to scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv 2312.03732).
        init: How the expert starts: ``default``, ``gaussian`` or ``orthogonal`` as in PEFT, or ``pissa``, see
            ``core.lora.initialization.initialize_pissa``.

    Raises:
        ExpertError: A value is out of its range.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ExpertError(f"`rank` must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ExpertError(f"`alpha` must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ExpertError(f"`dropout` must be from 0 up to but not including 1, got {self.dropout}")
        if self.init not in INITIALIZATIONS:
            raise ExpertError(
                f"`init` must be one of {', '.join(INITIALIZATIONS)}, got {self.init!r}"
                f"{did_you_mean(str(self.init), INITIALIZATIONS)}"
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise ExpertError(f"`init` orthogonal needs an even `rank`, got {self.rank}")

    @property
    def effective_alpha(self) -> float:
        """``alpha``, or its default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def with_rank(self, rank: int) -> Self:
        """Return the same options with another rank, and updates scaled as before."""
        ratio = rank / self.rank
        return replace(self, rank=rank, alpha=self.effective_alpha * (math.sqrt(ratio) if self.use_rslora else ratio))
