"""``python -m dylo_moe`` is ``dylora-moe``."""

import sys

from dylo_moe.cli import main

sys.exit(main())
