"""Training one model with several processes: common decisions, error reports, and sharded weights.

Launching processes, splitting the data, reducing gradients and sharding are left to torch, accelerate and the Trainer.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from transformers import TrainingArguments

from dylo_moe.errors import ConfigError

T = TypeVar("T")

_FAILED = "dylora-moe/failed"
_STORE_SECONDS = 10


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """Return the main process's decision in every process; the other processes wait for it."""
    agreed: list[T] = broadcast_object_list([decide() if PartialState().is_main_process else None])
    return agreed[0]


def first_non_none(value: T | None) -> T | None:
    """Return the first value over all processes that is not None, or None; every process has to call this."""
    found: list[T | None] = gather_object([value])
    return next((each for each in found if each is not None), None)


def first_to_fail() -> bool:
    """Return whether this process is the first of its launch to report an error; call it once, before it ends."""
    store = _launcher_store()
    # no shared store: let every rank report; a duplicate is better than silence
    return store is None or bool(store.add(_failure_key(), 1) == 1)


def another_failed() -> bool:
    """Return whether another process of this launch has reported an error, of which this one's is an echo."""
    store = _launcher_store()
    return store is not None and store.check([_failure_key()])


def _failure_key() -> str:
    return f"{_FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launcher_store() -> TCPStore | None:
    """Return torchrun's key-value store, which outlives each of its processes; None under other launchers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS))
    except (DistNetworkError, DistStoreError):
        return None  # the launcher has ended, and the other processes with it


def check_sharding(args: TrainingArguments, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Refuse FSDP if accelerate would silently train without it, or write what a single process cannot load.

    Args:
        args: Arguments of the Trainer, which may request FSDP; so may the environment that ``accelerate launch`` sets.
        plugin: accelerate's FSDP plugin; None if it did not make one.

    Raises:
        ConfigError: FSDP is not available here, or its version or state format does not fit.
    """
    requested = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not requested:
        return
    if plugin is None:
        raise ConfigError(
            f"FSDP needs several accelerators, and this run has {args.world_size} process(es) on {args.device.type}; "
            "leave it out: several processes then train with DDP"
        )
    if plugin.fsdp_version != 2:
        raise ConfigError(f"FSDP must be version 2 (fsdp_version: 2), got {plugin.fsdp_version}")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ConfigError(f"fsdp_state_dict_type must be FULL_STATE_DICT, got {plugin.state_dict_type}")


def full_state_dict(model: nn.Module, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the unsharded state of a model on the CPU; all processes have to call this.

    Args:
        model: The model, whose parameters may be sharded.
        parts: Substrings; a parameter is included if its name contains one of them.
    """
    state = {name: value for name, value in model.state_dict().items() if any(part in name for part in parts)}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for name, v in state.items()}


def loading_full_tensors() -> AbstractContextManager[None]:
    """Return a context in which unsharded tensors, read by every process, can be loaded into a sharded model."""
    return implicit_replication()
