"""Entry point of ``python -m dylo_moe``, which is the same as ``dylora-moe``."""

import sys

from dylo_moe.cli import main

sys.exit(main())
