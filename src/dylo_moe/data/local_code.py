"""Two code datasets that every machine has already, without a download.

``python_stdlib``: documented functions of the running interpreter's standard library
(prompt = signature and docstring, response = body).
``cpp_headers``: documented declarations of the C++ headers in the installed torch wheel
(prompt = documentation comment, response = the declaration with its inline body).

Both are read from installed files, so the rows depend on the versions of Python and torch, and on nothing else.
"""

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

MIN_RESPONSE_CHARS = 40
MAX_ROW_CHARS = 2_000
"""Bounds of a row: one-line responses teach nothing, and long rows do not fit the context."""

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "_bundled"}
_HEADER_ROOTS = ("ATen", "c10", "torch")
_GENERATED_FILE = "@generated"
_GENERATED_DOC = "// aten::"
"""Marks of headers generated from one schema, whose thousands of near-copies would outnumber all other rows."""

_DOC_COMMENT = re.compile(
    r"^(?P<indent>[ \t]*)(?P<doc>/\*\*(?:[^*]|\*(?!/))*\*/|//[^\n]*(?:\n[ \t]*//[^\n]*)*)[ \t]*\n(?=[ \t]*\S)",
    re.MULTILINE,
)
_DECLARATION_START = re.compile(r"[ \t]*(?:template\b|\[\[|[A-Za-z_:~])")
_NOT_A_DECLARATION = re.compile(
    r"[ \t]*(?:namespace|using|return|if|else|for|while|switch|case|public|private|protected)\b"
)
_STRINGS_AND_COMMENTS = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def python_stdlib_rows() -> Iterator[dict[str, str]]:
    """Yield ``{"prompt", "response"}`` for each documented standard-library function, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if not _STDLIB_SKIPPED & set(path.relative_to(root).parts))
    for path in files:
        yield from _rows_of_module(path.read_text(encoding="utf-8", errors="replace"))


def cpp_headers_rows() -> Iterator[dict[str, str]]:
    """Yield ``{"prompt", "response"}`` for each documented C++ declaration of torch's headers, in path order."""
    include = Path(torch.__file__).parent / "include"
    for root in _HEADER_ROOTS:
        for path in sorted((include / root).rglob("*.h")):
            yield from _rows_of_header(path.read_text(encoding="utf-8", errors="replace"))


def unique_rows(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the rows within the length bounds, and of equal rows one."""
    seen = {
        (row["prompt"], row["response"]): row
        for row in rows
        if len(row["response"].strip()) >= MIN_RESPONSE_CHARS
        and len(row["prompt"]) + len(row["response"]) <= MAX_ROW_CHARS
    }
    return list(seen.values())


def _rows_of_module(source: str) -> Iterator[dict[str, str]]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the library contains invalid files, for its own tests
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = node.body[0]
        # `def f(): "doc"; pass` on one line has no boundary between prompt and response
        if ast.get_docstring(node) is None or node.body[1].lineno <= (docstring.end_lineno or 0):
            continue
        split = docstring.end_lineno
        text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        head = text.splitlines(keepends=True)[: (split or 0) - node.lineno + 1]
        yield {"prompt": "".join(head), "response": text[len("".join(head)) :].rstrip() + "\n"}


def _rows_of_header(source: str) -> Iterator[dict[str, str]]:
    if _GENERATED_FILE in source[:2_000]:
        return
    for match in _DOC_COMMENT.finditer(source):
        declaration = _declaration(source, match.end())
        if declaration and not match["doc"].startswith(_GENERATED_DOC):
            lines = textwrap.dedent(match[0] + declaration).splitlines(keepends=True)
            boundary = match[0].count("\n")
            yield {"prompt": "".join(lines[:boundary]), "response": "".join(lines[boundary:]).rstrip() + "\n"}


def _declaration(source: str, start: int) -> str | None:
    """Return the declaration that begins at ``start``, up to its ``;`` or closing brace, or None if there is none."""
    if not _DECLARATION_START.match(source, start) or _NOT_A_DECLARATION.match(source, start):
        return None
    window = source[start : start + MAX_ROW_CHARS]
    code = _STRINGS_AND_COMMENTS.sub(lambda m: " " * len(m[0]), window)
    depth = 0
    for position, character in enumerate(code):
        if character in "{(":
            depth += 1
        elif character in "})":
            depth -= 1
            if depth < 0:
                return None
            if depth == 0 and character == "}":
                end = position + 1
                return window[: end + 1] if code[end : end + 1] == ";" else window[:end]
        elif character == ";" and depth == 0:
            return window[: position + 1]
    return None
