"""The check that finds tests whose names are not the same in every process."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_collection.py"


@pytest.mark.parametrize(
    "parameters",
    ["int(time.time())", "time.time_ns()", "str(object())", "random.random()", "*{'one', 'two', 'three', 'four'}"],
)
def test_a_name_that_changes_is_found(tmp_path: Path, parameters: str) -> None:
    assert "other names in each process" in check(tmp_path, parameters, code=1)


def test_names_that_stay_are_accepted(tmp_path: Path) -> None:
    check(tmp_path, "1, 'two', 3.0, b'four'", code=0)


def test_a_collection_that_fails_is_no_success(tmp_path: Path) -> None:
    assert "pytest cannot collect" in check(tmp_path, "1 / 0", code=1)


def check(folder: Path, parameters: str, code: int) -> str:
    """Runs the check on one test with these parameters; gives what it wrote to standard error."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(
        "import random, time\nimport pytest\n\n"
        f"@pytest.mark.parametrize('value', [{parameters}])\ndef test_it(value): pass\n"
    )
    done = subprocess.run([sys.executable, str(TOOL)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr
