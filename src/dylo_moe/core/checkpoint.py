"""The one checkpoint format, and how a folder is written so that no reader ever sees half of it.

    experts/<name>/adapter_config.json + adapter_model.safetensors    plain PEFT
    router.safetensors                                                the router's gates
    dylo_moe.json                                                     base model, experts, maturity, routing
    README.md                                                         model card

Safetensors and JSON only: nothing is unpickled. This module reads and writes files; building a model out of
them is the business of ``model.py``.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
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


@contextmanager
def atomic_directory(
    path: Path, *, marker: str, in_place: bool = False, ours: Collection[str] | None = None
) -> Iterator[Path]:
    """Give a sibling folder to write into; it takes the place of ``path`` once all of it is on the disk.

    Where writing fails, the sibling is removed and ``path`` stays as it was.

    Args:
        path: The folder to make or replace.
        marker: A file that tells a folder of this kind. One that has other files and not this one is somebody
            else's, and is not replaced.
        in_place: Rename no folder, as object storage cannot: what was written elsewhere is copied to ``path``, and the
            marker, without which no reader takes it for one of this kind, goes first and comes last.
        ours: The names that are written, or may be left from the last time. With them, whatever else is in ``path``
            stays there, and only one with other weights of these names is somebody else's.

    Raises:
        CheckpointError: ``path`` holds something else, or the file system refused: full, read-only, no permission.
    """
    path = path.absolute()
    known = (path / marker).is_file() or unfinished_mark(path).exists()
    if path.is_dir() and not known:
        others = sorted(entry.name for entry in path.iterdir())
        if ours is not None:
            others = [name for name in others if name in ours and name != CARD_FILE]
        if others:
            raise CheckpointError(
                f"{path} holds other files ({others[0]}), and writing would replace them; choose a new or empty folder"
            )
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=None if in_place else path.parent))
        target = scratch / "new"
        target.mkdir()
        yield target
        if in_place:
            _copy_over(target, path, marker, ours)
        else:
            if ours is not None and path.is_dir():
                _link_others(path, target, ours)
            _sync_tree(target)
            _rename_over(target, path, scratch / "previous")
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        kept = "; the previous one is intact" if (path / marker).is_file() else ""
        raise CheckpointError(f"cannot write {path}: {error}{kept}; free space or choose another folder") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


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


def _rename_over(new: Path, path: Path, previous: Path) -> None:
    if path.exists():
        path.rename(previous)
    try:
        new.rename(path)
    except OSError:
        if previous.exists():
            previous.rename(path)
        raise


def _copy_over(new: Path, path: Path, marker: str, ours: Collection[str] | None) -> None:
    mark = unfinished_mark(path)
    mark.touch()
    if path.exists():
        (path / marker).unlink(missing_ok=True)
        for entry in [path] if ours is None else [path / name for name in ours]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    others = ours is not None
    skip = {marker}
    shutil.copytree(
        new, path, ignore=lambda folder, names: skip if Path(folder) == new else set(), dirs_exist_ok=others
    )
    _sync_tree(path)
    shutil.copyfile(new / marker, path / marker)
    _sync_tree(path)
    mark.unlink()


def _link_others(old: Path, new: Path, ours: Collection[str]) -> None:
    """Give the new folder what else is in the old one: the same files, by another link or, failing that, a copy."""
    for entry in old.iterdir():
        if entry.name in ours or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def unfinished_mark(folder: Path) -> Path:
    """An empty file beside a folder that says: what is there is being written in place, or removed."""
    return folder.with_name(f".unfinished-{folder.name}")


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for file in files:
            sync(Path(root) / file)
        sync(Path(root))


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
