"""Write ``src/dylo_moe/data/benchmark_grams.npz``, which keeps benchmark tasks out of training data.

    python -m tools.build_decontamination_index FOLDER

FOLDER contains EvalPlus's ``HumanEvalPlus.jsonl.gz`` and ``MbppPlus.jsonl.gz``, and Google's ``mbpp.jsonl``, whose
solutions differ from those of MBPP+. The file contains hashes of word n-grams; no text can be read from them.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import dylo_moe.data
from dylo_moe.data.decontamination import INDEX_FILE, build_index

OUTPUT = Path(dylo_moe.data.__path__[0]) / INDEX_FILE


def main() -> None:
    """Read the folder and write the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    index = build_index(problems(parser.parse_args().folder))
    np.savez_compressed(OUTPUT, allow_pickle=False, **index)
    sizes = ", ".join(f"{len(values):,} {name}" for name, values in index.items())
    sys.stdout.write(f"{OUTPUT}: {sizes}, {OUTPUT.stat().st_size / 1000:.0f} kB\n")


def problems(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the id, the question and the texts of each task of HumanEval+ and MBPP+."""
    for row in rows(folder / "HumanEvalPlus.jsonl.gz"):
        yield row["task_id"], "", [row["prompt"] + row["canonical_solution"]]
    original = {row["task_id"]: row for row in rows(folder / "mbpp.jsonl")}
    for row in rows(folder / "MbppPlus.jsonl.gz"):
        question = "\n".join(line for line in row["prompt"].splitlines() if not line.lstrip().startswith("assert"))
        older = original[int(row["task_id"].partition("/")[2])]
        questions = f"{question}\n{older['text']}"
        yield row["task_id"], questions, [question, older["text"], row["canonical_solution"], older["code"]]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


if __name__ == "__main__":
    main()
