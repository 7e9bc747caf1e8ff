"""``torch.export`` of a mixture; ``torch.compile`` is in tests/core/test_compile.py."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dylo_moe import DyLoRA_MoE
from tests.support.saved_mixture import mixture_on

IDS = torch.tensor([[5, 6, 7, 8, 9, 40], [9, 30, 7, 100, 5, 41]])
OTHER = torch.tensor([[40, 41, 42, 5, 7, 11, 12, 13], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]])


class Logits(nn.Module):
    """A module to export: token ids to logits, without a cache."""

    def __init__(self, model: DyLoRA_MoE) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("routing", "mature"), [("final", False), ("prefix:1", False), ("context:1", True), ("per_layer", True)]
)
def test_an_exported_mixture_computes_the_same_for_other_shapes(
    routing: str, mature: bool, base_folder: Path, tmp_path: Path
) -> None:
    model = mixture_on(base_folder, routing)
    if mature:
        model.set_maturity()
    shapes = {"input_ids": {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("seq", max=256)}}
    with torch.no_grad():
        torch.export.save(torch.export.export(Logits(model), (IDS,), dynamic_shapes=shapes), tmp_path / "mixture.pt2")
        exported = torch.export.load(tmp_path / "mixture.pt2").module()
        for ids in (IDS, OTHER):
            assert torch.allclose(exported(ids), model(ids).logits, atol=1e-5)
