"""No answer that solves nothing passes, sees what it should not, leaves anything, or takes longer than it may."""

import ctypes
import os
import socket
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.evaluation import comparer, sandbox, wire
from dylo_moe.evaluation.canary import leaks_of
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import Allowance, Sandbox, candidates
from hostile import ENTRY_POINT, HOSTILE, INPUTS, REFERENCE, program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandboxes are Linux's")
pytest.importorskip("evalplus", reason="evalplus is not installed")

PROBLEM = Problem("Hostile/0", "humanevalplus", "", ENTRY_POINT, REFERENCE, base_inputs=INPUTS)
LINES = [wire.encode(list(arguments)).encode() for arguments in INPUTS]
ALLOWANCE = Allowance(limits=(1.0,) * (len(INPUTS) + 1), cpu=2, output=1 << 18)
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def tier(request: pytest.FixtureRequest) -> Sandbox:
    """Each tier that this machine has."""
    found = {candidate.name: candidate for candidate in candidates()}.get(request.param)
    if found is None:
        pytest.skip(f"no {request.param} on this machine")
    leaks = leaks_of(found)
    assert not any(leak.startswith("the canary could") for leak in leaks), leaks
    if leaks:
        pytest.skip(f"{request.param} is not to be had here: {', '.join(leaks)}")
    return found


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a hostile program could reach if nothing held it."""
    monkeypatch.setenv("HOSTILE_TOKEN", "secret")
    monkeypatch.setattr(sandbox, "ASLEEP", 1.0)
    private = Path.home() / f".dylo-moe-private-{os.getpid()}"
    private.write_text("secret")
    private.chmod(0o644)
    folder = tmp_path / "outside"
    folder.mkdir()
    for path in (folder, *folder.parents):
        if path.owner() == private.owner() and path != Path("/") and os.access(path, os.W_OK):
            path.chmod(path.stat().st_mode | 0o007)
    # orphans of this process become its children, where they are seen
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "folder": str(folder),
            "private": str(private),
            "port": server.getsockname()[1],
            "token": "HOSTILE_TOKEN",
            "judge": os.getpid(),
            "packages": sysconfig.get_paths()["purelib"],
        }
    private.unlink()


def verdict_on(tier: Sandbox, code: str) -> comparer.Verdict:
    """As a ``Judge`` comes to it."""
    expected = tier.run(REFERENCE, ENTRY_POINT, LINES, ALLOWANCE).lines[1:]
    run = tier.run(code, ENTRY_POINT, LINES, ALLOWANCE)
    if run.status == "finished":
        return comparer.compare(PROBLEM, LINES, expected, run.lines)
    return comparer.Verdict(False, "killed" if run.status == "died" else run.status, run.detail)


def children() -> set[int]:
    """The processes whose parent is this one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between being listed and being read
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_gains_nothing_and_leaves_nothing(name: str, tier: Sandbox, places: dict[str, Any]) -> None:
    before = children()
    mode = Path(places["private"]).stat().st_mode
    verdict = verdict_on(tier, program(name, places))
    assert not verdict.passed, f"{HOSTILE[name].tries}: {verdict}"
    assert children() <= before, "a process of it is still there"
    assert not list(Path(places["folder"]).iterdir()), "it wrote outside"
    assert Path(places["private"]).stat().st_mode == mode
    assert "secret" not in verdict.detail and verdict.detail.isprintable()


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 30


def test_a_right_answer_passes(tier: Sandbox) -> None:
    assert verdict_on(tier, REFERENCE) == comparer.Verdict(True, "passed")


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("always_equal", "wrong"),
        ("forged_output", "output"),
        ("forged_digests", "wrong"),
        ("swallowing_loop", "timeout"),
        ("endless_sleep", "timeout"),
        ("channel_output", "output"),
        ("segmentation_fault", "killed"),
        ("sys_exit", "error"),
    ],
)
def test_what_became_of_it_is_told(name: str, status: str, tier: Sandbox, places: dict[str, Any]) -> None:
    assert verdict_on(tier, program(name, places)).status == status
