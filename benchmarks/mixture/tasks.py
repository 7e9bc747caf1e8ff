"""The tasks of the studies, from a folder of public data: 15 of SuperNI, and MBXP in nine languages.

A task is rows of prompt and response: some to train on, some to choose rates and scales on, some held out. MBXP holds
out the same tasks in every language, and leaves out those of MBPP+.
"""

import gzip
import json
import random
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]

MBXP_LANGUAGES = {
    "cpp": "mbcpp",
    "csharp": "mbcsp",
    "java": "mbjp",
    "javascript": "mbjsp",
    "kotlin": "mbkp",
    "php": "mbphp",
    "python": "mbpp",
    "ruby": "mbrbp",
    "typescript": "mbtsp",
}
"""Prefix of the file of each language that has canonical solutions."""

MBXP_HELD_OUT, MBXP_DEV = 100, 16
MBXP_LETTERS = 1000
"""Most letters of a row to hold out, in every language, so that none is too long for the model's input."""


class Task(NamedTuple):
    """Rows of one kind.

    Attributes:
        name: Name of the task.
        train: Rows to train on.
        dev: Rows to choose rates, scales and densities on.
        held_out: Rows to measure on.
    """

    name: str
    train: list[Row]
    dev: list[Row]
    held_out: list[Row]


def superni(folder: Path, *, definitions: bool) -> list[Task]:
    """Return the tasks of SuperNI in ``folder/superni``, sorted by name.

    Args:
        folder: Folder of public data.
        definitions: Whether each prompt begins with the definition of its task. Without it a task shows in its inputs
            alone.
    """
    return [
        Task(
            path.name.partition("_")[0],
            *(_instances(path / f"{split}.json.gz", definitions) for split in ("train", "dev", "test")),
        )
        for path in sorted((folder / "superni").iterdir())
    ]


def _instances(path: Path, definitions: bool) -> list[Row]:
    content = json.loads(gzip.decompress(path.read_bytes()))
    before = f"{_first(content['Definition'])}\n\n" if definitions else ""
    return [{"instruction": before + one["input"], "output": _first(one["output"])} for one in content["Instances"]]


def mbxp(folder: Path) -> list[Task]:
    """Return a task for each language of MBXP in ``folder/mbxp``, with the same held-out task numbers."""
    plus = {_number(row["task_id"]) for row in _rows(folder / "MbppPlus.jsonl.gz")}
    by_language = {}
    for language, prefix in MBXP_LANGUAGES.items():
        (file,) = sorted((folder / "mbxp").glob(f"{prefix}_release*.jsonl.gz"))
        by_language[language] = {
            number: {"prompt": row["prompt"], "response": row["canonical_solution"]}
            for row in _rows(file)
            if row.get("canonical_solution") and (number := _number(row["task_id"])) not in plus
        }
    in_all = sorted(set.intersection(*({*_short(rows)} for rows in by_language.values())))
    chosen = random.Random(0).sample(in_all, MBXP_HELD_OUT + MBXP_DEV)
    held_out, dev = sorted(chosen[:MBXP_HELD_OUT]), sorted(chosen[MBXP_HELD_OUT:])
    return [
        Task(
            language,
            [row for number, row in sorted(rows.items()) if number not in chosen],
            [rows[number] for number in dev],
            [rows[number] for number in held_out],
        )
        for language, rows in by_language.items()
    ]


def _short(rows: dict[int, Row]) -> list[int]:
    return [number for number, row in rows.items() if sum(map(len, row.values())) <= MBXP_LETTERS]


def control(folder: Path) -> list[Task]:
    """Return two domains of Python alone, which want the same: MBPP and Code Alpaca, 100 rows of each held out."""
    mbpp = [json.loads(line) for line in (folder / "mbpp.jsonl").read_text().splitlines()]
    alpaca = json.loads((folder / "code_alpaca_2k.json").read_text())
    domains = {
        "mbpp": [{"prompt": row["text"], "response": row["code"]} for row in mbpp],
        "code_alpaca": [
            {"prompt": f"{row['instruction']}\n\n{row['input']}".strip(), "response": row["output"]} for row in alpaca
        ],
    }
    for rows in domains.values():
        random.Random(0).shuffle(rows)
    return [Task(name, rows[116:], rows[:16], rows[16:116]) for name, rows in domains.items()]


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def _first(text: str | list[str]) -> str:
    return text if isinstance(text, str) else text[0]


def _number(task_id: str) -> int:
    return int(task_id.rpartition("/")[2])
