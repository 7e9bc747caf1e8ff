"""``python entrypoint.py --train ...`` is what a container runs: ``dylora-moe entrypoint --train ...``."""

import sys

from dylo_moe.cli import run

if __name__ == "__main__":
    sys.exit(run("entrypoint"))
