"""Tests of ``dylora-moe experts --export`` and ``--import`` of PEFT adapters."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.core.base.loading import load_base_model
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.skills.expert_edits import list_experts, read_library
from dylo_moe.skills.library import SkillLibrary, SkillRecord, save_with_skills
from tests.support.families import mixture, stir, token_ids
from tests.support.hub_cache import put_in_cache, use_cache
from tests.support.tiny_folder import write_tiny_folder

IDS = token_ids(1, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def made(base: Path, folder: Path, routing: str = "prefix:1", seed: int = 1, **options: object) -> DyLoRA_MoE:
    torch.manual_seed(seed)
    model = DyLoRA_MoE(str(base), 2, **{"rank": 3, "alpha": 5, "routing": routing, **options})
    stir(model, seed)
    model.set_maturity()
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def path(base: Path, tmp_path: Path) -> Path:
    made(base, tmp_path / "mixture", use_rslora=True)
    return tmp_path / "mixture"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return an adapter exported from another mixture: rank 3, on the layers of ``prefix:1``."""
    made(base, tmp_path / "other", seed=7).experts.export("expert_1", tmp_path / "sql")
    return tmp_path / "sql"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_an_expert_is_exported_from_the_disk(
    base: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(path)
    base.rename(base.with_name("away"))  # an export does not need the base
    try:
        assert main(["experts", str(path), "--export", "expert_1", str(tmp_path / "out")]) == 0
    finally:
        base.with_name("away").rename(base)
    said = capsys.readouterr().out
    assert f"Exported expert_1 to {tmp_path / 'out'}: rank 3, lora_alpha 3\n" in said and "maturity" in said
    assert contents(path) == before
    model = DyLoRA_MoE.from_pretrained(path)
    model.experts.set_active("expert_1")
    plain = PeftModel.from_pretrained(load_base_model(str(base)), str(tmp_path / "out")).eval()
    assert torch.allclose(logits(plain), logits(model), atol=1e-6)
    model.experts.export("expert_1", tmp_path / "again")
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "out").keys()


