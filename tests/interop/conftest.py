"""One base model and one mixture in a folder, made once for all tests of a process; do not write into them."""

from pathlib import Path

import pytest

from tests.support.saved_mixture import write_base, write_mixture


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("interop") / "base")


@pytest.fixture(scope="session")
def folder(base_folder: Path) -> Path:
    return write_mixture(base_folder.parent / "mixture", base_folder)
