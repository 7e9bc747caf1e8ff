"""The one checkpoint format.

    experts/<name>/adapter_config.json + adapter_model.safetensors    plain PEFT
    router.safetensors                                                the router's gates
    dylo_moe.json                                                     base model, experts, maturity, routing
    README.md                                                         model card

Safetensors and JSON only: nothing is unpickled. This module reads and writes files; building a model out of
them is the business of ``model.py``.
"""

import shutil
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe.core.adapter_folder import ADAPTER_FILES, difference, tensor_shapes
from dylo_moe.errors import CheckpointError, first_line

DESCRIPTION_FILE = "dylo_moe.json"
FINGERPRINT_PATTERN = r"^[0-9a-f]{16}(:([0-9a-f]{4})*){2}$"
ROUTER_FILE = "router.safetensors"
EXPERTS_FOLDER = "experts"
CARD_FILE = "README.md"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BaseModelEntry(_Entry):
    """The base model that the experts belong to."""

    name: str
    revision: str | None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    fingerprint: str = Field(pattern=FINGERPRINT_PATTERN)
    from_here: str | None = None
    """The way from this folder to that of the base model, where that is a folder."""


class ExpertEntry(_Entry):
    """One expert, in the order of the router's columns; a frozen one is not trained any further."""

    name: str
    maturity: Literal[0, 1]
    frozen: bool = False
    pissa: bool = False
    """Whether the second half of its ranks is the constant that PiSSA takes away; see ``initialise``."""


class RoutingEntry(_Entry):
    """How tokens are routed."""

    mode: str
    top_k: int
    temperature: float
    experts_per_layer: list[int] | None = None


class LossEntry(_Entry):
    """What the router's losses weigh."""

    balance_coefficient: float
    z_loss_coefficient: float


class Description(_Entry):
    """The contents of ``dylo_moe.json``."""

    format_version: Literal[1] = 1
    dylo_moe_version: str
    base_model: BaseModelEntry
    experts: list[ExpertEntry]
    routing: RoutingEntry
    losses: LossEntry
    prompt_template: Literal["chat", "plain"] | None = None


def write_files(
    folder: Path,
    peft_model: PeftModel,
    router_state: dict[str, Tensor],
    description: Description,
    adapters: dict[str, Tensor] | None = None,
) -> None:
    """Writes the files of a checkpoint into a folder, one after the other.

    Args:
        folder: Empty; ``atomic_directory`` gives one that becomes a checkpoint as a whole.
        peft_model: The experts.
        router_state: The router's state dict.
        description: What the folder says of itself.
        adapters: State of the experts, as the PEFT model names it; its own by default.
    """
    for expert in description.experts:
        write_adapter(folder / EXPERTS_FOLDER / expert.name, peft_model, expert.name, adapters)
    save_file({key: value.contiguous() for key, value in router_state.items()}, folder / ROUTER_FILE)
    write_description(folder, description)


def write_description(folder: Path, description: Description) -> None:
    """Writes what a checkpoint says of itself, for programs and for people."""
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n")
    (folder / CARD_FILE).write_text(_model_card(description))


def write_adapter(folder: Path, peft_model: PeftModel, name: str, state: dict[str, Tensor] | None = None) -> None:
    """Writes one adapter as PEFT does, into ``folder`` itself whatever the adapter is called."""
    scratch = folder.with_name(f".{folder.name}-peft")
    peft_model.save_pretrained(str(scratch), selected_adapters=[name], save_embedding_layers=False, state_dict=state)
    # PEFT puts an adapter that is called "default" into the folder, any other one into a folder of its name
    written = scratch if name == "default" else scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ADAPTER_FILES:
        (written / file).rename(folder / file)
    shutil.rmtree(scratch)


def read_description(path: Path) -> Description:
    """Reads ``dylo_moe.json`` and checks that every file it speaks of is there.

    Raises:
        CheckpointError: There is no checkpoint at ``path``, or it is not whole.
    """
    file = path / DESCRIPTION_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} is no checkpoint of this program: it has no {DESCRIPTION_FILE}")
    try:
        description = Description.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{file} cannot be read: {place}: {first['msg']}") from error
    for expert in description.experts:
        for name in ADAPTER_FILES:
            if not (path / EXPERTS_FOLDER / expert.name / name).is_file():
                raise CheckpointError(
                    f"the checkpoint {path} is not whole: expert {expert.name!r} has no {name}; "
                    "restore it or use another checkpoint"
                )
    if not (path / ROUTER_FILE).is_file():
        raise CheckpointError(f"the checkpoint {path} is not whole: it has no {ROUTER_FILE}")
    return description


def read_router(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reads the router's state dict.

    Args:
        path: The checkpoint.
        like: A state dict of the same shapes.

    Raises:
        CheckpointError: The file is damaged, or holds a router of another shape.
    """
    try:
        state = load_file(path / ROUTER_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path / ROUTER_FILE} is damaged: {first_line(error)}; use another checkpoint"
        ) from error
    wrong = difference(tensor_shapes(state), tensor_shapes(like))
    if wrong is not None:
        raise CheckpointError(f"the router in {path} does not fit its experts: {wrong}")
    return state


def _model_card(description: Description) -> str:
    base = description.base_model.name
    data = ModelCardData(base_model=base if "/" in base else None, library_name="dylo_moe", tags=["lora", "moe"])
    rows = "\n".join(
        f"| `{expert.name}` | {'mature' if expert.maturity else 'young'} |" for expert in description.experts
    )
    return f"""---
{data.to_yaml()}
---

# A DyLoRA-MoE mixture on `{base}`

LoRA experts on one frozen base model, mixed per token by a router
(`{description.routing.mode}`, top-{description.routing.top_k}).

| expert | maturity |
| --- | --- |
{rows}

The whole mixture:

```python
from dylo_moe import DyLoRA_MoE

model = DyLoRA_MoE.from_pretrained("path/to/this/folder")
```

One expert, with PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder/{EXPERTS_FOLDER}/{description.experts[0].name}")
```
"""
