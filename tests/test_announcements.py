"""A test that uses a name whose deprecation a library logs fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.support.announcements import announcements

ROOT = Path(__file__).parents[1]
DEPRECATED = "`old` is deprecated. Use `new` instead."


@pytest.fixture
def no_deprecated_names() -> None:
    """Override the check of all other tests, since these tests log deprecations themselves."""


def test_a_warn_once_message_is_noted_each_time() -> None:
    logger = transformers.logging.get_logger("transformers.some.module")
    for _ in range(2):
        with announcements() as messages:
            logger.warning_once(DEPRECATED)
        assert messages == [f"test_announcements.py:{messages[0].split(':')[1]}: {DEPRECATED}"]


def test_a_silenced_logger_is_noted_too() -> None:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with announcements() as messages:
        transformers.logging.get_logger("transformers").warning_once(DEPRECATED)
    transformers.logging.set_verbosity(before)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("name", "message", "noted"),
    [
        ("transformers.x", "`old_name` is deprecated! Use `new_name` instead!", True),
        ("transformers.x", "`gradient_checkpointing` will be removed in v6.", True),
        ("peft.x", "The option was renamed to `rank`.", True),
        ("transformers.x", "Setting `use_cache=False`.", False),
        ("another", DEPRECATED, False),
    ],
)
def test_other_messages_are_not_announcements(name: str, message: str, noted: bool) -> None:
    with announcements() as messages:
        transformers.logging.get_logger(name).warning(message)
    assert bool(messages) == noted


def test_a_test_that_uses_an_old_name_fails(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    (tmp_path / "test_it.py").write_text(
        f"import transformers\n\ndef test_it():\n    transformers.logging.get_logger().warning_once({DEPRECATED!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and DEPRECATED in done.stdout, done.stdout + done.stderr
