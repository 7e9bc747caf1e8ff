"""docs/interop.md names only tests that exist, and every test file of this folder."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "interop.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)


def test_every_test_that_the_page_names_exists() -> None:
    assert len(NAMED) >= 15
    for file, test in NAMED:
        assert re.search(rf"^def {test}\(" if test else "^def test_", (ROOT / file).read_text(), flags=re.MULTILINE), (
            f"docs/interop.md names {file}::{test}"
        )


def test_every_row_about_a_tool_names_a_test() -> None:
    tables = re.findall(r"^\| tool, version .*\n\| ---.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    rows = [row.strip("| ") for table in tables for row in table.splitlines()]
    assert len(rows) >= 14
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py(::\w+)?`$", row), row


def test_the_page_names_every_file_of_tests() -> None:
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert files == {Path(file).name for file, _ in NAMED if file.startswith("tests/interop/")}
