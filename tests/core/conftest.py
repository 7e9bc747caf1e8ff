"""Lets the test modules of this folder import ``families``, under pytest's importlib mode as well as run as scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
