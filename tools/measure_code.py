"""Measure source trees and compare them: sizes, types, docstrings, helpers, broad excepts, and one path of calls.

    python -m tools.measure_code before=/tmp/before/src/dylo_moe after=src/dylo_moe --within core \
        --root before=RoutedLayer.routed_forward --root before=_route_by_input --root after=RoutedLayer.forward ...

Each tree is a package folder with a label. The table has a column for each tree; ``--output`` writes the same figures,
and the places that they count, as JSON.

* Lines are all lines of a file, or of a function from ``def`` to its last line. Functions include methods and functions
  inside functions.
* ``Any`` counts each use of the name in code or in a quoted annotation, imports apart.
* D401 is ruff's count of function docstrings that are not imperative, by the pydocstyle convention ``pep257``.
* A private helper is a module function or method of at most 6 lines whose name begins with one underscore and is used
  once outside itself: in its own file and the files that import it for a function, anywhere in the tree for a method.
  A method that several classes define is not one: it is an interface, or overrides another.
* A broad except catches ``Exception``, ``BaseException`` or everything.
* The call path is all that the code of the roots may run in the folders of ``--within``, by the rule in ``call_path``.
"""

import argparse
import ast
import json
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.call_path import CallPaths, FunctionNode

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_HELPER_LINES = 400, 60, 6
BROAD = {"Exception", "BaseException"}

Figures = dict[str, int | float]
Places = dict[str, list[str]]

TITLES = {
    "files": "files",
    "lines": "lines",
    "root_files": "files at the package root",
    "file_lines_median": "lines of a file, median",
    "file_lines_max": "lines of a file, maximum",
    "files_over_400": f"files over {MAX_FILE_LINES} lines",
    "functions": "functions",
    "function_lines_median": "lines of a function, median",
    "function_lines_max": "lines of a function, maximum",
    "functions_over_60": f"functions over {MAX_FUNCTION_LINES} lines",
    "any_per_1000_lines": "Any per 1,000 lines",
    "self_any": "self: Any",
    "type_ignore_per_1000_lines": "type: ignore per 1,000 lines",
    "d401": "docstrings that are not imperative (D401)",
    "private_helpers": f"private helpers of {MAX_HELPER_LINES} lines or less, used once",
    "broad_excepts": "broad excepts",
    "path_definitions": "call path: definitions",
    "path_files": "call path: files",
    "path_function_lines": "call path: lines of its functions",
}
"""Rows of the table, by the key of the figure."""


class File(NamedTuple):
    """A source file.

    Attributes:
        name: Path of the file, relative to the source folder.
        text: Its text.
        tree: Its syntax.
    """

    name: str
    text: str
    tree: ast.Module


def measure(source: Path, roots: Sequence[str] = (), within: Sequence[str] = ()) -> tuple[Figures, Places]:
    """Measure one tree.

    Args:
        source: Folder of the package.
        roots: Functions or methods (``Class.name``) whose path of calls is measured; none to leave that out.
        within: Folders of the package in which calls are followed; empty for all.

    Returns:
        The figures by name, and the places that some of them count.

    Raises:
        ValueError: The folder holds no source file, or a root is not defined once.
    """
    files = [
        File(str(path.relative_to(source)), path.read_text(), ast.parse(path.read_text()))
        for path in sorted(source.rglob("*.py"))
    ]
    if not files:
        raise ValueError(f"there are no Python files in {source}")
    file_lines = {file.name: len(file.text.splitlines()) for file in files}
    function_lines = {
        f"{file.name}:{node.lineno} {node.name}": line_count(node)
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, FunctionNode)
    }
    places: Places = {
        "files_over_400": [name for name, lines in file_lines.items() if lines > MAX_FILE_LINES],
        "functions_over_60": [name for name, lines in function_lines.items() if lines > MAX_FUNCTION_LINES],
        "private_helpers": list(private_helpers(files)),
        "broad_excepts": list(broad_excepts(files)),
    }
    lines = sum(file_lines.values())
    any_uses, ignores = sum(map(count_any, files)), sum(count_type_ignores(source / file.name) for file in files)
    figures: Figures = {
        "files": len(files),
        "lines": lines,
        "root_files": sum("/" not in file.name for file in files),
        "file_lines_median": statistics.median(file_lines.values()),
        "file_lines_max": max(file_lines.values()),
        "functions": len(function_lines),
        "function_lines_median": statistics.median(function_lines.values() or [0]),
        "function_lines_max": max(function_lines.values(), default=0),
        "any": any_uses,
        "any_per_1000_lines": round(1000 * any_uses / lines, 1),
        "self_any": sum(map(count_self_any, files)),
        "type_ignore": ignores,
        "type_ignore_per_1000_lines": round(1000 * ignores / lines, 1),
        "d401": count_d401(source),
    }
    figures |= {name: len(found) for name, found in places.items()}
    if roots:
        path_figures, places["path"] = measure_path(source, roots, within)
        figures |= path_figures
    return figures, places


