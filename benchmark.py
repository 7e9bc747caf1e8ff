"""``python benchmark.py ...`` is ``dylora-moe benchmark ...``."""

import sys

from dylo_moe.cli import run

if __name__ == "__main__":
    sys.exit(run("benchmark"))
