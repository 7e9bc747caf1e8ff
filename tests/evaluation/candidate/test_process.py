"""An answer sees only the ``candidate`` package of this project, and that imports nothing that must stay hidden."""

import ast
import sys
from pathlib import Path

import pytest

import dylo_moe
from dylo_moe.evaluation.candidate import process
from dylo_moe.evaluation.sandbox.visible_files import PACKAGES, visible_files

PROJECT, CANDIDATE = Path(dylo_moe.__file__).parent, Path(process.__file__).parent
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def imported_names(node: ast.AST) -> list[str]:
    """Return the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, "a relative import"
        return [node.module]
    return []


@pytest.mark.parametrize("path", sorted(CANDIDATE.rglob("*.py")), ids=lambda path: path.name)
def test_candidate_imports_only_the_standard_library_and_itself(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    in_functions = {node for top in ast.walk(tree) if isinstance(top, FUNCTIONS) for node in ast.walk(top)}
    for node in ast.walk(tree):
        for name in imported_names(node):
            own = name == process.__package__ or name.startswith(f"{process.__package__}.")
            # an answer may import these packages itself, and its values are encoded then
            late = node in in_functions and name in PACKAGES
            assert own or late or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"
    assert "import_module" not in text and "__import__" not in text


def test_candidate_is_the_only_visible_folder_of_this_project() -> None:
    visible = {Path(path) for path in visible_files().allowed()}
    assert CANDIDATE in visible
    for path in visible - {CANDIDATE}:
        assert not path.is_relative_to(PROJECT) and not PROJECT.is_relative_to(path)
