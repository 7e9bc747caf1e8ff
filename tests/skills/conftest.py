"""A tiny base model in a folder, and adapters that PEFT alone made on it."""

from pathlib import Path

import pytest

from tests.support.plain_adapters import write_adapters
from tests.support.tiny_folder import write_tiny_folder


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="package")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))
