"""Check that pytest collects the same tests twice, as parallel workers require.

A parameter that holds the time, an address, a random number or the order of a set gives its test a different name in
each process. So the two collections run one after the other, with different hash seeds. Run this in the folder in which
pytest runs; arguments are passed to pytest.
"""

import difflib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

CLOCK_TICK = 1.1
"""Seconds between the two collections, so that a time in whole seconds differs too."""


def collected(hash_seed: int, arguments: Sequence[str]) -> list[str]:
    """Return the ids of the tests, in order; exit with pytest's output if it cannot collect them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}error: pytest cannot collect the tests")
    return [line for line in done.stdout.splitlines() if "::" in line]


def main(arguments: Sequence[str]) -> int:
    """Compare two collections; return 1 and print the tests that differ, else 0."""
    first = collected(1, arguments)
    time.sleep(CLOCK_TICK)
    second = collected(2, arguments)
    if first == second:
        sys.stdout.write(f"{len(first)} tests, with the same names both times\n")
        return 0
    sys.stderr.write("\n".join(difflib.unified_diff(first, second, "first collection", "second", n=0, lineterm="")))
    sys.stderr.write("\nerror: tests have other names in each process; remove what changes from their parameters\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
