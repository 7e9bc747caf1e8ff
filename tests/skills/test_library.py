"""Tests of the skill library on synthetic embeddings."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dylo_moe.core.routing.router import rms_normalize
from dylo_moe.skills.library import MEASURES, SkillLibrary, SkillRecord

WIDTH = 24
KNOWN, NEW = ("a", "b", "c"), 9


def rows(index: int, count: int, seed: int) -> Tensor:
    """Return examples scattered around a direction of their skill."""
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
    return rms_normalize(2 * centre + torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 + seed)))


@pytest.fixture
def library() -> SkillLibrary:
    made = SkillLibrary(WIDTH)
    for index, name in enumerate(KNOWN):
        made.gate.learn(rows(index, 200, seed=index), index)
        samples = [rows(index, 40, seed=10 * index + part) for part in range(3)]
        made.add(SkillRecord(name=name, expert=f"expert_{index}"), *samples)
    return made


@pytest.mark.parametrize("measure", [*MEASURES, "entropy", None])
def test_each_measure_separates_known_skills_from_new_ones(library: SkillLibrary, measure: str | None) -> None:
    for index, name in enumerate(KNOWN):
        seen = rows(index, 40, seed=77 + index)
        report = library.judge(seen, seen, measure)
        assert not report.novel and report.nearest == name
        assert measure is None or report.measure == measure
    seen = rows(NEW, 40, seed=80)
    report = library.judge(seen, seen, measure)
    assert (
        report.novel
        and report.outlier_share > 0.9
        and report.high_entropy_share is not None
        and report.high_entropy_share > 0.5
    )
    assert set(report.similarity) == set(KNOWN)


def test_the_threshold_contains_95_percent_of_the_held_out_examples(library: SkillLibrary) -> None:
    for measure, distances in MEASURES.items():
        for index, threshold in enumerate(library.thresholds(measure)):
            own = distances(library._embeddings[index].held_out, library._references)[:, index]
            assert (own <= threshold).double().mean() == pytest.approx(0.95, abs=1e-9)


def test_with_one_expert_the_entropy_falls_back_to_a_distance() -> None:
    library = SkillLibrary(WIDTH)
    seen = rows(0, 20, seed=1)
    assert library.judge(seen, seen).novel
    library.gate.learn(seen, 0)
    library.add(SkillRecord(name="a", expert="expert_0"), seen, seen, seen)
    report = library.judge(rows(NEW, 20, seed=2), rows(NEW, 20, seed=2), "entropy")
    assert report.measure == "cosine" and report.high_entropy_share is None and report.novel


def test_a_saved_library_gives_the_same_reports(library: SkillLibrary, tmp_path: Path) -> None:
    library.write_files(tmp_path)
    again = SkillLibrary.load(tmp_path)
    seen = rows(NEW, 20, seed=3)
    for measure in (*MEASURES, "entropy"):
        assert again.judge(seen, seen, measure) == library.judge(seen, seen, measure)
    assert again.expert_of("b") == "expert_1"


def with_losses(*losses: dict[str, float]) -> SkillLibrary:
    library, seen = SkillLibrary(WIDTH), rows(0, 5, seed=1)
    for name, measured in zip(KNOWN, losses, strict=False):
        library.add(SkillRecord(name=name, expert=f"expert_{name}", losses=measured), seen, seen, seen)
    return library


def test_forgetting_and_backward_transfer_worked_out_from_the_losses() -> None:
    library = with_losses({"a": 2.0}, {"a": 1.5, "b": 1.0}, {"a": 2.5, "b": 1.1, "c": 3.0})
    found = library.stream_metrics()
    assert found is not None
    # against their best, (2.5 - 1.5) and (1.1 - 1.0); against right after learning, (2.0 - 2.5) and (1.0 - 1.1)
    assert found.forgetting == pytest.approx((1.0 + 0.1) / 2)
    assert found.backward_transfer == pytest.approx(-0.3)
    library.gate.learn(rows(0, 5, seed=1), 0)
    library.remove_expert("expert_a", 0)
    left = library.stream_metrics()
    assert left is not None and left.forgetting == pytest.approx(0.1)


def test_without_all_losses_there_are_no_stream_metrics() -> None:
    assert with_losses().stream_metrics() is None
    assert with_losses({"a": 2.0}).stream_metrics() is None
    assert with_losses({}, {}).stream_metrics() is None, "a checkpoint of before they were measured"
    assert with_losses({"a": 2.0}, {"b": 1.0}).stream_metrics() is None, "a stream that did not evaluate a"
