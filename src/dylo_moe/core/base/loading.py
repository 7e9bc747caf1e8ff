"""Loading the frozen base model and its tokenizer: from the Hub, from a folder, or the embedded one (``embedded``)."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dylo_moe.core.base.embedded import EMBEDDED, embedded_folder, embedded_model
from dylo_moe.core.base.hub import is_hub_id
from dylo_moe.core.base.quantization import quantization_config
from dylo_moe.errors import ModelError, causes_of, first_line

_LOG = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


def load_base_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    bits: int | None = None,
    **more: Any,
) -> PreTrainedModel:
    """Load a causal LM and freeze its parameters.

    Args:
        name: A Hub id, a folder, or ``demo``.
        revision: Commit, tag or branch on the Hub.
        dtype: Floating type of the weights.
        attn_implementation: Passed to transformers; its own choice by default.
        bits: 4 or 8 quantizes the linear layers; see ``quantization.quantization_config``.
        **more: Passed to transformers: ``device_map``, ``max_memory``, ``quantization_config`` and others.

    Raises:
        ModelError: The model cannot be reached or read, or is not a causal LM.
    """
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation, **more}
    if bits is not None:
        options["quantization_config"] = quantization_config(bits, dtype)
    try:
        with _readable_errors(name):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(_model_source(name), **options)
    except TypeError as error:  # an argument that no part of transformers takes
        raise ModelError(f"the model {name!r} cannot be loaded with these options: {first_line(error)}") from error
    except ImportError as error:
        if attn_implementation is None:
            raise
        raise ModelError(
            f"`attn_implementation` {attn_implementation!r} cannot be used: {first_line(error)}"
        ) from error
    model.requires_grad_(False)
    return model


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model; if it has no padding token, it pads with its end-of-text token.

    Raises:
        ModelError: The tokenizer cannot be reached or read, or has no end-of-text token.
    """
    with _readable_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(_model_source(name), revision=revision)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {name!r} has no end-of-text token, and answers could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def local_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a base model without the network; return None if it is not on this machine."""
    if not name:
        return None
    try:
        source = _model_source(name)
        if is_hub_id(source):  # transformers asks the Hub about an id even with local_files_only
            source = snapshot_download(source, revision=revision, local_files_only=True)
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        _LOG.debug("no tokenizer of %s on this machine: %s", name, error)
        return None


def portable_name(model: str | PreTrainedModel, revision: str | None) -> tuple[str, str | None]:
    """Return a name that loads a base model from any working directory, and its revision.

    A folder of the Hub's cache becomes its Hub id, the folder of the embedded model becomes ``demo``, and any other
    folder gets its full path.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name or not Path(name).is_dir():
        return name, revision
    folder = Path(name).resolve()
    cached = cached_repository(folder)
    if cached is not None:
        return cached
    return (EMBEDDED if folder == embedded_folder().resolve() else str(folder)), None


def cached_repository(folder: str | Path) -> tuple[str, str] | None:
    """Return the Hub id and the commit of a folder in a cache of the Hub; None for any other folder."""
    found = _SNAPSHOT.search(Path(folder).resolve().as_posix())
    return None if found is None else (found["repo"].replace("--", "/", 1), found["commit"])


def _check_exists(name: str) -> None:
    """Raise ``ModelError`` for a path without a folder, so that the Hub is not asked for it."""
    if not Path(name).is_dir() and not is_hub_id(name):
        raise ModelError(f"there is no folder {name!r}; check `base_model`")


def check_base_model(name: str, *, revision: str | None = None) -> None:
    """Raise ``ModelError`` if the model's configuration cannot be loaded; read no weights."""
    with _readable_errors(name):
        AutoConfig.from_pretrained(_model_source(name), revision=revision)


def module_names(name: str, *, revision: str | None = None) -> list[str]:
    """Return the names of a model's modules, from its configuration alone; read no weights.

    Raises:
        ModelError: The configuration cannot be loaded.
    """
    with _readable_errors(name):
        # outside of empty weights: the embedded model may be unpacked now
        config = AutoConfig.from_pretrained(_model_source(name), revision=revision)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    return [module for module, _ in model.named_modules() if module]


def _model_source(name: str) -> str:
    """Return the name as transformers takes it: ``demo`` becomes the folder of the embedded model.

    Raises:
        ModelError: The name is a path, and there is no folder.
    """
    if name == EMBEDDED:
        return str(embedded_model())
    _check_exists(name)
    return name


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Turn errors of transformers and the Hub client about a model into a ``ModelError`` of one line."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: BaseException) -> str:
    if "attn_implementation" in str(error):
        return f"`attn_implementation` does not fit the model {name!r}: {first_line(error)}"
    causes = tuple(type(cause) for cause in causes_of(error))
    if GatedRepoError in causes:
        return (
            f"the model {name!r} is gated: accept its license on its Hub page, then set HF_TOKEN to a token "
            f"of that account, or use `base_model` {EMBEDDED}"
        )
    if RepositoryNotFoundError in causes:
        return f"the Hub has no model {name!r}, or HF_TOKEN may not see it; check `base_model`"
    if Path(name).is_dir():
        return f"the folder {name!r} has no causal LM that transformers can load: {first_line(error)}"
    if any(issubclass(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError) for cause in causes):
        return (
            f"the model {name!r} could not be fetched and is not in the local cache: the Hub cannot be reached "
            f"(or HF_HUB_OFFLINE is set); connect, name a folder with `base_model`, or use `base_model` {EMBEDDED}"
        )
    return f"the model {name!r} cannot be loaded: {first_line(error)}"
