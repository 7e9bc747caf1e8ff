"""``acquire`` and ``experts`` run on a tiny base model and small files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.errors import EXIT_STOPPED, EXIT_USER_ERROR
from dylo_moe.skills.expert_edits import list_experts
from tests.support.tiny_folder import write_tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def rows(path: Path, word: str) -> str:
    lines = [{"prompt": f"{word} {number}\n", "response": f"{word * 3} {number % 7}"} for number in range(120)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{path.stem}={path}"


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [rows(folder / "letters.jsonl", "abab"), rows(folder / "signs.jsonl", "#!?#")]


def arguments(base: Path, skills: list[str], output: Path, *more: str) -> list[str]:
    return [
        *("acquire", "--model_name", str(base), "--skill", *skills, "--output_dir", str(output)),
        *("--max_seq_length", "64", "--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--lora_r", "4"),
        *("--max_steps", "6", "--learning_rate", "5e-3", "--report_to", "none", "--sample_rows", "32", *more),
    ]


def test_a_stream_is_learned_and_can_be_extended(
    base: Path, stream: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, stream[:1], tmp_path)) == 0
    assert json.loads((tmp_path / "report.json").read_text())["forgetting"] is None, "nothing can be forgotten yet"
    first = (tmp_path / "model" / "experts" / "expert_0" / "adapter_model.safetensors").read_bytes()
    assert main(arguments(base, stream, tmp_path)) == 0
    skills = json.loads((tmp_path / "model" / "skills.json").read_text())["skills"]
    assert [(skill["name"], skill["expert"]) for skill in skills] == [("letters", "expert_0"), ("signs", "expert_1")]
    assert (tmp_path / "model" / "experts" / "expert_0" / "adapter_model.safetensors").read_bytes() == first
    assert set(skills[1]["losses"]) == {"letters", "signs"}
    assert skills[1]["losses"]["letters"] == pytest.approx(skills[0]["losses"]["letters"], rel=0.05)
    assert skills[1]["usage"]["signs"]["expert_1"] > 0.8
    assert DyLoRA_MoE.from_pretrained(tmp_path / "model").router.maturity == [1, 1]
    assert not list((tmp_path / "stages").glob("*/checkpoint-*"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["losses"] == {skill["name"]: skill["losses"] for skill in skills}
    # of one older skill, both are the change since it was learned
    assert report["forgetting"] == pytest.approx(skills[1]["losses"]["letters"] - skills[0]["losses"]["letters"])
    assert report["backward_transfer"] == pytest.approx(-report["forgetting"])
    capsys.readouterr()
    assert main(["experts", str(tmp_path / "model")]) == 0
    assert f"forgetting {report['forgetting']:+.3f}" in capsys.readouterr().out


def process(words: list[str], log: Path) -> "subprocess.Popen[bytes]":
    code = "import sys; from dylo_moe.cli import main; sys.exit(main())"
    with log.open("wb") as file:  # a pipe without a reader would fill up
        return subprocess.Popen([sys.executable, "-c", code, *words], stdout=file, stderr=file)


def wait_for_checkpoint(stage: Path, running: "subprocess.Popen[bytes]") -> None:
    before = set(stage.glob("checkpoint-*"))
    while set(stage.glob("checkpoint-*")) <= before:
        assert running.poll() is None, f"ended with {running.returncode} before the next checkpoint"
        time.sleep(0.01)


def test_a_stream_resumes_after_a_stop_and_a_kill(base: Path, stream: list[str], tmp_path: Path) -> None:
    whole, torn, log = tmp_path / "whole", tmp_path / "torn", tmp_path / "log"
    more = ("--save_steps", "2", "--max_steps", "40", "--save_total_limit", "2")
    assert main(arguments(base, stream, whole, *more)) == 0
    words = arguments(base, stream, torn, *more)
    for signal_, code in ((signal.SIGTERM, EXIT_STOPPED), (signal.SIGKILL, -signal.SIGKILL)):
        running = process(words, log)
        wait_for_checkpoint(torn / "stages" / "signs", running)
        running.send_signal(signal_)
        assert running.wait(timeout=120) == code, log.read_text()
        skills = json.loads((torn / "model" / "skills.json").read_text())["skills"]
        assert [skill["name"] for skill in skills] == ["letters"]
    assert main(words) == 0
    for file in ("router.safetensors", "experts/expert_1/adapter_model.safetensors", "skills.json"):
        assert (torn / "model" / file).read_bytes() == (whole / "model" / file).read_bytes(), file


def test_rank_from_data_and_novelty_by_entropy(
    base: Path, stream: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--rank_from_data", "--lora_r", "32", "--novelty", "entropy", "--skill", rows_again(stream))
    assert main(arguments(base, stream, tmp_path, *more)) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "by cosine" in printed and "by entropy" in printed
    assert [expert.rank for expert in list_experts(tmp_path / "model")] == [4, 4]  # `again` is not new
    assert printed.count("expert_0 of rank 4 learns it") == 2 and printed.count("expert_1 of rank 4 learns it") == 1


def rows_again(stream: list[str]) -> str:
    return "again=" + stream[0].partition("=")[2]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--routing", "per_layer"], "--routing"),
        (["--num_experts", "3"], "--num_experts"),
        (["--extend", "perhaps"], "--extend"),
        (["--novelty", "0.75"], "--novelty"),
        (["--datasets", "mbpp"], "--datasets must be left out"),
        (["--overwrite_output_dir"], "--overwrite_output_dir"),
        (["--save_in_place"], "--save_in_place"),
    ],
)
def test_flags_that_acquire_cannot_use_are_refused(
    base: Path, stream: list[str], tmp_path: Path, more: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, stream, tmp_path, *more)) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_a_stream_without_skills_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["acquire", "--model_name", str(base)]) == EXIT_USER_ERROR
    assert "--skills" in capsys.readouterr().err
