"""A library that announces a rename through its logger fails the test that uses the old name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from announcements import announcements

TESTS = Path(__file__).parent
TELL = "`old` is deprecated. Use `new` instead."


@pytest.fixture
def no_old_names() -> None:
    """Takes the place of the check that holds for every other test: here the announcements are the test's own."""


def test_what_is_said_once_in_a_process_is_noted_each_time() -> None:
    logger = transformers.logging.get_logger("transformers.some.module")
    for _ in range(2):
        with announcements() as said:
            logger.warning_once(TELL)
        assert said == [f"test_announcements.py:{said[0].split(':')[1]}: {TELL}"]


def test_a_logger_that_is_turned_down_is_heard() -> None:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with announcements() as said:
        transformers.logging.get_logger("transformers").warning_once(TELL)
    transformers.logging.set_verbosity(before)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("name", "message", "noted"),
    [
        ("transformers.x", "`old_name` is deprecated! Use `new_name` instead!", True),
        ("transformers.x", "`gradient_checkpointing` will be removed in v6.", True),
        ("peft.x", "The option was renamed to `rank`.", True),
        ("transformers.x", "Setting `use_cache=False`.", False),
        ("another", TELL, False),
    ],
)
def test_announcements_are_told_from_other_words(name: str, message: str, noted: bool) -> None:
    with announcements() as said:
        transformers.logging.get_logger(name).warning(message)
    assert bool(said) == noted


def test_a_test_that_uses_an_old_name_fails(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS}\n")
    (tmp_path / "test_it.py").write_text(
        f"import transformers\n\ndef test_it():\n    transformers.logging.get_logger().warning_once({TELL!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and TELL in done.stdout, done.stdout + done.stderr
