"""The checkpoint format: its files, and how they are written and read.

    experts/<name>/adapter_config.json + adapter_model.safetensors    plain PEFT
    router.safetensors                                                the router's gates
    dylo_moe.json                                                     base model, experts, maturity, routing
    README.md                                                         model card

Safetensors and JSON only: nothing is unpickled. ``save_and_load`` builds a model from the files.
"""

from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe.core.base import FINGERPRINT_PATTERN
from dylo_moe.core.lora import ADAPTER_FILES, first_shape_mismatch, tensor_shapes, write_adapter
from dylo_moe.errors import CheckpointError, first_line

DESCRIPTION_FILE = "dylo_moe.json"
ROUTER_FILE = "router.safetensors"
EXPERTS_FOLDER = "experts"
CARD_FILE = "README.md"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BaseModelRecord(_Entry):
    """Base model that the experts belong to."""

    name: str
    revision: str | None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    fingerprint: str = Field(pattern=FINGERPRINT_PATTERN)
    from_here: str | None = None
    """Relative path from this folder to that of the base model, if the base model is in a folder."""


class ExpertRecord(_Entry):
    """An expert; the list is in the order of the router's columns."""

    name: str
    maturity: Literal[0, 1]
    frozen: bool = False
    """Whether later training leaves the expert unchanged."""
    pissa: bool = False
    """Whether the second half of its ranks is constant; see ``initialization.initialize_pissa``."""


class RoutingRecord(_Entry):
    """Routing mode and the options of the router."""

    mode: str
    top_k: int
    temperature: float
    experts_per_layer: list[int] | None = None
    expert_scale: Literal["sum_to_one", "unit"] = "sum_to_one"


class SharedExpertRecord(_Entry):
    """The expert that every token has at weight 1."""

    name: str
    frozen: bool = False


class LossRecord(_Entry):
    """Weights of the router's losses."""

    balance_coefficient: float
    z_loss_coefficient: float


class MixtureConfig(_Entry):
    """Contents of ``dylo_moe.json``."""

    format_version: Literal[1] = 1
    dylo_moe_version: str
    base_model: BaseModelRecord
    experts: list[ExpertRecord]
    shared: SharedExpertRecord | None = None
    routing: RoutingRecord
    losses: LossRecord
    prompt_template: Literal["chat", "plain"] | None = None
    route: Literal["token", "prompt"] = "token"

    @property
    def records(self) -> list[ExpertRecord | SharedExpertRecord]:
        """The experts and, last, the shared one."""
        return [*self.experts] if self.shared is None else [*self.experts, self.shared]

    @property
    def adapters(self) -> list[str]:
        """Names of the experts and, last, of the shared one."""
        return [expert.name for expert in self.records]


def write_files(
    folder: Path,
    peft_model: PeftModel,
    router_state: dict[str, Tensor],
    description: MixtureConfig,
    adapters: dict[str, Tensor] | None = None,
) -> None:
    """Write the files of a checkpoint into a folder.

    Args:
        folder: Empty folder; ``durable.atomic_directory`` gives one.
        peft_model: Model with the experts.
        router_state: The router's state dict.
        description: Contents of ``dylo_moe.json``.
        adapters: State dict of the experts with the PEFT model's keys; by default that of the PEFT model.
    """
    for name in description.adapters:
        write_adapter(folder / EXPERTS_FOLDER / name, peft_model, name, adapters)
    save_file({key: value.contiguous() for key, value in router_state.items()}, folder / ROUTER_FILE)
    write_description(folder, description)


def write_description(folder: Path, description: MixtureConfig) -> None:
    """Write ``dylo_moe.json`` and the model card."""
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n")
    (folder / CARD_FILE).write_text(_model_card(description))


def read_description(path: Path) -> MixtureConfig:
    """Read ``dylo_moe.json`` and check that every file it names is there.

    Raises:
        CheckpointError: There is no checkpoint at ``path``, or a file is missing or invalid.
    """
    file = path / DESCRIPTION_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} is not a checkpoint of this program: it has no {DESCRIPTION_FILE}")
    try:
        description = MixtureConfig.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{file} cannot be read: {location}: {first['msg']}") from error
    for expert in description.adapters:
        for name in ADAPTER_FILES:
            if not (path / EXPERTS_FOLDER / expert / name).is_file():
                raise CheckpointError(
                    f"the checkpoint {path} is not whole: expert {expert!r} has no {name}; "
                    "restore it or use another checkpoint"
                )
    if not (path / ROUTER_FILE).is_file():
        raise CheckpointError(f"the checkpoint {path} is not whole: it has no {ROUTER_FILE}")
    return description


def read_router(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the router's state dict.

    Args:
        path: The checkpoint.
        like: State dict with the expected shapes.

    Raises:
        CheckpointError: The file is damaged, or has a router of another shape.
    """
    try:
        state = load_file(path / ROUTER_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path / ROUTER_FILE} is damaged: {first_line(error)}; use another checkpoint"
        ) from error
    wrong = first_shape_mismatch(tensor_shapes(state), tensor_shapes(like))
    if wrong is not None:
        raise CheckpointError(f"the router in {path} does not fit its experts: {wrong}")
    return state


def _model_card(description: MixtureConfig) -> str:
    base = description.base_model.name
    data = ModelCardData(base_model=base if "/" in base else None, library_name="dylo_moe", tags=["lora", "moe"])
    rows = "\n".join(
        f"| `{expert.name}` | {'mature' if expert.maturity else 'young'} |" for expert in description.experts
    )
    if description.shared is not None:
        rows += f"\n| `{description.shared.name}` | shared: every token has it |"
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
