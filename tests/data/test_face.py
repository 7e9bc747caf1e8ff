"""The public names of ``dylo_moe.data``."""

import dylo_moe.data
from dylo_moe.data.examples import get_dataset
from dylo_moe.data.registry import AVAILABLE_DATASETS


def test_the_package_exports_the_datasets() -> None:
    assert dylo_moe.data.get_dataset is get_dataset
    assert dylo_moe.data.AVAILABLE_DATASETS is AVAILABLE_DATASETS
    assert {"get_dataset", "AVAILABLE_DATASETS"} <= {*dylo_moe.data.__all__}
