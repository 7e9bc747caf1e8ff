"""A checkpoint comes back bit for bit in a new process, is plain PEFT inside, and is never half written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.routing.balance import updated_selection_bias
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError, DyLoRAError, RoutingError
from tests.support import flat_bucket
from tests.support.families import FAMILIES, ROUTINGS, mixture, relative_error, stir, tiny, token_ids

IDS = token_ids(3, 10)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
EXPERTS = ["expert_0", "expert_1", "expert_2"]


def on_disk(family: str, folder: Path, seed: int = 0) -> str:
    """Write the tiny model of a family, in float32, into a folder, and return its path."""
    if not folder.exists():
        tiny(family, dtype=torch.float32, seed=seed).save_pretrained(folder)
    return str(folder)


def saved_mixture(base: str, path: Path, *, routing: str = "final", mature: bool = False, seed: int = 1) -> DyLoRA_MoE:
    """Return a mixture with random experts, gates and selection bias that is saved in ``path``."""
    torch.manual_seed(seed)
    model = DyLoRA_MoE(base, 3, rank=4, routing=routing, top_k=2, temperature=0.8, z_loss_coefficient=0.01)
    stir(model, seed)
    with torch.no_grad():
        for gate in model.router.gates:
            gate.mul_(20)
    load = torch.rand(model.router.selection_bias.shape)
    model.router.selection_bias.copy_(updated_selection_bias(model.router.selection_bias, load, rate=0.3))
    if mature:
        model.set_maturity()
    model.eval().save_pretrained(path)
    return model


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


# --- there and back --------------------------------------------------------------------------------------------------

LOAD_ALL = """
import sys
from collections.abc import Callable
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from dylo_moe import DyLoRA_MoE

torch.set_num_threads(1)
root = Path(sys.argv[1])
batch = load_file(root / "batch.safetensors")
found = {}
for path in sorted((root / "checkpoints").iterdir()):
    model = DyLoRA_MoE.from_pretrained(path).eval()
    with torch.no_grad():
        found[path.name] = model(**batch).logits
    answer = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    found[path.name + "-generated"] = answer
save_file(found, root / "found.safetensors")
"""


def test_a_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    wanted: dict[str, Tensor] = {}
    batch = {"input_ids": IDS, "attention_mask": MASK}
    for family in ("llama", "gpt2"):
        base = on_disk(family, tmp_path / family)
        for routing in ROUTINGS:
            for mature in (False, True):
                name = f"{family}-{routing}-{'sparse' if mature else 'dense'}"
                model = saved_mixture(base, tmp_path / "checkpoints" / name, routing=routing, mature=mature)
                wanted[name] = model(**batch).logits.detach()
                answer = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
                wanted[f"{name}-generated"] = answer
    save_file(batch, tmp_path / "batch.safetensors")

    process = run(LOAD_ALL, tmp_path)

    assert process.returncode == 0, process.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == wanted.keys() and len(wanted) == 2 * len(ROUTINGS) * 4
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    for first, second in (("llama-final-dense", "llama-final-sparse"), ("gpt2-final-dense", "gpt2-per_layer-dense")):
        assert not torch.equal(wanted[first], wanted[second]), "the checkpoints must differ, or nothing was checked"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_expert_loads_through_plain_peft(tmp_path: Path, family: str, routing: str) -> None:
    model = mixture(family, routing)
    model.save_pretrained(tmp_path / "saved")
    for name in EXPERTS:
        model.experts.set_active(name)
        wanted = model(IDS).logits
        loaded = PeftModel.from_pretrained(tiny(family), str(tmp_path / "saved" / "experts" / name)).eval()
        assert relative_error(loaded(IDS).logits, wanted) < 1e-9
        assert relative_error(tiny(family)(IDS).logits, wanted) > 1e-3, "the expert must matter, or nothing was checked"


def test_everything_that_was_set_comes_back(tmp_path: Path) -> None:
    base = on_disk("llama", tmp_path / "base")
    model = saved_mixture(base, tmp_path / "saved", routing="prefix:2")
    model.set_maturity(1, ["expert_1"])
    model.add_expert("sql", rank=9, alpha=3, dropout=0.1, use_rslora=True, target_modules=["up_proj"])
    stir(model, 4)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved").eval()
    assert loaded.experts.names == loaded.experts.active == [*EXPERTS, "sql"]
    assert loaded.router.maturity == [0, 1, 0, 0]
    assert (loaded.routing, loaded.router.top_k, loaded.router.temperature) == ("prefix:2", 2, 0.8)
    assert (loaded.losses, loaded.base_name, loaded.revision) == (model.losses, base, None)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    layer = loaded.experts.base_model.model.layers[2].mlp.up_proj
    assert (layer.scaling["sql"], layer.lora_dropout["sql"].p) == (1.0, 0.1)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_checkpoint_has_these_files_and_nothing_pickled(tmp_path: Path) -> None:
    saved_mixture(on_disk("llama", tmp_path / "base"), tmp_path / "saved")
    files = {str(file.relative_to(tmp_path / "saved")) for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    adapters = {
        f"experts/{name}/{file}" for name in EXPERTS for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    transformers = {"config.json", "generation_config.json", "modeling_dylo_moe.py"}
    assert files == adapters | transformers | {"router.safetensors", "dylo_moe.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "saved"}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "experts/expert_0" in card and "library_name: dylo_moe" in card
    assert all(f"`{name}` | young" in card for name in EXPERTS)


def test_a_loaded_model_evaluates_as_a_loaded_base_does(tmp_path: Path) -> None:
    """Without a call of ``eval()`` a mature mixture is sparse, and no dropout runs."""
    base = on_disk("llama", tmp_path / "base")
    model = saved_mixture(base, tmp_path / "saved", mature=True)
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_loaded_base_model_can_be_given(tmp_path: Path) -> None:
    model = mixture(dtype=torch.float32, mature=True)
    model.save_pretrained(tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved", tiny(dtype=torch.float32))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(
        CheckpointError,
        match=r"was made on a base model in memory; pass that as `model` \(`base_model` on the command line\)$",
    ):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved")


def test_a_checkpoint_loads_in_another_dtype(tmp_path: Path) -> None:
    base = on_disk("llama", tmp_path / "base")
    model = saved_mixture(base, tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert (loaded.dtype, DyLoRA_MoE.from_pretrained(tmp_path / "saved").dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(loaded(IDS).logits.float(), model(IDS).logits) < 0.1


def test_training_continues_after_loading(tmp_path: Path) -> None:
    """A step after loading is the step that the saved model would have made."""
    model = saved_mixture(on_disk("llama", tmp_path / "base"), tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    for each in (model.train(), loaded.train()):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        each(IDS, MASK, labels=IDS).loss.backward()
        optimizer.step()
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("routing", ROUTINGS)
def test_weights_are_loaded_into_a_model_of_the_same_experts(tmp_path: Path, routing: str) -> None:
    base = on_disk("llama", tmp_path / "base")
    model = saved_mixture(base, tmp_path / "saved", routing=routing, mature=True)
    other = saved_mixture(base, tmp_path / "other", routing=routing, seed=6)
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    other.load_weights(tmp_path / "saved")
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.router.maturity == [1, 1, 1]


# --- unreadable folders ----------------------------------------------------------------------------------------------


def no_description(path: Path) -> None:
    (path / "dylo_moe.json").unlink()


def description_cut_short(path: Path) -> None:
    text = (path / "dylo_moe.json").read_text()
    (path / "dylo_moe.json").write_text(text[: len(text) // 2])


def edited(**changes: object) -> Callable[[Path], None]:
    """Return a function that changes values of the description; two underscores separate the parts of a path."""

    def damage(path: Path) -> None:
        description = json.loads((path / "dylo_moe.json").read_text())
        for where, value in changes.items():
            *parents, last = where.split("__")
            target = description
            for parent in parents:
                target = target[parent]
            target[last] = value
        (path / "dylo_moe.json").write_text(json.dumps(description))

    return damage


def fingerprint_of_no_digits(path: Path) -> None:
    description = json.loads((path / "dylo_moe.json").read_text())
    fingerprint = description["base_model"]["fingerprint"]
    edited(base_model__fingerprint=fingerprint[:-1] + "z")(path)


def no_expert(path: Path) -> None:
    shutil.rmtree(path / "experts" / "expert_1")


def no_expert_weights(path: Path) -> None:
    (path / "experts" / "expert_2" / "adapter_model.safetensors").unlink()


def no_router(path: Path) -> None:
    (path / "router.safetensors").unlink()


def cut_short(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def router_of_another_size(path: Path) -> None:
    state = load_file(path / "router.safetensors")
    save_file({name: tensor[:, :2].contiguous() for name, tensor in state.items()}, path / "router.safetensors")


DAMAGES = {
    "no description": (no_description, "is not a checkpoint of this program: it has no dylo_moe.json"),
    "description cut short": (description_cut_short, "dylo_moe.json cannot be read"),
    "description of nothing": (lambda path: (path / "dylo_moe.json").write_text("[]"), "dylo_moe.json cannot be read"),
    "a missing value": (lambda path: (path / "dylo_moe.json").write_text("{}"), "dylo_moe.json cannot be read: "),
    "a later format": (edited(format_version=2), "cannot be read: format_version: "),
    "maturity of 2": (edited(experts=[{"name": "expert_0", "maturity": 2}]), "cannot be read: experts.0.maturity: "),
    "an unknown value": (edited(routing__pooling="mean"), "cannot be read: routing.pooling: "),
    "an unknown dtype": (edited(base_model__dtype="int3"), "base_model.dtype|int3"),
    "a damaged fingerprint": (fingerprint_of_no_digits, "fingerprint|base model"),
    "no experts": (edited(experts=[]), "expert"),
    "more of top_k than experts": (
        edited(routing__top_k=9),
        r"`top_k` must be from 1 to the number of experts \(3\), got 9",
    ),
    "an unknown mode": (edited(routing__mode="magic"), "`routing` must be .* got 'magic'"),
    "an expert elsewhere": (edited(experts=[{"name": "../../x", "maturity": 0}]), "'../../x'"),
    "one expert missing": (no_expert, "is not whole: expert 'expert_1' has no adapter_config.json"),
    "weights missing": (no_expert_weights, "is not whole: expert 'expert_2' has no adapter_model.safetensors"),
    "router missing": (no_router, "is not whole: it has no router.safetensors"),
    "router cut short": (cut_short("router.safetensors"), "router.safetensors is damaged: "),
    "router of another size": (router_of_another_size, "the router in .* does not fit its experts: "),
    "weights cut short": (cut_short("experts/expert_1/adapter_model.safetensors"), "expert_1"),
    "adapter configuration cut short": (cut_short("experts/expert_1/adapter_config.json"), "expert_1"),
}


NOT_READ_WITH_WEIGHTS_ALONE = ("an unknown dtype", "more of top_k than experts", "adapter configuration cut short")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    base = on_disk("llama", tmp_path / "base")
    saved_mixture(base, tmp_path / "saved")
    other = saved_mixture(base, tmp_path / "other", seed=6)
    before = other(IDS).logits
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "saved")
    with pytest.raises(DyLoRAError, match=message) as refused:
        DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    assert "\n" not in str(refused.value)
    if damage not in NOT_READ_WITH_WEIGHTS_ALONE:
        with pytest.raises(DyLoRAError) as refused:
            other.load_weights(tmp_path / "saved")
        assert "\n" not in str(refused.value)
        assert torch.equal(other(IDS).logits, before), "a refused load must leave the model as it was"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program"):
        DyLoRA_MoE.from_pretrained(tmp_path / "nothing")


def test_a_checkpoint_of_another_base_model_is_refused(tmp_path: Path) -> None:
    base, other = on_disk("llama", tmp_path / "base"), on_disk("llama", tmp_path / "other", seed=3)
    saved_mixture(base, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"belongs to the base model '{base}', and .*'{other}' is another one"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved", other)
    shutil.rmtree(base)
    shutil.move(other, base)
    with pytest.raises(CheckpointError, match="is another one"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=f"was in {base}, which is not there any more; .*`base_model`"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("options", "grow", "message"),
    [
        (
            {"num_experts": 2},
            None,
            r"has experts expert_0, expert_1, expert_2 under .* this run has expert_0, expert_1 under",
        ),
        ({}, "sql", "this run has expert_0, expert_1, expert_2, sql under"),
        ({"routing": "per_layer"}, None, "under routing final, and this run has .* under per_layer"),
        ({"expert_scale": "unit"}, None, "under routing final, and this run has .* under final with expert_scale unit"),
        ({"shared_rank": 2}, None, "this run has expert_0, expert_1, expert_2, shared under final"),
        ({"rank": 5}, None, "do not fit expert 'expert_0'"),
        ({"target_modules": ["q_proj"]}, None, "do not fit expert 'expert_0'"),
        ({"target_modules": "all-linear"}, None, "do not fit expert 'expert_0'"),
        ({"family": "qwen3"}, None, "base model"),
        ({"seed": 3}, None, "base model"),
    ],
    ids=[
        "fewer",
        "more",
        "routing",
        "scale",
        "shared",
        "rank",
        "fewer modules",
        "more modules",
        "another family",
        "another base",
    ],
)
def test_weights_of_another_set_are_refused_whole(
    tmp_path: Path, options: dict[str, object], grow: str | None, message: str
) -> None:
    mixture(dtype=torch.float32).save_pretrained(tmp_path / "saved")
    model = mixture(**{"routing": "final", "dtype": torch.float32, **options})
    if grow:
        model.add_expert(grow)
    before = model(IDS).logits
    with pytest.raises(DyLoRAError, match=message) as refused:
        model.load_weights(tmp_path / "saved")
    assert "\n" not in str(refused.value)
    assert torch.equal(model(IDS).logits, before), "a refused load must leave the model as it was"


# --- failing writes --------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import CheckpointError

saved = Path(sys.argv[1])
model = DyLoRA_MoE.from_pretrained(saved)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    for attempt in (
        lambda: model.save_pretrained(saved),
        lambda: model.save_pretrained(saved.parent / "fresh"),
        lambda: model.experts.export("expert_0", saved.parent / "exported"),
    ):
        try:
            attempt()
        except CheckpointError as error:
            sys.stdout.write(f"{error}\\n")
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """Limit the size of files instead of filling the disk: first no byte fits, then everything but the weights."""
    base = on_disk("llama", tmp_path / "base")
    model = saved_mixture(base, tmp_path / "work" / "saved", mature=True)
    process = run(FULL_DISK, tmp_path / "work" / "saved", 0, 6000)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 6, process.stdout + process.stderr
    assert all(line.startswith("cannot write ") and "free space or choose another folder" in line for line in lines)
    assert ["the previous one is intact" in line for line in lines] == [True, False, False] * 2
    assert os.listdir(tmp_path / "work") == ["saved"]
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "work" / "saved")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_saving_replaces_the_whole_of_an_older_checkpoint(tmp_path: Path) -> None:
    base = on_disk("llama", tmp_path / "base")
    model = saved_mixture(base, tmp_path / "saved")
    model.add_expert("sql")
    model.save_pretrained(tmp_path / "saved")
    saved_mixture(base, tmp_path / "saved", seed=4)
    assert sorted(path.name for path in (tmp_path / "saved" / "experts").iterdir()) == EXPERTS
    assert {path.name for path in tmp_path.iterdir()} == {"base", "saved"}


def test_a_relative_path_is_written_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mixture().save_pretrained("deep/er/saved")
    assert (tmp_path / "deep" / "er" / "saved" / "dylo_moe.json").is_file()


def test_an_exception_while_writing_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "old", marker="file") as folder:
        (folder / "file").write_text("new")
        raise KeyError
    assert (tmp_path / "old" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


def test_a_last_step_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the rename of the new folder, which no real file system does on demand."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(CheckpointError, match="the previous one is intact"),
        atomic_directory(tmp_path / "old", marker="file") as folder,
    ):
        (folder / "file").write_text("new")
    assert (tmp_path / "old" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


def test_a_folder_is_replaced_where_none_can_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat_bucket.install(tmp_path, monkeypatch.setattr)
    path, copied, copy = tmp_path / "saved", list[Path](), shutil.copyfile

    def recorded(source: Path, target: Path, **options: bool) -> Path:
        copied.append(Path(target))
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", recorded)
    for text in ("old", "new"):
        with atomic_directory(path, marker="file", in_place=True) as folder:
            (folder / text / "file").parent.mkdir()
            (folder / text / "file").write_text("nested")
            (folder / "file").write_text(text)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "saved",
        "saved/file",
        "saved/new",
        "saved/new/file",
    ]
    assert (path / "file").read_text() == "new"
    assert copied.count(path / "file") == 2, "once each time"
    assert copied[-2:] == [path / "new" / "file", path / "file"], "the marker comes last"
    with pytest.raises(KeyError), atomic_directory(path, marker="file", in_place=True) as folder:
        (folder / "file").write_text("newer")
        raise KeyError
    assert (path / "file").read_text() == "new"


@pytest.mark.parametrize("step", ["rmtree", "copytree", "copyfile"])
def test_an_interrupted_copy_is_ignored_and_does_not_block(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "saved"
    with atomic_directory(path, marker="file", in_place=True) as folder:
        (folder / "file").write_text("old")
        (folder / "more").write_text("old")
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        atomic_directory(path, marker="file", in_place=True) as folder,
    ):
        (folder / "file").write_text("new")
        (folder / "more").write_text("new")
        patch.setattr(shutil, step, killed)
    assert not (path / "file").exists()
    with atomic_directory(path, marker="file", in_place=True) as folder:
        (folder / "file").write_text("newer")
    assert [file.name for file in path.iterdir()] == ["file"] and os.listdir(tmp_path) == ["saved"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*; free space or choose another folder"):
        mixture().save_pretrained(tmp_path / "file" / "saved")


def test_given_weights_of_a_loaded_model_are_checked(tmp_path: Path) -> None:
    saved_mixture(on_disk("llama", tmp_path / "base"), tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    with pytest.raises(RoutingError, match="2 columns, but 3 adapters are active: expert_0, expert_1, expert_2"):
        loaded(IDS, routing_weights=torch.ones(3, 10, 2))


def test_a_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("three years of work")
    model = mixture()
    with pytest.raises(CheckpointError, match=r"holds other files .*, and writing would replace them"):
        model.experts.export("expert_0", tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    (tmp_path / "thesis" / "config.json").write_text("another model's")
    with pytest.raises(CheckpointError, match=r"holds other files \(config.json\), and writing would replace them"):
        model.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "config.json").read_text() == "another model's"
    for write in (model.save_pretrained, lambda path: model.experts.export("expert_0", path)):
        (tmp_path / "empty").mkdir(exist_ok=True)
        write(tmp_path / "empty")
        write(tmp_path / "empty")
        shutil.rmtree(tmp_path / "empty")


@pytest.mark.parametrize("in_place", [False, True])
def test_other_files_in_the_folder_survive_a_save(tmp_path: Path, in_place: bool) -> None:
    folder, model = tmp_path / "results", mixture()
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "checkpoint-10" / "optimizer.pt").write_text("of a Trainer")
    (folder / "notes.md").write_text("mine")
    (folder / "link").symlink_to("notes.md")
    with (folder / "events").open("w") as log:
        for name in ("expert_0", "sql"):
            model.save_pretrained(folder, in_place=in_place)
            log.write(f"{name} ")
            log.flush()
            if name == "expert_0":
                model.add_expert("sql")
    assert (folder / "events").read_text() == "expert_0 sql ", "an open file stays the same"
    assert (folder / "checkpoint-10" / "optimizer.pt").read_text() == "of a Trainer"
    assert (folder / "notes.md").read_text() == "mine" and (folder / "link").is_symlink()
    assert sorted(path.name for path in (folder / "experts").iterdir()) == ["expert_0", "expert_1", "expert_2", "sql"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
