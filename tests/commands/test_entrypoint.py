"""The entrypoint on simulated platforms: the program it runs, where that writes, and recovery from preemption."""

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
from dylo_moe.errors import EXIT_STOPPED, EXIT_USER_ERROR
from dylo_moe.training.checkpointing import checkpoints
from tests.support import flat_bucket
from tests.support.killed_run import STEPS, arguments, same, write_data
from tests.support.secret_scan import TOKEN, files_with_it, processes_with_it
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
PREEMPTIONS = 3
WORKERS = ("workerpool0", "workerpool1")
CLUSTER_STEPS = 10
SECONDS = 900
"""Time limit of one process; generous, for a busy machine."""

Process = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model and data."""
    made = tmp_path_factory.mktemp("entrypoint")
    write_tiny_folder(made / "base")
    write_data(made)
    return made


def flags(folder: Path, *more: str) -> list[str]:
    """Return the flags of a run, without those that the platform sets."""
    given = arguments(folder / "base", Path("given-by-the-platform"), folder)
    for name in ("--output_dir", "--resume_from_checkpoint"):
        index = given.index(name)
        del given[index : index + 2]
    return ["--train", *given, *more]


def vertex(store: Path, **more: str) -> dict[str, str]:
    """Return the environment of a job on Vertex AI that writes to ``store``, a bucket without folders."""
    return {
        **os.environ,
        **flat_bucket.environment(store, store.with_name(f"{store.name}-python")),
        "CLOUD_ML_JOB_ID": "42",
        "AIP_CHECKPOINT_DIR": str(store / "checkpoints"),
        "AIP_MODEL_DIR": str(store / "model"),
        "AIP_TENSORBOARD_LOG_DIR": str(store / "logs"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def start(environment: dict[str, str], log: Path, arguments: list[str]) -> Process:
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


def wait_for_a_checkpoint_after(step: int, store: Path, process: Process, log: Path) -> None:
    while steps_of(store) <= step:
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)


def supervised(store: Path, log: Path, arguments: list[str]) -> list[int]:
    """Preempt a command ``PREEMPTIONS`` times, and restart it until it succeeds, as Vertex AI does."""
    codes: list[int] = []
    while 0 not in codes:
        assert len(codes) <= PREEMPTIONS, log.read_text()
        process, before = start(vertex(store), log, arguments), steps_of(store)
        if len(codes) < PREEMPTIONS:
            wait_for_a_checkpoint_after(before, store, process, log)
            process.send_signal(signal.SIGTERM)
            assert processes_with_it() == []
        codes.append(process.wait(timeout=SECONDS))
        assert codes[-1] == 0 or before < steps_of(store) < STEPS, "the signal did not come in the middle"
    return codes


def test_preemptions_cost_nothing_and_show_no_token(folder: Path, tmp_path: Path) -> None:
    undisturbed, store, log = tmp_path / "undisturbed", tmp_path / "store", tmp_path / "log"
    assert main(["train", *arguments(folder / "base", undisturbed, folder)]) == 0
    codes = supervised(store, log, flags(folder))
    printed = log.read_text()
    assert codes == [EXIT_STOPPED] * PREEMPTIONS + [0], printed
    assert printed.count("Resuming from") == PREEMPTIONS and "Traceback" not in printed
    assert printed.count("Running on Vertex AI, job 42") == printed.count("on object storage: --save_in_place")
    same(undisturbed, store / "checkpoints")
    mixture = [file for file in (store / "checkpoints" / "best_model").rglob("*") if file.is_file()]
    assert len(mixture) == 16
    for file in mixture:
        copied = store / "model" / file.relative_to(store / "checkpoints" / "best_model")
        assert copied.read_bytes() == file.read_bytes()
    assert list((store / "logs").rglob("events.out.tfevents.*"))
    assert files_with_it(log, store) == []


class Cluster:
    """A job on two workers, simulated by two processes on this machine."""

    def __init__(self, store: Path, log: Path, arguments: list[str]) -> None:
        self.store, self.log = store, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pools = {WORKERS[0]: [f"127.0.0.1:{port}"], WORKERS[1]: ["127.0.0.1:1"]}
        self.processes: list[Process] = []
        for pool in WORKERS:
            spec = json.dumps({"cluster": pools, "environment": "cloud", "task": {"type": pool, "index": 0}})
            environment = vertex(store, CLUSTER_SPEC=spec, NPROC_PER_NODE="1")
            self.processes.append(start(environment, log, arguments))

    def wait(self) -> list[int]:
        """Wait for both workers, and return their exit codes."""
        try:
            return [process.wait(timeout=SECONDS) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


@pytest.fixture(scope="module")
def two_workers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the store and the log of a finished job on two workers."""
    made = tmp_path_factory.mktemp("workers")
    job = Cluster(made / "store", made / "log", flags(folder, "--max_steps", str(CLUSTER_STEPS)))
    assert job.wait() == [0, 0], job.log.read_text()
    return made


def test_two_workers_of_a_cluster_train_to_one_checkpoint(two_workers: Path) -> None:
    printed = (two_workers / "log").read_text()
    assert "Machine 2 of 2" in printed and printed.count("Evaluating the trained mixture") == 1
    whole, skipped = checkpoints.newest_whole(two_workers / "store" / "checkpoints")
    assert whole is not None and whole.name == f"checkpoint-{CLUSTER_STEPS}" and not skipped
    assert len(list(whole.glob("rng_state_*"))) == 2, "both workers trained"
    assert (two_workers / "store" / "model" / "dylo_moe.json").is_file()
    assert files_with_it(two_workers) == []


def test_a_preempted_worker_stops_all_and_costs_nothing(two_workers: Path, folder: Path, tmp_path: Path) -> None:
    store, log, command = tmp_path / "store", tmp_path / "log", flags(folder, "--max_steps", str(CLUSTER_STEPS))
    job = Cluster(store, log, command)
    wait_for_a_checkpoint_after(0, store, job.processes[0], log)
    job.processes[1].send_signal(signal.SIGTERM)
    assert processes_with_it() == []
    assert job.wait() == [EXIT_STOPPED, EXIT_STOPPED], log.read_text()
    assert 0 < steps_of(store) < CLUSTER_STEPS, "the signal did not come in the middle"
    assert Cluster(store, log, command).wait() == [0, 0], log.read_text()
    assert log.read_text().count("Resuming from") == 1
    trained = [file.relative_to(two_workers) for file in (two_workers / "store/model").rglob("*.safetensors")]
    assert len(trained) == 5
    for file in trained:
        assert (tmp_path / file).read_bytes() == (two_workers / file).read_bytes()


def test_the_exit_code_of_the_program_is_returned(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "--train", "--lora-r", "-1"],
        env=vertex(tmp_path / "store"),
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
    calls: list[list[str]] = []

    def benchmark(flags: list[str], program: str) -> int:
        calls.append(list(flags))
        return 7

    monkeypatch.setattr("dylo_moe.commands.benchmark.main", benchmark)
    assert main(["entrypoint", "--benchmark", "--base-model", "--max-samples", "20"]) == 7
    assert calls == [["--base-model", "--max-samples", "20"]]
