"""Write the measured tables into the pages, from the committed results; ``make docs`` runs it.

A table is between ``<!-- table: NAME -->`` and ``<!-- end -->``. Nothing is measured here.
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WIDTH = 116
"""Longest line of the notes below a table."""
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
sys.path.insert(0, str(ROOT / "benchmarks"))

import data_tables  # noqa: E402 - the benchmarks are scripts, not a package
import demo  # noqa: E402
import forgetting_report  # noqa: E402
import humaneval_tables  # noqa: E402
import judge  # noqa: E402
import quality  # noqa: E402
import sandbox_table  # noqa: E402
import skill_cost  # noqa: E402
import speed_profile  # noqa: E402
import speed_table  # noqa: E402
import training_run  # noqa: E402

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo.json", demo.table),
    "speed peers": ("speed.json", speed_table.peers_table),
    "speed targets": ("speed.json", speed_table.targets_table),
    "profile": ("profile.json", speed_profile.tables),
    "quality": ("quality.json", quality.table),
    "training": ("training.json", training_run.table),
    "forgetting arms": ("forgetting.json", forgetting_report.arms_table),
    "forgetting gates": ("forgetting.json", forgetting_report.gates_table),
    "forgetting novelty": ("forgetting.json", forgetting_report.novelty_table),
    "skill cost": ("skill_cost.json", skill_cost.table),
    "sandbox": ("sandbox.json", sandbox_table.table),
    "judge": ("judge.json", judge.table),
    "humaneval": ("humaneval.json", humaneval_tables.scores_table),
    "humaneval batches": ("humaneval.json", humaneval_tables.batches_table),
    "data rows": ("data.json", data_tables.rows_table),
    "data scale": ("data.json", data_tables.scale_table),
    "data throughput": ("data.json", data_tables.throughput_table),
}


def page(path: Path) -> str:
    """Return a page with its tables filled in.

    Raises:
        KeyError: The page contains the mark of an unknown table.
    """

    def filled(match: re.Match[str]) -> str:
        file, write = TABLES[match["name"]]
        table = write(json.loads((ROOT / "benchmarks" / "results" / file).read_text()))
        note = textwrap.TextWrapper(WIDTH, break_on_hyphens=False)
        lines = [line if line.startswith("|") else note.fill(line) for line in table.splitlines()]
        return "\n".join([f"<!-- table: {match['name']} -->", *lines, "<!-- end -->"])

    pattern = r"<!-- table: (?P<name>.*?) -->\n.*?<!-- end -->"
    return re.sub(pattern, filled, path.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for written in PAGES:
        written.write_text(page(written))
