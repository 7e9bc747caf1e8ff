"""Two processes log the same figures as one does for the same global batches, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, sys
from pathlib import Path

import torch
from dylo_moe.errors import TrainingError
from dylo_moe.training.monitoring.callbacks import monitoring_callbacks
from tests.support.tiny_trainer import trainer_of

torch.set_num_threads(1)
folder, output, size, spoilt = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "spoilt"
options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2, "logging_steps": 2}
trainer = trainer_of(folder, output, max_steps=4, **options)
for callback in monitoring_callbacks(["even", "odd"]):
    trainer.add_callback(callback)
rank = trainer.args.process_index
if spoilt and rank == 1:  # an infinite loss whose gradient is finite: the other process has no sign of it
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) + float("inf")
try:
    trainer.train()
except TrainingError as error:
    (output / f"ended-{rank}.txt").write_text(str(error))
if rank == 0:
    (output / "history.json").write_text(json.dumps(trainer.state.log_history))
trainer.accelerator.wait_for_everyone()  # an early exit can end the other process through its connection
trainer.accelerator.end_training()
"""

SHARDED = """
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from dylo_moe.training.monitoring.gradients import gradient_norm, max_abs

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
whole, sharded = (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)) for _ in range(2))
sharded.load_state_dict(whole.state_dict())
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
rows = torch.randn(4, 6)
for module in (whole, sharded):
    module(rows).square().sum().backward()
norms = [torch.stack([gradient_norm(m.parameters()), max_abs(m.parameters())]) for m in (whole, sharded)]
torch.testing.assert_close(norms[1], norms[0])
torch.distributed.destroy_process_group()
"""


def launch(script: Path, text: str, processes: int, *arguments: str) -> None:
    script.write_text(text)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(script)]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-9000:]


def run(folder: Path, output: Path, processes: int, how: str = "well") -> list[dict[str, Any]]:
    output.mkdir()
    launch(output / "run.py", SCRIPT, processes, str(folder), str(output), str(4 // processes), how)
    history: list[dict[str, Any]] = json.loads((output / "history.json").read_text())
    return [entry for entry in history if "learning_rate" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def test_two_processes_log_the_same_as_one(folder: Path, tmp_path: Path) -> None:
    one, two = (run(folder, tmp_path / str(count), count) for count in (1, 2))
    assert [entry["step"] for entry in two] == [2, 4]
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            if name not in ("tokens_per_second", "memory_mib"):
                assert together[name] == pytest.approx(value, rel=1e-5), name


def test_all_processes_end_if_the_loss_of_one_is_not_finite(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", 2, "spoilt") == []
    said = [(tmp_path / "out" / f"ended-{rank}.txt").read_text() for rank in (0, 1)]
    assert "the loss of another process is not finite in step 1;" in said[0]
    assert "the loss is inf in step 1;" in said[1]


def test_norms_of_sharded_parameters_are_those_of_the_whole_ones(tmp_path: Path) -> None:
    launch(tmp_path / "sharded.py", SHARDED, 2)
