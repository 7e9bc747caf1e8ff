"""``python submit_full_training.py ...`` is ``dylora-moe submit ...``."""

import sys

from dylo_moe.cli import run

if __name__ == "__main__":
    sys.exit(run("submit"))
