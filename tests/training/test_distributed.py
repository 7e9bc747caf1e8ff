"""Two processes give the same losses, weights, evaluation and checkpoints as one with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import ConfigError
from dylo_moe.runs.trainer_arguments import CHECKPOINTING
from dylo_moe.training.distributed import check_sharding
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
STEPS = 8  # an epoch has six: the padded end of an epoch is included
CASES: dict[str, dict[str, Any]] = {
    "unpacked": {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3},
    "packed": {"max_steps": STEPS, "packed": True},
    "final": {"max_steps": 1, "routing": "final"},
    "per_layer": {"max_steps": 1, "routing": "per_layer", CHECKPOINTING: True},
}
SECOND_EPOCH = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 7}


def launch(processes: int, base: Path, output: Path, cases: dict[str, Any], **environment: str) -> None:
    """Run the worker; if it fails, fail the test with its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.support.training_worker", str(base), str(output), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the output folders of all cases, run by one process and by two."""
    found = {count: tmp_path_factory.mktemp(f"of_{count}") for count in (1, 2)}
    for count, output in found.items():
        launch(count, base, output, CASES)
    return found


def result(output: Path, case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / case / "result.json").read_text())
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    expected, got = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(runs: dict[int, Path], case: str) -> None:
    one, two = (result(runs[count], case) for count in (1, 2))
    assert len(one["loss"]) == CASES[case]["max_steps"]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
    assert two["tokens"] == one["tokens"]
    assert two["wrapped"] == "DistributedDataParallel"
    assert_same_weights(runs[1] / case, runs[2] / case)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_evaluate_as_one(runs: dict[int, Path], case: str) -> None:
    one, two = (result(runs[count], case) for count in (1, 2))
    assert two["base"] == pytest.approx(one["base"], rel=1e-9)
    assert two["mixture"] == pytest.approx(one["mixture"], rel=1e-6)
    assert len(one["mixture"]) > 8


def test_a_checkpoint_of_two_processes_is_continued_by_one(runs: dict[int, Path], base: Path, tmp_path: Path) -> None:
    from tests.support.training_worker import train

    checkpoint = runs[2] / "unpacked" / "checkpoint-3"
    DyLoRA_MoE.from_pretrained(checkpoint)
    train(str(base), tmp_path, resume=str(checkpoint), **CASES["unpacked"])
    assert_same_weights(runs[1] / "unpacked", tmp_path)


def test_two_processes_resume_in_their_second_epoch(runs: dict[int, Path], base: Path, tmp_path: Path) -> None:
    resumed = SECOND_EPOCH | {"resume": f"{tmp_path}/whole/checkpoint-7"}
    launch(2, base, tmp_path, {"whole": SECOND_EPOCH, "resumed": resumed})
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_a_sharded_model_trains_like_an_unsharded_one(runs: dict[int, Path], base: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo: the code for accelerators, with accelerate made to take the CPU for one."""
    sharded = {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}}
    cases = {name: options | sharded for name, options in CASES.items() if name != "per_layer"}
    cases["resumed"] = cases["unpacked"] | {"resume": f"{tmp_path}/unpacked/checkpoint-3"}
    launch(2, base, tmp_path, cases, SHARD_ON_CPU="1", ACCELERATE_TORCH_DEVICE="cpu")
    for case in cases:
        name = "unpacked" if case == "resumed" else case
        one, two = result(runs[1], name), result(tmp_path, case)
        assert two["wrapped"] == "FSDPDyLoRA_MoE"
        assert two["loss"][-1] == pytest.approx(one["loss"][-1], abs=1e-6)
        assert two["base"] == pytest.approx(one["base"], rel=1e-9)
        assert two["mixture"] == pytest.approx(one["mixture"], rel=1e-6)
        assert_same_weights(runs[1] / name, tmp_path / case)
    names = {path.name for path in (tmp_path / "unpacked" / "checkpoint-3").iterdir()}
    assert "optimizer.bin" in names and not any(name.startswith("pytorch_model") for name in names), (
        "the base model must not be in a checkpoint"
    )
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "unpacked" / "saved").state_dict()
    for name, value in load_file(runs[1] / "unpacked" / "weights.safetensors").items():
        torch.testing.assert_close(loaded[name].double(), value, rtol=1e-6, atol=1e-8, msg=name)


class _Plugin:
    def __init__(self, version: int = 2, kind: str = "FULL_STATE_DICT") -> None:
        self.fsdp_version, self.state_dict_type = version, kind


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (None, "FSDP needs several accelerators, and this run has 1 process"),
        (_Plugin(version=1), "FSDP must be version 2"),
        (_Plugin(kind="SHARDED_STATE_DICT"), "fsdp_state_dict_type must be FULL_STATE_DICT, got SHARDED"),
        (_Plugin(), None),
    ],
)
def test_sharding_that_would_not_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: _Plugin | None, message: str | None
) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    check_sharding(args, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if message is None:
        check_sharding(args, plugin)
    else:
        with pytest.raises(ConfigError, match=message):
            check_sharding(args, plugin)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_parses_the_recipes(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (2, 16)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