def measure_path(source: Path, roots: Sequence[str], within: Sequence[str]) -> tuple[Figures, list[str]]:
    """Return the figures of a call path, and its definitions by file."""
    paths = CallPaths(source, within)
    found = paths.reachable(roots)
    figures: Figures = {
        "path_definitions": len(found),
        "path_files": len({definition.module for definition in found}),
        "path_function_lines": sum(
            line_count(definition.node) for definition in found if isinstance(definition.node, FunctionNode)
        ),
    }
    return figures, [f"{paths.modules[definition.module].file} {definition.name}" for definition in found]


def line_count(node: FunctionNode) -> int:
    """Return the number of lines of a function, from ``def`` to its last line."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def count_any(file: File) -> int:
    """Return how often a file uses ``Any``, quoted annotations included."""
    found = 0
    for node in ast.walk(file.tree):
        found += _is_any(node)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for part in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found += sum(map(_is_any, ast.walk(ast.parse(part.value, mode="eval"))))
    return found


def _is_any(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")


def count_self_any(file: File) -> int:
    """Return the number of methods of a file whose ``self`` is annotated with ``Any``."""
    arguments = [node for node in ast.walk(file.tree) if isinstance(node, ast.arg) and node.arg == "self"]
    return sum(argument.annotation is not None and _is_any(argument.annotation) for argument in arguments)


def count_type_ignores(path: Path) -> int:
    """Return the number of ``type: ignore`` comments of a file."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return sum(token.type == tokenize.COMMENT and "type: ignore" in token.string for token in tokens)


def count_d401(source: Path) -> int:
    """Return the number of docstrings below a folder that ruff's rule D401 reports."""
    rule = ["--select", "D401", "--config", 'lint.pydocstyle.convention="pep257"']
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-respect-gitignore", "--no-cache", *rule]
    done = subprocess.run([*command, "--output-format", "json", str(source)], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise ValueError(f"ruff cannot check {source}: {done.stderr.strip()}")
    return len(json.loads(done.stdout))


def private_helpers(files: Sequence[File]) -> Iterator[str]:
    """Yield the private functions and methods of at most 6 lines that are used once."""
    uses = {file.name: _loaded_names(file.tree) for file in files}
    defined = [(node.name, is_method) for file in files for node, is_method in _functions_and_methods(file.tree)]
    imports = {
        file.name: {
            alias.name for node in ast.walk(file.tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        for file in files
    }
    for file in files:
        for node, is_method in _functions_and_methods(file.tree):
            private = node.name.startswith("_") and not node.name.startswith("__")
            interface = is_method and defined.count((node.name, True)) > 1
            if private and not interface and line_count(node) <= MAX_HELPER_LINES:
                users = [name for name in uses if is_method or name == file.name or node.name in imports[name]]
                used = sum(uses[name].count(node.name) for name in users)
                if used - _loaded_names(node).count(node.name) == 1:
                    yield f"{file.name}:{node.lineno} {node.name}"


def _functions_and_methods(tree: ast.Module) -> Iterator[tuple[FunctionNode, bool]]:
    for node in tree.body:
        if isinstance(node, FunctionNode):
            yield node, False
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, FunctionNode):
                    yield member, True


def _loaded_names(tree: ast.AST) -> list[str]:
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return names + [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def broad_excepts(files: Sequence[File]) -> Iterator[str]:
    """Yield the places of ``except`` clauses that catch everything or nearly everything."""
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ExceptHandler):
                caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else BROAD
                if caught & BROAD:
                    yield f"{file.name}:{node.lineno}"


def table(trees: Mapping[str, Figures]) -> str:
    """Return the figures as text, with a column for each tree."""
    rows = [["", *trees]]
    for key, title in TITLES.items():
        if any(key in figures for figures in trees.values()):
            rows.append([title, *(f"{figures[key]:,}" if key in figures else "" for figures in trees.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([title.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Print the table and write the result; return 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(description="Measure source trees and compare them.")
    parser.add_argument("trees", nargs="+", metavar="LABEL=FOLDER", help="a package folder, such as after=src/dylo_moe")
    parser.add_argument("--root", action="append", default=[], metavar="[LABEL=]NAME", help="start of the call path")
    parser.add_argument("--within", action="append", default=[], metavar="FOLDER", help="folder to follow calls in")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    result: dict[str, Figures] = {}
    places: dict[str, Places] = {}
    for tree in args.trees:
        label, _, folder = tree.rpartition("=")
        label = label or Path(folder).name
        roots = [root.rpartition("=")[2] for root in args.root if root.rpartition("=")[0] in ("", label)]
        try:
            result[label], places[label] = measure(Path(folder), roots, args.within)
        except ValueError as error:
            sys.stderr.write(f"error: {label}: {error}\n")
            return 2
    sys.stdout.write(table(result))
    if args.output is not None:
        written = {label: {"figures": result[label], "places": places[label]} for label in result}
        args.output.write_text(json.dumps(written, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
