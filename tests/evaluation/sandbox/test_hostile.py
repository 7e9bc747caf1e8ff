"""A hostile answer does not pass, read what it must not, leave anything behind, or exceed its limits."""

import ctypes
import os
import socket
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dylo_moe
from dylo_moe.evaluation.candidate import codec, process
from dylo_moe.evaluation.judging import comparison
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import runner
from dylo_moe.evaluation.sandbox.runner import ResourceLimits, Sandbox, available_sandboxes
from dylo_moe.evaluation.sandbox.self_check import find_leaks
from dylo_moe.evaluation.sandbox.visible_files import visible_files
from tests.support.hostile import ENTRY_POINT, HOSTILE, INPUTS, REFERENCE, program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandboxes are Linux's")
pytest.importorskip("evalplus", reason="evalplus is not installed")

PROBLEM = Problem("Hostile/0", "humanevalplus", "", ENTRY_POINT, REFERENCE, base_inputs=INPUTS)
LINES = [codec.encode(list(arguments)).encode() for arguments in INPUTS]
LIMITS = ResourceLimits(call_seconds=(1.0,) * (len(INPUTS) + 1), cpu_seconds=2, output_bytes=1 << 18)
PR_SET_CHILD_SUBREAPER = 36
PROJECT = Path(dylo_moe.__file__).parent
READER = """
def readable(paths):
    found = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                file.read()
        except OSError:
            continue
        found.append(path)
    return found
"""


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def tier(request: pytest.FixtureRequest) -> Sandbox:
    """Each tier of this machine."""
    found = {candidate.name: candidate for candidate in available_sandboxes()}.get(request.param)
    if found is None:
        pytest.skip(f"no {request.param} on this machine")
    leaks = find_leaks(found)
    assert not any(leak.startswith("the canary could") for leak in leaks), leaks
    if leaks:
        pytest.skip(f"{request.param} does not work here: {', '.join(leaks)}")
    return found


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Yield what a hostile program could reach without a sandbox."""
    monkeypatch.setenv("HOSTILE_TOKEN", "secret")
    monkeypatch.setattr(runner, "MAX_IDLE", 1.0)
    private = Path.home() / f".dylo-moe-private-{os.getpid()}"
    private.write_text("secret")
    private.chmod(0o644)
    folder = tmp_path / "outside"
    folder.mkdir()
    for path in (folder, *folder.parents):
        if path.owner() == private.owner() and path != Path("/") and os.access(path, os.W_OK):
            path.chmod(path.stat().st_mode | 0o007)
    # orphans become children of this process, so that they are found
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


def verdict_on(tier: Sandbox, code: str) -> comparison.Verdict:
    """Return the verdict as a ``Judge`` would."""
    expected = tier.run(REFERENCE, ENTRY_POINT, LINES, LIMITS).lines[1:]
    run = tier.run(code, ENTRY_POINT, LINES, LIMITS)
    if run.status == "finished":
        return comparison.compare_outputs(PROBLEM, LINES, expected, run.lines)
    return comparison.Verdict(False, "killed" if run.status == "died" else run.status, run.detail)


def children() -> set[int]:
    """Return the running children of this process."""
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
    assert children() <= before, "one of its processes still runs"
    assert not list(Path(places["folder"]).iterdir()), "it wrote outside"
    assert Path(places["private"]).stat().st_mode == mode
    assert "secret" not in verdict.detail and verdict.detail.isprintable()


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 30


def test_a_right_answer_passes(tier: Sandbox) -> None:
    assert verdict_on(tier, REFERENCE) == comparison.Verdict(True, "passed")


def test_of_this_project_an_answer_can_read_the_candidate_package_alone(tier: Sandbox) -> None:
    paths = [os.__file__, *(str(path) for path in PROJECT.rglob("*") if path.is_file())]
    limits = ResourceLimits(call_seconds=(1.0, 1.0), cpu_seconds=2, output_bytes=1 << 18)
    run = tier.run(READER, "readable", [codec.encode([paths]).encode()], limits)
    assert run.status == "finished", run
    status, found = codec.decode_line(run.lines[1])
    assert status == "ok" and os.__file__ in found, "the reader itself works"
    assert all(Path(path).is_relative_to(Path(process.__file__).parent) for path in found if path != os.__file__)


def test_the_candidate_package_is_visible_where_it_is_installed_into_a_hidden_folder(
    tier: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = visible_files()
    installed = replace(visible, hidden=(*visible.hidden, str(PROJECT.parent)))
    monkeypatch.setattr(runner, "visible_files", lambda: installed)
    assert verdict_on(tier, REFERENCE) == comparison.Verdict(True, "passed")


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
def test_the_verdict_says_how_it_failed(name: str, status: str, tier: Sandbox, places: dict[str, Any]) -> None:
    assert verdict_on(tier, program(name, places)).status == status