def test_the_doubled_rank_of_pissa_is_reported(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(base, tmp_path / "mixture", init="pissa")
    assert main(["experts", str(tmp_path / "mixture"), "--export", "expert_0", str(tmp_path / "out")]) == 0
    assert "rank 6, lora_alpha 10; twice the 3 that are trained" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 6


@pytest.mark.parametrize("routing", ["prefix:1", "per_layer"])
def test_an_import_on_the_disk_is_the_import_in_memory(
    base: Path, tmp_path: Path, routing: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = made(base, tmp_path / "mixture", routing)
    wanted.import_expert(adapter, "queries")
    wanted.save_pretrained(tmp_path / "wanted")
    assert main(["experts", str(tmp_path / "mixture"), "--import", str(adapter), "--as", "queries"]) == 0
    assert "queries" in capsys.readouterr().out
    got = DyLoRA_MoE.from_pretrained(tmp_path / "mixture")
    assert got.experts.names == ["expert_0", "expert_1", "queries"] and got.router.maturity == [1, 1, 0]
    assert torch.equal(logits(got), logits(DyLoRA_MoE.from_pretrained(tmp_path / "wanted")))
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name
    # the other files of the folder are kept
    assert contents(tmp_path / "mixture").keys() == contents(tmp_path / "wanted").keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")), logits(got))


def test_an_adapter_is_imported_from_the_hub(
    path: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_cache(tmp_path / "hub", monkeypatch)
    put_in_cache(tmp_path / "hub", "user/web", adapter, commit="c" * 40, refs=("v1",))
    before = contents(path)
    assert main(["experts", str(path), "--import", "user/web"]) == EXIT_USER_ERROR
    assert "'user/web'; as a Hub id it is not in the local cache" in capsys.readouterr().err
    assert contents(path) == before
    assert main(["experts", str(path), "--import", "user/web", "--revision", "v1"]) == 0
    assert [one.name for one in list_experts(path)] == ["expert_0", "expert_1", "web"]


def test_a_mixture_with_skills_takes_an_expert_without_a_skill(base: Path, tmp_path: Path, adapter: Path) -> None:
    model = made(base, tmp_path / "mixture")
    library, generator = SkillLibrary(32), torch.Generator().manual_seed(4)
    for number, name in enumerate(("a", "b")):
        rows = torch.randn(20, 32, generator=generator)
        library.gate.learn(rows, number)
        library.add(SkillRecord(name=name, expert=f"expert_{number}"), rows, rows[:5], rows[:5])
    with torch.no_grad():
        model.router.gates[0].copy_(library.gate.weight())
    path = tmp_path / "mixture"
    save_with_skills(model, library, path)
    assert main(["experts", str(path), "--import", str(adapter)]) == 0
    column = DyLoRA_MoE.from_pretrained(path).router.gates[0].clone()
    assert torch.allclose(column[2], column[:2].mean(dim=0), atol=1e-6)
    assert main(["experts", str(path), "--rename", "sql=queries"]) == 0
    assert torch.equal(DyLoRA_MoE.from_pretrained(path).router.gates[0], column)
    found = read_library(path)
    assert found is not None and found.gate.num_experts == 2 and found.names == ["a", "b"]
    shutil.copytree(path, tmp_path / "merged")
    assert main(["experts", str(tmp_path / "merged"), "--merge", "queries,expert_0"]) == 0
    merged = read_library(tmp_path / "merged")
    assert merged is not None and [skill.expert for skill in merged.skills] == ["queries", "expert_1"]
    assert torch.allclose(
        DyLoRA_MoE.from_pretrained(tmp_path / "merged").router.gates[0].double(), merged.gate.weight(), atol=1e-5
    )
    assert torch.allclose(merged.gate.weight(), found.gate.weight()[[1, 0]])
    assert main(["experts", str(path), "--merge", "expert_0,queries"]) == 0
    assert DyLoRA_MoE.from_pretrained(path).experts.names == ["expert_0", "expert_1"]


MISTAKES = {
    "unknown expert": (["--export", "expert_9", "OUT"], "no expert 'expert_9' .*; did you mean 'expert_"),
    "one word": (["--export", "expert_0"], "--export must be the name of an expert and a folder, got expert_0"),
    "other files": (["--export", "expert_0", "THESIS"], r"holds other files \(chapter.txt\)"),
    "a file": (["--export", "expert_0", "THESIS/chapter.txt"], r"chapter\.txt is a file, and writing would replace it"),
    "into itself": (["--export", "expert_0", "MIXTURE/experts/expert_0"], "a part of the mixture"),
    "over itself": (["--export", "expert_0", "MIXTURE"], "a part of the mixture"),
    "two changes": (["--export", "expert_0", "OUT", "--remove", "expert_0"], "--export must be left out"),
    "nothing there": (["--import", "./gone"], r"there is no folder './gone' to import an adapter from"),
    "no adapter": (["--import", "THESIS"], "is not a PEFT adapter that can be imported: it has no adapter_config.json"),
    "no id": (["--import", "gone"], "there is no folder 'gone'; give a folder, or a Hub id"),
    "offline": (["--import", "nobody/nothing"], "the Hub cannot be reached"),
    "taken": (["--import", "ADAPTER", "--as", "expert_0"], "there is an expert 'expert_0' already"),
    "a module": (["--import", "ADAPTER", "--as", "q_proj"], "a module has that name"),
    "another base": (["--import", "FOREIGN"], "cannot become an expert of this model: it has .* not belong there"),
    "another shape": (["--import", "WIDE"], "cannot become an expert of this model: its .* is needed"),
    "layers below": (["--import", "BELOW"], r"adapts model\.layers\.0\..*routing prefix:K, layers below K carry none"),
    "as alone": (["--as", "sql"], "--as must be left out without --import, got 'sql'"),
    "revision alone": (["--revision", "v1"], "--revision must be left out without --import, got 'v1'"),
    "base gone": (["--import", "ADAPTER", "--base_model", "./gone"], r"no folder './gone'; check --base_model"),
    "damaged": (["--import", "DAMAGED"], "adapter_model.safetensors cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    path: Path, adapter: Path, tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("three years of work")
    mixture("gpt2").experts.export("expert_1", tmp_path / "foreign")
    mixture().experts.export("expert_1", tmp_path / "below")
    shutil.copytree(adapter, tmp_path / "wide")
    said = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps({**said, "r": 4}))
    shutil.copytree(adapter, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    names = {"THESIS": "thesis", "MIXTURE": "mixture", "ADAPTER": "sql", "FOREIGN": "foreign", "OUT": "out"}
    names |= {"DAMAGED": "damaged", "WIDE": "wide", "BELOW": "below"}
    words, message = MISTAKES[mistake]
    for name, folder in names.items():
        words = [word.replace(name, str(tmp_path / folder)) for word in words]
    before = contents(tmp_path)
    assert main(["experts", str(path), *words]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
