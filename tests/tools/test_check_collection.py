"""The tool that finds tests whose names differ between processes."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_collection.py"


@pytest.mark.parametrize(
    "parameters",
    ["int(time.time())", "time.time_ns()", "str(object())", "random.random()", "*{'one', 'two', 'three', 'four'}"],
)
def test_a_changing_name_is_found(tmp_path: Path, parameters: str) -> None:
    assert "other names in each process" in check(tmp_path, parameters, code=1)


def test_stable_names_are_accepted(tmp_path: Path) -> None:
    check(tmp_path, "1, 'two', 3.0, b'four'", code=0)


def test_a_failed_collection_is_not_a_success(tmp_path: Path) -> None:
    assert "pytest cannot collect" in check(tmp_path, "1 / 0", code=1)


def check(folder: Path, parameters: str, code: int) -> str:
    """Run the tool on one test with these parameters and return its standard error."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(
        "import random, time\nimport pytest\n\n"
        f"@pytest.mark.parametrize('value', [{parameters}])\ndef test_it(value): pass\n"
    )
    done = subprocess.run([sys.executable, str(TOOL)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr
