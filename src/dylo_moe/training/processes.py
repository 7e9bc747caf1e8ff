"""Several processes that train one model: what they agree on, who speaks, and weights that are held in parts.

Starting them, sharing out the data, reducing gradients and sharding are torch's, accelerate's and the Trainer's.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from transformers import TrainingArguments

from dylo_moe.errors import ConfigError

T = TypeVar("T")

_FAILED = "dylora-moe/failed"
_STORE_SECONDS = 10


def decided_by_first(decide: Callable[[], T]) -> T:
    """What the first process decides; the others wait for it, and decide the same."""
    decision = [decide() if PartialState().is_main_process else None]
    broadcast_object_list(decision)
    return decision[0]  # type: ignore[return-value]


def found_by_any(value: T | None) -> T | None:
    """The value of the first process that has one; every process has to ask."""
    found: list[T | None] = gather_object([value])
    return next((each for each in found if each is not None), None)


def first_to_fail() -> bool:
    """Whether no other process of this launch has told of an error before; asked once, by a process that ends."""
    store = _launchers_store()
    # without a common place to look at, each tells: an error that nobody tells is worse than one told twice
    return store is None or bool(store.add(_key(), 1) == 1)


def another_failed() -> bool:
    """Whether another process of this launch has told of an error, which this one then follows from."""
    store = _launchers_store()
    return store is not None and store.check([_key()])


def _key() -> str:
    return f"{_FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launchers_store() -> TCPStore | None:
    """The key-value store that torchrun keeps for its processes, which outlives each of them; None under others."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS))
    except (DistNetworkError, DistStoreError):
        return None  # the launcher is gone, and with it whoever would have told


def check_sharding(args: TrainingArguments, plugin: Any) -> None:
    """Refuses FSDP where accelerate would quietly train without it, or write what one process cannot load.

    Args:
        args: The Trainer's, which may ask for FSDP.
        plugin: What accelerate made of that, or of the environment that ``accelerate launch`` sets; None without FSDP.

    Raises:
        ConfigError: FSDP cannot be had, or is set up in a way that does not fit.
    """
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked:
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


def whole_tensors(model: nn.Module, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """State of a sharded model, each tensor in one piece on the CPU; all processes have to call it.

    Args:
        model: Its parameters may be sharded.
        parts: What a name has to contain to be among them.
    """
    state = {name: value for name, value in model.state_dict().items() if any(part in name for part in parts)}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for name, v in state.items()}


def taking_whole_tensors() -> AbstractContextManager[None]:
    """Lets a sharded model take tensors in one piece, which each process has read; each keeps its own part."""
    return implicit_replication()
