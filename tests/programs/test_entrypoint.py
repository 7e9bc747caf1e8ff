"""The entrypoint under platforms that are made up: what runs, where it writes, and that preemptions cost nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.training import checkpoints
from dylo_moe.training.interruption import EXIT_STOPPED
from killed_run import STEPS, arguments, same, write_data
from tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
TOKEN = "hf_plantedplantedplantedplanted"
PREEMPTIONS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and data."""
    made = tmp_path_factory.mktemp("entrypoint")
    write_tiny_folder(made / "base")
    write_data(made)
    return made


def flags(folder: Path) -> list[str]:
    """A run's, without those that the platform gives."""
    every = arguments(folder / "base", Path("given-by-the-platform"), folder)
    for name in ("--output_dir", "--resume_from_checkpoint"):
        at = every.index(name)
        del every[at : at + 2]
    return every


def vertex(store: Path, **more: str) -> dict[str, str]:
    """The environment of a job on Vertex AI that keeps its things in ``store``."""
    return {
        **os.environ,
        "CLOUD_ML_JOB_ID": "42",
        "AIP_CHECKPOINT_DIR": str(store / "checkpoints"),
        "AIP_MODEL_DIR": str(store / "model"),
        "AIP_TENSORBOARD_LOG_DIR": str(store / "logs"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def started(environment: dict[str, str], log: Path, arguments: list[str]) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py"), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def steps_of(store: Path) -> int:
    newest = checkpoints.newest_first(store / "checkpoints")
    return int(newest[0].name.partition("-")[2]) if newest else 0


def planted(places: list[Path]) -> list[Path]:
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return [file for file in files if file.is_file() and TOKEN.encode() in file.read_bytes()]


def test_preemptions_cost_nothing_and_show_no_token(folder: Path, tmp_path: Path) -> None:
    undisturbed, store, log = tmp_path / "undisturbed", tmp_path / "store", tmp_path / "log"
    assert main(["train", *arguments(folder / "base", undisturbed, folder)]) == 0
    command = ["--train", *flags(folder)]
    for _ in range(PREEMPTIONS):
        before = steps_of(store)
        process = started(vertex(store), log, command)
        while steps_of(store) <= before:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        assert TOKEN.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=240) == EXIT_STOPPED, log.read_text()
        assert before < steps_of(store) < STEPS, "the signal came in the middle"
    assert started(vertex(store), log, command).wait(timeout=240) == 0, log.read_text()
    said = log.read_text()
    assert said.count("Going on from") == PREEMPTIONS and "Traceback" not in said
    assert said.count("Running on Vertex AI, job 42") == PREEMPTIONS + 1
    same(undisturbed, store / "checkpoints")
    for file in (undisturbed / "best_model").rglob("*.safetensors"):
        copied = store / "model" / file.relative_to(undisturbed / "best_model")
        assert copied.read_bytes() == file.read_bytes()
    assert planted([log, store]) == []


def test_two_workers_of_a_cluster_train_to_one_checkpoint(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pools = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": ["127.0.0.1:1"]}
    processes = []
    for pool in pools:
        spec = json.dumps({"cluster": pools, "environment": "cloud", "task": {"type": pool, "index": 0}})
        environment = vertex(tmp_path / "store", CLUSTER_SPEC=spec, NPROC_PER_NODE="1")
        processes.append(started(environment, tmp_path / pool, ["--train", *flags(folder), "--max_steps", "3"]))
    codes = [process.wait(timeout=280) for process in processes]
    said = "".join((tmp_path / pool).read_text() for pool in pools)
    assert codes == [0, 0], said
    assert "Machine 2 of 2" in said and said.count("Evaluating the trained mixture") == 1
    whole, skipped = checkpoints.newest_whole(tmp_path / "store" / "checkpoints")
    assert whole is not None and whole.name == "checkpoint-3" and not skipped
    assert len(list(whole.glob("rng_state_*"))) == 2, "both have trained"
    assert (tmp_path / "store" / "model" / "dylo_moe.json").is_file()


def test_the_program_s_exit_code_passes_through(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "--train", "--lora-r", "-1"],
        env=vertex(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.splitlines()[-1] == "error: --lora_r must be at least 1, got -1"


@pytest.mark.parametrize("given", [["--trian"], ["train"], ["--submit"]])
def test_another_program_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entrypoint", *given]) == EXIT_USER_ERROR
    assert "the first flag must be --train or --benchmark" in capsys.readouterr().err


def test_benchmark_gets_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []

    def benchmark(flags: list[str], program: str) -> int:
        got.append(list(flags))
        return 7

    monkeypatch.setattr("dylo_moe.programs.benchmark.main", benchmark)
    assert main(["entrypoint", "--benchmark", "--base-model", "--max-samples", "20"]) == 7
    assert got == [["--base-model", "--max-samples", "20"]]
