"""A run that is killed anywhere goes on, and ends with the bits of a run that nobody disturbed."""

import os
import subprocess
import sys
from pathlib import Path

KILLS = os.environ.get("DYLO_MOE_KILLS", "6")
SCRIPT = Path(__file__).with_name("killed_run.py")


def test_a_killed_run_ends_with_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), KILLS],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"bit-equal after {KILLS} kills" in done.stdout
