"""Tests of the public names of ``dylo_moe.data``."""

import subprocess
import sys

import pytest

import dylo_moe.data
from dylo_moe.data.examples import get_dataset
from dylo_moe.data.registry import AVAILABLE_DATASETS


def test_the_package_exports_the_datasets_and_nothing_else() -> None:
    assert dylo_moe.data.get_dataset is get_dataset
    assert dylo_moe.data.AVAILABLE_DATASETS is AVAILABLE_DATASETS
    assert dir(dylo_moe.data) == sorted(dylo_moe.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'get_datasets'"):
        _ = dylo_moe.data.get_datasets


def test_importing_the_package_does_not_import_torch_or_datasets() -> None:
    code = "import sys, dylo_moe.data; sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
