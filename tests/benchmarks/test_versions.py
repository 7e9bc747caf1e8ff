"""The comparison of two versions: it counts operators of this version, and shows which differ."""

from pathlib import Path

import pytest

from benchmarks.versions.__main__ import ROOT, Version, compare_counts, table


def test_operators_that_differ_are_named_and_all_are_counted() -> None:
    found = compare_counts({"aten::mm [[2, 3]]": 4, "aten::add []": 1}, {"aten::mm [[2, 3]]": 4, "aten::to []": 2})
    assert found["operators"] == [5, 6]
    assert found["differ"] == {"aten::add []": [1, 0], "aten::to []": [0, 2]}
    row = {"workload": ["train", "final", 4, 2], "ratio": {"median": 1.01, "quartiles": [0.98, 1.02], "rounds": 3}}
    where = {"processor": "a machine", "threads": 2, "versions": {"torch": "2"}}
    commits = {"before": "0123456789", "now": "abcdefghij"}
    shown = table({"rows": [{**row, **found}], "environment": where, "commits": commits, "sittings": 2})
    assert "| train final 4 2 | 1.010 | 0.980 to 1.020 | 5 | 6 | add, to |" in shown
    assert "3 rounds in 2 sittings, 0123456 and abcdefg; a machine, 2 threads, torch 2." in shown


def test_a_version_counts_the_operators_of_a_workload(embedded_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYLO_MOE_CACHE", str(embedded_cache))
    version = Version(ROOT, length=8)
    counts = version.ask("operators", "forward", "prefix", 2, 1)
    version.close()
    assert any(name.startswith("aten::mm [[") for name in counts)
