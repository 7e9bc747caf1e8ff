"""Write the measured tables into the pages, from the committed results; ``make docs`` runs it.

A table is between ``<!-- table: NAME -->`` and ``<!-- end -->``. Nothing is measured here.
"""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data import tables as data_tables
from benchmarks.demo import __main__ as demo
from benchmarks.forgetting import report as forgetting_report
from benchmarks.forgetting import skill_cost
from benchmarks.humaneval import tables as humaneval_tables
from benchmarks.judge import __main__ as judge
from benchmarks.quality import __main__ as quality
from benchmarks.sandbox import table as sandbox_table
from benchmarks.speed import profile as speed_profile
from benchmarks.speed import table as speed_table
from benchmarks.training import __main__ as training_run
from benchmarks.versions import __main__ as versions
from tools import peft_own_tests

ROOT = Path(__file__).parents[1]
WIDTH = 116
"""Longest line of the notes below a table."""
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("benchmarks/demo/demo.json", demo.table),
    "speed peers": ("benchmarks/speed/speed.json", speed_table.peers_table),
    "speed targets": ("benchmarks/speed/speed.json", speed_table.targets_table),
    "profile": ("benchmarks/speed/profile.json", speed_profile.tables),
    "quality": ("benchmarks/quality/quality.json", quality.table),
    "training": ("benchmarks/training/training.json", training_run.table),
    "forgetting arms": ("benchmarks/forgetting/forgetting.json", forgetting_report.arms_table),
    "forgetting gates": ("benchmarks/forgetting/forgetting.json", forgetting_report.gates_table),
    "forgetting novelty": ("benchmarks/forgetting/forgetting.json", forgetting_report.novelty_table),
    "skill cost": ("benchmarks/forgetting/skill_cost.json", skill_cost.table),
    "sandbox": ("benchmarks/sandbox/sandbox.json", sandbox_table.table),
    "judge": ("benchmarks/judge/judge.json", judge.table),
    "humaneval": ("benchmarks/humaneval/humaneval.json", humaneval_tables.scores_table),
    "humaneval batches": ("benchmarks/humaneval/humaneval.json", humaneval_tables.batches_table),
    "versions": ("benchmarks/versions/versions.json", versions.table),
    "peft": ("tools/peft_own_tests.json", peft_own_tests.outcomes_table),
    "data rows": ("benchmarks/data/data.json", data_tables.rows_table),
    "data scale": ("benchmarks/data/data.json", data_tables.scale_table),
    "data throughput": ("benchmarks/data/data.json", data_tables.throughput_table),
}


def page(path: Path) -> str:
    """Return a page with its tables filled in.

    Raises:
        KeyError: The page contains the mark of an unknown table.
    """

    def filled(match: re.Match[str]) -> str:
        file, write = TABLES[match["name"]]
        table = write(json.loads((ROOT / file).read_text()))
        note = textwrap.TextWrapper(WIDTH, break_on_hyphens=False)
        lines = [line if line.startswith("|") else note.fill(line) for line in table.splitlines()]
        return "\n".join([f"<!-- table: {match['name']} -->", *lines, "<!-- end -->"])

    pattern = r"<!-- table: (?P<name>.*?) -->\n.*?<!-- end -->"
    return re.sub(pattern, filled, path.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for written in PAGES:
        written.write_text(page(written))
