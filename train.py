"""``python train.py ...`` is ``dylora-moe train ...``."""

import sys

from dylo_moe.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
