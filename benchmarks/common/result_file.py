"""Flags that the benchmarks share, and the environment that their result files record."""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


def parse_flags(parser: argparse.ArgumentParser, default: Path) -> argparse.Namespace:
    """Add ``--output`` and ``--show`` to a parser, parse, and refuse a file that cannot be read or written."""
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="the result file")
    parser.add_argument("--show", action="store_true", help="only print the tables of the result file")
    args = parser.parse_args()
    if args.show and not args.output.is_file():
        parser.error(f"--show: there is no result {args.output} yet; measure first, or name another with --output")
    if not args.show:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.touch()
        except OSError as error:
            parser.error(f"--output {args.output} cannot be written: {error.strerror}")
        if not args.output.stat().st_size:
            args.output.unlink()  # an aborted run leaves no empty file
    return args


def environment() -> dict[str, Any]:
    """Return machine, thread count and versions, for a result file."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    """Return the processor's model name if the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
