"""Print the versions in this environment that the tests depend on."""

import platform
import sys
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "huggingface-hub", "datasets", "numpy")


def main() -> None:
    """Write one line for Python and one for each package."""
    rows = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    sys.stdout.write("".join(f"{name:<16}{found}\n" for name, found in rows.items()))


if __name__ == "__main__":
    main()
