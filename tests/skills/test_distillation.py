"""One LoRA made of a mixture: exact where one update can hold it, trained towards the mixture where it cannot."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.runs import distill
from dylo_moe.skills.composition import mixture_of
from dylo_moe.skills.distillation import STUDENT, add_student, distillation_loss, low_rank, student_logits
from tests.support.families import LAYERS, mixture, relative_error, tiny, token_ids
from tests.support.plain_adapters import with_adapter


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, files = tmp_path_factory.mktemp("samples"), {}
    for name, word in {"letters": "abab", "signs": "#!?#"}.items():
        rows = [{"prompt": f"{word} {number}\n", "response": f"{word * 3} {number % 7}"} for number in range(32)]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def saved(adapters: dict[str, Path], base: Path, folder: Path) -> Path:
    model = mixture_of(adapters, str(base))
    model.set_maturity()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank", [1, 4, 7, 12])
def test_the_low_rank_copy_is_the_truncated_svd_of_the_sum(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    down = [torch.randn(r, 30, generator=generator, dtype=torch.float64) for r in (4, 3)]
    up = [torch.randn(20, r, generator=generator, dtype=torch.float64) for r in (4, 3)]
    whole = sum(b @ a for a, b in zip(down, up, strict=True))
    u, values, v = torch.linalg.svd(whole)
    wanted = (u[:, :rank] * values[:rank]) @ v[:rank]
    a, b = low_rank(down, up, rank)
    kept = min(rank, 7)
    assert (a.shape, b.shape) == ((kept, 30), (20, kept))
    torch.testing.assert_close(b.double() @ a.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_copy_holds_each_layers_own_mean_and_the_shared_expert() -> None:
    model = mixture(routing="per_layer", num_experts=3, shared_rank=2)
    weights = torch.rand(LAYERS, 3, dtype=torch.float64)
    base = tiny()
    for path, layer in model.experts.base_model.named_modules():
        if hasattr(layer, "lora_A"):
            shares = [*weights[int(path.split(".")[2])].tolist(), 1.0]
            with torch.no_grad():
                for name, share in zip(model.experts.adapters, shares, strict=True):
                    update = layer.lora_B[name].weight @ layer.lora_A[name].weight
                    base.get_submodule(path).weight.add_(share * layer.scaling[name] * update)
    add_student(model, 14, weights)
    ids = token_ids(2, 9)
    with torch.no_grad():
        got = student_logits(model, ids, torch.ones_like(ids))
        assert relative_error(got, base(ids).logits) < 1e-5
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {STUDENT}


def test_a_mixture_of_one_adapter_comes_back_as_it_was(
    base: Path, adapters: dict[str, Path], samples: dict[str, str], tmp_path: Path
) -> None:
    path = saved({"everywhere": adapters["everywhere"]}, base, tmp_path / "mixture")
    for kept in distill(path, tmp_path / "one", samples, steps=0, rank=8).values():
        assert kept.start == pytest.approx(kept.mixture, rel=1e-5)
        assert kept.distilled == kept.start
        assert kept.base != pytest.approx(kept.mixture, rel=1e-3)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one").eval()
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert relative_error(plain(ids).logits, with_adapter(base, adapters["everywhere"])(ids).logits) < 1e-4


def test_training_brings_the_copy_nearer_to_the_mixture(
    base: Path, adapters: dict[str, Path], samples: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(adapters, base, tmp_path / "mixture")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    given = [word for name, file in samples.items() for word in ("--sample", f"{name}={file}")]
    assert main(["experts", str(path), "--distill", str(tmp_path / "one"), "--rank", "2", *given]) == 0
    assert "mean update" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    kept = distill(path, tmp_path / "two", samples, steps=80, rank=2, learning_rate=5e-3)
    for found in kept.values():
        assert abs(found.distilled - found.mixture) < abs(found.start - found.mixture)


def test_the_loss_of_equal_logits_is_zero_and_counts_labelled_tokens_alone() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 4, 5], [-100, 1, 2, -100, -100]])
    assert distillation_loss(logits, logits, labels) == pytest.approx(0, abs=1e-6)
    other = logits.clone()
    other[0, 0], other[1, 3:] = 0, 0  # these predict no labelled token
    assert distillation_loss(other, logits, labels) == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_distilled_is_refused(
    base: Path, adapters: dict[str, Path], samples: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(adapters, base, tmp_path / "mixture")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    sample = f"letters={samples['letters']}"
    for flags, message in (
        (["--distill", str(tmp_path / "one")], "--sample must be given at least once for --distill, got none"),
        (["--rank", "4"], "--rank must be left out without --distill, got '4'".replace("'4'", "4")),
        (["--distill", str(tmp_path / "mine"), "--sample", sample, "--distill_steps", "0"], str(tmp_path / "mine")),
    ):
        assert main(["experts", str(path), *flags]) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
