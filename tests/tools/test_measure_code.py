"""The tool that measures source trees counts by its own rules, on a small package."""

import json
from pathlib import Path

import pytest

from tools.call_path import CallPaths
from tools.measure_code import main, measure

LAYER = '''
from typing import Any
from tiny.core.ops import add, Weights
from tiny.core.router import Router


class Layer(Base):
    """A layer."""

    def forward(self: Any, x: "dict[str, Any]") -> int:
        """Returns the sum."""
        weights = self._weights(x)
        return add(x, weights.total)

    def _weights(self, x: int) -> Weights:
        return Weights(x)

    def unused(self) -> None:
        other()


class Base:
    def other(self) -> None:
        print("not called")


def hook(router: Router, x: int) -> int:
    return router(x)


def use(layer, made: Weights) -> int:
    layer.append(made.unused)
    return layer.other() + made.total
'''
OPS = '''
from tiny.outside import log


class Weights:
    def __init__(self, x: int) -> None:
        self.x = _positive(x)

    @property
    def total(self) -> int:
        return self.x


def add(x: int, y: int) -> int:
    """Return the sum."""
    try:
        return log(x) + y
    except Exception:
        return 0


def _positive(x: int) -> int:
    return abs(x)


def _twice(x: int) -> int:
    return 2 * x


def four(x: int) -> int:
    return _twice(_twice(x))  # type: ignore[no-any-return]
'''
ROUTER = """
class Router:
    def stub(self) -> int: ...

    def append(self, x: int) -> int:
        return self.stub()

    def forward(self, x: int) -> int:
        return super().forward(x)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {"core/layer.py": LAYER, "core/ops.py": OPS, "core/router.py": ROUTER}
    files |= {"outside.py": "def log(x: int) -> int:\n    return x\n", "core/__init__.py": ""}
    for name, text in files.items():
        path = tmp_path / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tiny"


def reached(package: Path, *roots: str) -> list[str]:
    return [definition.name for definition in CallPaths(package, ["core"]).reachable(roots)]


def test_figures_match_hand_counted_values(package: Path) -> None:
    figures, places = measure(package)
    assert (figures["files"], figures["root_files"], figures["functions"]) == (5, 1, 16)
    assert figures["lines"] == sum(len(path.read_text().splitlines()) for path in package.rglob("*.py"))
    assert (figures["any"], figures["self_any"], figures["type_ignore"], figures["d401"]) == (2, 1, 1, 1)
    assert (figures["function_lines_median"], figures["function_lines_max"]) == (2, 6)
    assert places["broad_excepts"] == ["core/ops.py:18"]
    assert places["private_helpers"] == ["core/layer.py:15 _weights", "core/ops.py:22 _positive"]
    assert not places["files_over_400"] and not places["functions_over_60"]


def test_limits_are_inclusive(package: Path) -> None:
    for lines in (400, 401):
        (package / f"of_{lines}.py").write_text("\n" * lines)
    for lines in (60, 61):
        (package / f"with_{lines}.py").write_text("def f() -> None:\n" + "    pass\n" * (lines - 1))
    places = measure(package)[1]
    assert places["files_over_400"] == ["of_401.py"]
    assert places["functions_over_60"] == ["with_61.py:1 f"]


def test_a_call_path_follows_names_within_its_folders(package: Path) -> None:
    layer = ["Layer._weights", "Layer.forward", "Weights", "Weights.__init__", "Weights.total", "_positive", "add"]
    assert reached(package, "Layer.forward") == layer
    assert reached(package, "hook") == ["hook", "Router.forward"]
    assert reached(package, "Router.append") == ["Router.append"], "a stub"
    figures, places = measure(package, ["hook"], ["core"])
    assert (figures["path_definitions"], figures["path_files"], figures["path_function_lines"]) == (2, 2, 4)
    assert places["path"] == ["core/layer.py hook", "core/router.py Router.forward"]


def test_annotations_choose_the_class_of_an_object(package: Path) -> None:
    assert reached(package, "use") == ["Base.other", "use", "Weights.total"]


def test_a_root_must_be_defined_once(package: Path) -> None:
    with pytest.raises(ValueError, match=r"the root Layer must be defined once .* found it in no file"):
        CallPaths(package, ["outside.py"]).find("Layer")


def test_the_table_has_a_column_per_tree(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    trees = [f"before={package}", f"after={package / 'core'}"]
    assert main([*trees, "--root", "before=hook", "--within", "core", "--output", str(output)]) == 0
    header, files, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["before", "after"] and files.split() == ["files", "5", "4"]
    result = json.loads(output.read_text())
    assert result["before"]["figures"]["path_definitions"] == 2
    assert "path_definitions" not in result["after"]["figures"]


def test_wrong_arguments_are_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"one={tmp_path / 'gone'}"]) == 2
    assert capsys.readouterr().err == f"error: one: there are no Python files in {tmp_path / 'gone'}\n"
