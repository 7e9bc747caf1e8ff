"""The container and its build script: linters, rules that linters miss, and leftovers of the build steps."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.config.cloud import LIKE_A_SECRET
from tests.cloud.run_steps import Builder, Image, runs_of, stages_of
from tests.support.secret_scan import TOKEN, files_with_it

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
LINES = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("command", [["hadolint", "Dockerfile"], ["shellcheck", "build_and_push.sh"]])
def test_linters_pass(command: list[str]) -> None:
    tool = shutil.which(command[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert tool is not None, "a development dependency"
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_image_is_pinned_and_slim() -> None:
    (pinned,) = [line for line in LINES if line.startswith("ARG PYTHON=")]
    assert re.fullmatch(r"ARG PYTHON=python:[\w.-]+-slim-[a-z]+@sha256:[0-9a-f]{64}", pinned)
    stages = [re.fullmatch(r"FROM (\S+) AS (\S+)", line) for line in LINES if line.startswith("FROM ")]
    names = [stage[2] for stage in stages if stage]
    assert len(names) == len(stages)
    assert all(stage and stage[1] in ("${PYTHON}", *names) for stage in stages), "no other image"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_an_ordinary_user(target: str) -> None:
    stage = DOCKERFILE.partition(f"FROM runtime AS {target}\n")[2].partition("\nFROM ")[0]
    assert re.findall(r"^USER (.*)$", stage, flags=re.MULTILINE)[-1:] == ["1000"]


def test_signals_reach_training() -> None:
    (entrypoint,) = [line for line in LINES if line.startswith("ENTRYPOINT")]
    assert entrypoint == 'ENTRYPOINT ["/usr/bin/tini", "--", "python", "/app/entrypoint.py"]'


def test_packages_are_locked_and_no_secret_is_built_in() -> None:
    installs = re.findall(r"pip install[^&\n]*", DOCKERFILE)
    by_name = re.compile(r"pip install --no-deps( [\w-]+==[\w.]+)+")
    pinned = [install for install in installs if by_name.fullmatch(install.strip())]
    assert len(pinned) == 2
    assert all("--constraint requirements.lock" in install for install in installs if install not in pinned)
    assert not [line for line in LINES if line.startswith(("ARG", "ENV")) and LIKE_A_SECRET.search(line)]
    assert not [line for line in LINES if re.match(r"(COPY|ADD) (\.|/) ", line)]


def test_the_context_has_only_the_files_that_are_copied() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        name for line in LINES if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    }
    assert "*" in ignore and kept == copied
    assert all((ROOT / name).exists() for name in kept)


def script(
    tmp_path: Path, *arguments: str, dirty: bool = False, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run the build script in its own repository, without gcloud."""
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
    environment = {"PATH": str(tools), "HOME": os.environ.get("HOME", "/"), **(environment or {})}
    command = ["./build_and_push.sh", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_a_dry_run_of_the_script_prints_its_commands(tmp_path: Path) -> None:
    secret = tmp_path.with_name("pip.conf")
    secret.write_text(TOKEN)
    places = ["--project", "my-project", "--region", "us-central1"]
    done = script(tmp_path, *places, "--dry-run", "--dockerhub", "me", "--pip-conf", str(secret))
    assert done.returncode == 0, done.stderr
    assert f" --secret id=pip,src={secret} " in done.stdout.replace("\\", "") and TOKEN not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("env DOCKER_BUILDKIT=1 docker build --target cuda ")
    assert sum(line.startswith("docker push us-central1-docker.pkg.dev/my-project/dylora-moe/") for line in lines) == 2
    assert sum(line.startswith("docker push docker.io/me/dylora-moe:") for line in lines) == 2
    assert lines[-1].startswith("export DYLO_MOE_IMAGE=us-central1-docker.pkg.dev/my-project/")


def test_the_environment_can_replace_all_arguments(tmp_path: Path) -> None:
    environment = {
        "GOOGLE_CLOUD_PROJECT": "my-project",
        "GOOGLE_CLOUD_REGION": "europe-west4",
        "DYLO_MOE_REPOSITORY": "images",
        "DOCKERHUB_USER": "me",
        "DYLO_MOE_TARGET": "cpu",
    }
    done = script(tmp_path, "--dry-run", environment=environment)
    assert done.returncode == 0, done.stderr
    image = "europe-west4-docker.pkg.dev/my-project/images/dylora-moe"
    for name in (image, "docker.io/me/dylora-moe"):
        assert re.search(rf"^docker push {name}:[\d.]+-cpu $", done.stdout, flags=re.MULTILINE)
        assert re.search(rf"^docker push {name}:[\d.]+-[0-9a-f]{{12}}-cpu $", done.stdout, flags=re.MULTILINE)


def test_building_alone_needs_no_project(tmp_path: Path) -> None:
    done = script(tmp_path, "--no-push", "--dry-run", "--target", "cpu")
    assert done.returncode == 0, done.stderr
    build, image = done.stdout.splitlines()
    assert " --target cpu " in build and " --tag dylora-moe:" in build
    assert image.startswith("export DYLO_MOE_IMAGE=dylora-moe:")


@pytest.mark.parametrize(
    ("arguments", "dirty", "message"),
    [
        (["--region", "r"], False, "--project is missing"),
        (["--project", "p"], False, "--region is missing"),
        (["--project", "p", "--region", "r"], True, "uncommitted changes"),
        (["--target", "tpu"], False, "--target must be cuda or cpu"),
        (["--nonsense"], False, "unknown argument '--nonsense'"),
        (["--project"], False, "--project needs a value"),
        (["--pip_conf", "none"], False, "--pip-conf: there is no file 'none'"),
    ],
)
def test_the_script_refuses(tmp_path: Path, arguments: list[str], dirty: bool, message: str) -> None:
    done = script(tmp_path, *arguments, "--dry-run", dirty=dirty)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_the_script_refuses_a_folder_without_a_commit(tmp_path: Path) -> None:
    for name in ("build_and_push.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["./build_and_push.sh", "--no-push"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: this folder is no git clone") and not done.stdout


def test_every_step_of_the_cpu_target_is_found() -> None:
    text = (ROOT / "Dockerfile").read_text()
    only_cuda = DOCKERFILE.partition("FROM build AS build-cuda\n")[2].partition("\nFROM ")[0]
    wanted = [" ".join(line.split()[1:]) for line in LINES if line.startswith("RUN ")]
    for line in only_cuda.splitlines():
        if line.startswith("RUN "):
            wanted.remove(" ".join(line.split()[1:]))
    assert len(wanted) == 5 and sorted(runs_of("cpu", text)) == sorted(wanted)
    assert runs_of("cpu", text)[0] == "python -m venv /opt/venv"
    assert list(stages_of(text)) == ["build", "build-cpu", "build-cuda", "runtime", "cpu", "cuda"]


# Each tool writes down its arguments, its environment, and whether pip's configuration was mounted.
TOOL = """#!/bin/sh
{ echo "$(basename "$0") $*"; env; [ ! -s /etc/pip.conf ] || echo "and pip.conf"; } >> /said
[ "$*" != "-m venv /opt/venv" ] || mkdir -p /opt/venv
"""


def confined() -> bool:
    command = ["bwrap", "--ro-bind", "/", "/", "true"]
    return shutil.which("bwrap") is not None and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(not confined(), reason="bubblewrap cannot be used here")
def test_no_token_is_left_by_the_steps_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret, base = tmp_path / "pip.conf", tmp_path / "base"
    secret.write_text(f"[global]\nindex-url = https://user:{TOKEN}@example.org/simple\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for folder in ("tools", "opt", "etc", "tmp"):
        (base / folder).mkdir(parents=True)
    for tool in ("python", "pip", "apt-get", "useradd", "chown"):
        (base / "tools" / tool).write_text(TOOL)
        (base / "tools" / tool).chmod(0o755)
    shared = [path for path in ("/usr", "/bin", "/lib", "/lib64") if os.path.exists(path)]
    binds = [text for path in shared for text in ("--ro-bind", path, path)]
    (tmp_path / "roots").mkdir()
    builder = Builder(tmp_path / "roots", Image(base, {"PATH": "/tools:/usr/bin:/bin"}), {"pip": secret}, binds)
    image = builder.build("cpu", (ROOT / "Dockerfile").read_text())
    assert (image.user, image.command["ENTRYPOINT"][0]) == ("1000", "/usr/bin/tini")
    said = (tmp_path / "roots" / "build-cpu" / "said").read_text()
    assert said.startswith("python -m venv /opt/venv\n") and "PIP_NO_CACHE_DIR=1" in said
    assert said.count("\nand pip.conf") == said.count("\npip install ") == 3, "pip gets the secret"
    assert (tmp_path / "roots" / "runtime" / "said").read_text().count("\napt-get ") == 1
    assert not list((tmp_path / "roots").glob("*/etc/pip.conf"))
    assert files_with_it(tmp_path / "roots") == []
    shown = capfd.readouterr()
    assert "RUN pip install" in shown.out and TOKEN not in shown.out + shown.err
