"""The container, its build script and the recipes: what their linters say, and what linters miss."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dylo_moe.cloud_config import LIKE_A_SECRET
from dylo_moe.config import TRAIN_GROUPS
from dylo_moe.flags import parse
from dylo_moe.training.interruption import EXIT_STOPPED

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
LINES = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
RECIPES = ROOT / "recipes" / "cloud"


@pytest.mark.parametrize("command", [["hadolint", "Dockerfile"], ["shellcheck", "build_and_push.sh"]])
def test_linters_have_nothing_to_say(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_is_pinned_and_small() -> None:
    (pinned,) = [line for line in LINES if line.startswith("ARG PYTHON=")]
    assert re.fullmatch(r"ARG PYTHON=python:[\w.-]+-slim-[a-z]+@sha256:[0-9a-f]{64}", pinned)
    stages = [re.fullmatch(r"FROM (\S+) AS (\S+)", line) for line in LINES if line.startswith("FROM ")]
    names = [stage[2] for stage in stages if stage]
    assert len(names) == len(stages)
    assert all(stage and stage[1] in ("${PYTHON}", *names) for stage in stages), "no other image"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_without_rights(target: str) -> None:
    stage = DOCKERFILE.partition(f"FROM runtime AS {target}\n")[2].partition("\nFROM ")[0]
    assert re.findall(r"^USER (.*)$", stage, flags=re.MULTILINE)[-1:] == ["1000"]


def test_signals_reach_training() -> None:
    (entrypoint,) = [line for line in LINES if line.startswith("ENTRYPOINT")]
    assert entrypoint == 'ENTRYPOINT ["/usr/bin/tini", "--", "python", "/app/entrypoint.py"]'


def test_what_is_installed_is_locked_and_no_secret_is_built_in() -> None:
    installs = [line for line in LINES if "pip install" in line]
    assert installs and all("--constraint requirements.lock" in line for line in installs)
    assert not [line for line in LINES if line.startswith(("ARG", "ENV")) and LIKE_A_SECRET.search(line)]
    assert not [line for line in LINES if re.match(r"(COPY|ADD) (\.|/) ", line)]


def test_the_context_has_what_is_copied_and_no_more() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        name for line in LINES if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    }
    assert "*" in ignore and kept == copied
    assert all((ROOT / name).exists() for name in kept)


def script(tmp_path: Path, *arguments: str, dirty: bool = False) -> "subprocess.CompletedProcess[str]":
    """Runs the build script in a repository of its own, where no gcloud is installed."""
    for name in ("build_and_push.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    if dirty:
        (tmp_path / "new").touch()
    tools = tmp_path.with_name(f"{tmp_path.name}-tools")
    tools.mkdir()
    for tool in ("bash", "git", "sed", "grep", "cat", "dirname", "env"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    environment = {"PATH": str(tools), "HOME": os.environ.get("HOME", "/")}
    command = ["./build_and_push.sh", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_the_script_shows_what_it_would_do(tmp_path: Path) -> None:
    done = script(tmp_path, "--project", "my-project", "--region", "us-central1", "--dry-run", "--dockerhub", "me")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("env DOCKER_BUILDKIT=1 docker build --target cuda ")
    assert sum(line.startswith("docker push us-central1-docker.pkg.dev/my-project/dylora-moe/") for line in lines) == 2
    assert sum(line.startswith("docker push docker.io/me/dylora-moe:") for line in lines) == 2
    assert lines[-1].startswith("export DYLO_MOE_IMAGE=us-central1-docker.pkg.dev/my-project/")


@pytest.mark.parametrize(
    ("arguments", "dirty", "message"),
    [
        (["--region", "r"], False, "--project is missing"),
        (["--project", "p"], False, "--region is missing"),
        (["--project", "p", "--region", "r"], True, "the tree has changes"),
        (["--target", "tpu"], False, "--target must be cuda or cpu"),
        (["--nonsense"], False, "unknown argument '--nonsense'"),
    ],
)
def test_the_script_refuses(tmp_path: Path, arguments: list[str], dirty: bool, message: str) -> None:
    done = script(tmp_path, *arguments, "--dry-run", dirty=dirty)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_the_kubernetes_job_goes_on_where_it_was_stopped() -> None:
    claim, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    assert (claim["kind"], job["apiVersion"], job["kind"]) == ("PersistentVolumeClaim", "batch/v1", "Job")
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [2], "Ignore": [EXIT_STOPPED]}
    (container,) = pod["containers"]
    assert container["args"][0] == "--train"
    flags = parse(TRAIN_GROUPS, "train", "", container["args"][1:])
    assert flags[3].resume_from_checkpoint == "auto"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all("value" not in entry for entry in container["env"]), "secrets come by reference"


def test_the_sky_task_goes_on_where_it_was_stopped() -> None:
    task = yaml.safe_load((RECIPES / "sky.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_STOPPED]
    assert task["secrets"] == {"HF_TOKEN": None}
    command = task["run"].replace("\\\n", "").partition("--train")[2].replace('"', "").split()
    assert parse(TRAIN_GROUPS, "train", "", command)[3].resume_from_checkpoint == "auto"
    assert "/checkpoints" in task["file_mounts"]
