"""What a library says of new examples, by embeddings that were made by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dylo_moe.core.router import rms_normalize
from dylo_moe.skills.library import MEASURES, SkillEntry, SkillLibrary

WIDTH = 24
KNOWN, NEW = ("a", "b", "c"), 9


def rows(index: int, count: int, seed: int) -> Tensor:
    """Examples that scatter around a direction of their skill."""
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
    return rms_normalize(2 * centre + torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 + seed)))


@pytest.fixture
def library() -> SkillLibrary:
    made = SkillLibrary(WIDTH)
    for index, name in enumerate(KNOWN):
        made.gate.learn(rows(index, 200, seed=index), index)
        looks = [rows(index, 40, seed=10 * index + part) for part in range(3)]
        made.add(SkillEntry(name=name, expert=f"expert_{index}"), *looks)
    return made


@pytest.mark.parametrize("measure", [*MEASURES, "entropy", None])
def test_each_measure_tells_what_is_known_from_what_is_new(library: SkillLibrary, measure: str | None) -> None:
    for index, name in enumerate(KNOWN):
        seen = rows(index, 40, seed=77 + index)
        report = library.judge(seen, seen, measure)
        assert not report.novel and report.nearest == name
        assert measure is None or report.measure == measure
    seen = rows(NEW, 40, seed=80)
    report = library.judge(seen, seen, measure)
    assert report.novel and report.beyond > 0.9 and report.unsure is not None and report.unsure > 0.5
    assert set(report.similarity) == set(KNOWN)


def test_the_threshold_is_that_of_held_out_examples(library: SkillLibrary) -> None:
    for measure, distances in MEASURES.items():
        for index, threshold in enumerate(library.thresholds(measure)):
            own = distances(library._looks[index].held_out, library._references)[:, index]
            assert (own <= threshold).double().mean() == pytest.approx(0.95, abs=1e-9)


def test_one_expert_has_no_entropy_to_judge_by() -> None:
    library = SkillLibrary(WIDTH)
    seen = rows(0, 20, seed=1)
    assert library.judge(seen, seen).novel
    library.gate.learn(seen, 0)
    library.add(SkillEntry(name="a", expert="expert_0"), seen, seen, seen)
    report = library.judge(rows(NEW, 20, seed=2), rows(NEW, 20, seed=2), "entropy")
    assert report.measure == "cosine" and report.unsure is None and report.novel


def test_what_was_saved_judges_alike(library: SkillLibrary, tmp_path: Path) -> None:
    library.write_files(tmp_path)
    again = SkillLibrary.load(tmp_path)
    seen = rows(NEW, 20, seed=3)
    for measure in (*MEASURES, "entropy"):
        assert again.judge(seen, seen, measure) == library.judge(seen, seen, measure)
    assert again.expert_of("b") == "expert_1"
