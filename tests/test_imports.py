"""Imports between the layers go one way."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dylo_moe

PACKAGE = Path(__file__).parents[1] / "src" / "dylo_moe"
LAYERS = [
    "errors",
    {"durable", "spec"},
    "core",
    {"data", "training", "evaluation", "skills", "cloud"},
    "reports",
    "config",
    "runs",
    "commands",
    "cli",
    "__main__",
]
CORE_LAYERS = ["base", "lora", "routing"]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in ([layer] if isinstance(layer, str) else layer)}


def imported_modules(path: Path) -> list[str]:
    """Return the modules of the package that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.append(node.module or "")
    return [name for name in names if name.startswith("dylo_moe.")]


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in {name.split(".")[1] for name in imported_modules(path)} - {part}:
        assert RANK[imported] < RANK[part], f"{part} must not import {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_packages_are_imported_by_their_public_names(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        package = name.split(".")[1] if name.startswith("dylo_moe.") else part
        if package != part and (PACKAGE / package).is_dir():
            assert name == f"dylo_moe.{package}", f"import from dylo_moe.{package} and not from {name}"
            public = import_module(name).__all__
            assert {alias.name for alias in node.names} <= {*public}, f"dylo_moe.{package} does not list {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_within_a_package_are_imported_by_their_public_names(path: Path) -> None:
    part, *inner = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        top, *below = name.split(".")[1:] if name.startswith("dylo_moe.") else [""]
        if top == part and below and below[0] != inner[0] and (PACKAGE / part / below[0]).is_dir():
            face = f"dylo_moe.{part}.{below[0]}"
            assert name == face, f"import from {face} and not from {name}"
            assert {alias.name for alias in node.names} <= {*import_module(face).__all__}, (
                f"{face} does not list a name"
            )


def test_each_package_says_what_it_is() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not imports or "__all__" in path.read_text(), path


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*/*.py")), ids=lambda path: "/".join(path.parts[-2:]))
def test_imports_within_core_go_one_way(path: Path) -> None:
    for name in imported_modules(path):
        package, *rest = name.split(".")[1:]
        if package == "core" and rest:
            assert rest[0] in CORE_LAYERS[: CORE_LAYERS.index(path.parent.name) + 1], (
                f"{path.parent.name} imports {name}"
            )


def test_core_knows_no_trainer_and_no_dataset() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        text = path.read_text()
        assert "import datasets" not in text and "from datasets" not in text, path
        assert "Trainer" not in {
            alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for alias in node.names
        }, path


def test_the_package_exports_exactly_its_public_names() -> None:
    for name in dylo_moe.__all__:
        assert getattr(dylo_moe, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'DyLoRA'"):
        _ = dylo_moe.DyLoRA


def test_help_and_a_mistyped_program_do_not_wait_for_torch() -> None:
    code = "import sys; from dylo_moe.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for word in ("--help", "trian"):
        subprocess.run([sys.executable, "-c", code, word], check=True, capture_output=True)


@pytest.mark.parametrize("first", ["import peft", "from transformers import TrainingArguments", "import transformers"])
def test_the_auto_classes_know_mixtures_in_any_import_order(first: str) -> None:
    mapping = "AutoModelForCausalLM._model_mapping._extra_content"
    code = f"import dylo_moe; {first}; from transformers import AutoModelForCausalLM; assert {mapping}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
