"""Skills that need no Hub: files of one kind, each cut into a beginning and its continuation.

The package itself reads Python functions and C++ declarations. Perl modules and manual pages are written here as files
of rows. MBPP and Code Alpaca come from a given folder. The skills are not chosen to be far apart: MBPP shares a
language with ``python_stdlib`` and Code Alpaca, and Perl modules contain manual pages.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

KINDS = {
    "perl": ("/usr/share", ("*.pm",)),
    "manual": ("/usr/share/man", ("man[1-8]/*.gz",)),
}
LINES, HEAD_LINES, MOST_ROWS, FEWEST_ROWS = 24, 4, 3000, 200
SMALLEST_CHARS, LARGEST_CHARS = 200, 3000


def stream(folder: Path, data_dir: Path) -> dict[str, str]:
    """Return the skills by name, in order, each as a dataset that the programs accept: a name, or ``name=path``.

    Args:
        folder: Folder to write the rows of this machine's files to.
        data_dir: Folder with ``mbpp*`` and ``code_alpaca*``.

    Raises:
        SystemExit: A skill is missing, in ``data_dir`` or on this machine.
    """
    skills = {"python_stdlib": "python_stdlib", "cpp_headers": "cpp_headers"}
    for name, (root, patterns) in KINDS.items():
        rows = _rows(Path(root), patterns)
        if len(rows) < FEWEST_ROWS:
            sys.exit(
                f"{root} has {len(rows)} rows of {' and '.join(patterns)}, and {FEWEST_ROWS} are needed for {name}"
            )
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        skills[name] = f"{name}={path}"
    for name in ("mbpp", "code_alpaca"):
        found = sorted(path for path in data_dir.glob(f"{name}*") if path.is_file())
        if not found:
            sys.exit(f"{data_dir} has no file {name}*; name the folder that has mbpp.jsonl and code_alpaca.json")
        skills[name] = f"{name}={found[0]}"
    return skills


def _rows(root: Path, patterns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return rows of the files below a folder, each text once; a seeded sample if there are too many."""
    files = sorted({path for pattern in patterns for path in root.rglob(pattern) if path.is_file()})
    random.Random(0).shuffle(files)
    found: dict[str, dict[str, str]] = {}
    for path in files:
        for row in _pieces(_text(path)):
            found.setdefault(row["prompt"] + row["response"], row)
        if len(found) >= MOST_ROWS:
            break
    return list(found.values())[:MOST_ROWS]


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")


def _pieces(text: str) -> Iterator[dict[str, str]]:
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines), LINES):
        piece = lines[start : start + LINES]
        if SMALLEST_CHARS <= sum(map(len, piece)) <= LARGEST_CHARS and len(piece) > HEAD_LINES:
            yield {"prompt": "".join(piece[:HEAD_LINES]), "response": "".join(piece[HEAD_LINES:])}
