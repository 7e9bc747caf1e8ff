"""Runs each RUN step of a target of the Dockerfile, in order, in a fresh root, without a Docker engine:

    python tests/cloud/run_steps.py cpu FOLDER

as root, on Debian with debootstrap and bubblewrap. A Debian bookworm with Debian's Python replaces the base image. At
the end the entrypoint runs as the image's user.

Covered: several stages, ENV, WORKDIR, COPY from the context and from stages, RUN with secret mounts, USER, ENTRYPOINT
and CMD in exec form. Not covered: .dockerignore, patterns in COPY, other mounts, and every other instruction.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Variables that a builder passes to every step and keeps out of the image."""
IGNORED = ("ARG", "LABEL")


class Step(NamedTuple):
    """One instruction and its arguments."""

    instruction: str
    text: str


@dataclass
class Stage:
    """One FROM and the steps below it."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Image:
    """Result of a stage, on which the next one builds.

    Attributes:
        root: Folder of its files.
        environment: Environment variables.
        folder: Working directory.
        user: Id of the user.
        command: ENTRYPOINT and CMD.
    """

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    folder: str = "/"
    user: str = "0"
    command: dict[str, list[str]] = field(default_factory=dict)


def stages_of(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by name."""
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = Stage(name, base)
        elif instruction and stages:
            stages[next(reversed(stages))].steps.append(Step(instruction, " ".join(rest.split())))
    return stages


def needed_for(target: str, stages: Mapping[str, Stage]) -> list[Stage]:
    """Return the stages that a target needs, in the order of the file."""
    found: set[str] = set()
    pending = [target]
    while pending:
        name = pending.pop()
        if name in stages and name not in found:
            found.add(name)
            copies = (re.match(r"--from=(\S+)", step.text) for step in stages[name].steps)
            pending += [stages[name].base, *(match[1] for match in copies if match)]
    return [stage for stage in stages.values() if stage.name in found]


def runs_of(target: str, text: str) -> list[str]:
    """Return the RUN steps of a target, in order."""
    needed = needed_for(target, stages_of(text))
    return [step.text for stage in needed for step in stage.steps if step.instruction == "RUN"]


@dataclass
class Builder:
    """Builder of targets in folders.

    Attributes:
        folder: Parent of the roots, one for each stage.
        base: Replacement of the base image.
        secrets: File for each id of a secret mount; mounts without a file are left out, as builders do.
        binds: Additional options of bubblewrap.
    """

    folder: Path
    base: Image
    secrets: Mapping[str, Path] = field(default_factory=dict)
    binds: Sequence[str] = ()

    def build(self, target: str, text: str) -> Image:
        """Run the steps of a target; return its image.

        Raises:
            CalledProcessError: A step failed.
        """
        images: dict[str, Image] = {}
        for stage in needed_for(target, stages_of(text)):
            base = images.get(stage.base, self.base)
            image = replace(base, root=self.folder / stage.name)
            subprocess.run(["cp", "--archive", "--reflink=auto", f"{base.root}/.", str(image.root)], check=True)
            for step in stage.steps:
                image = self._after(step, image, images)
            images[stage.name] = image
        return images[target]

    def run(self, image: Image, command: Sequence[str], mounts: Sequence[str] = ()) -> None:
        """Run a command in an image."""
        known = {name: os.environ[name] for name in PROXIES if name in os.environ}
        variables = [
            text for item in {**known, "HOME": "/root", **image.environment}.items() for text in ("--setenv", *item)
        ]
        network = [text for file in ("/etc/resolv.conf", "/etc/hosts") for text in ("--ro-bind", file, file)]
        user = ["setpriv", f"--reuid={image.user}", f"--regid={image.user}", "--clear-groups"]
        line = [
            "bwrap",
            "--bind",
            str(image.root),
            "/",
            "--dev",
            "/dev",
            "--proc",
            "/proc",
            "--perms",
            "1777",
            "--tmpfs",
            "/tmp",
            *network,
        ]
        line += ["--unshare-pid", "--as-pid-1", "--die-with-parent", "--clearenv", *variables, *self.binds, *mounts]
        line += ["--chdir", image.folder, *([] if image.user == "0" else user), *command]
        subprocess.run(line, check=True)

    def _after(self, step: Step, image: Image, images: Mapping[str, Image]) -> Image:
        match step.instruction:
            case "RUN":
                mounts, command = self._mounts(step.text)
                _say(f"RUN {command}")
                with _without_mount_points(mounts, image.root):
                    self.run(image, ["/bin/sh", "-c", command], mounts)
            case "COPY":
                _copy(step.text, image, images)
            case "ENV":
                words = re.findall(r"(\w+)=(\S+)", step.text)
                new = {name: _expanded(value, image.environment) for name, value in words}
                return replace(image, environment={**image.environment, **new})
            case "WORKDIR":
                (image.root / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
                return replace(image, folder=step.text)
            case "USER":
                return replace(image, user=step.text)
            case "ENTRYPOINT" | "CMD":
                return replace(image, command={**image.command, step.instruction: json.loads(step.text)})
            case _ if step.instruction not in IGNORED:
                raise NotImplementedError(f"{step.instruction} {step.text}")
        return image

    def _mounts(self, text: str) -> tuple[list[str], str]:
        mounts: list[str] = []
        while match := re.match(r"--mount=(\S+) ", text):
            options = dict(option.split("=", 1) for option in match[1].split(","))
            if options["type"] != "secret":
                raise NotImplementedError(match[0])
            if options["id"] in self.secrets:
                target = options.get("target", f"/run/secrets/{options['id']}")
                mounts += ["--ro-bind", str(self.secrets[options["id"]]), target]
            text = text[match.end() :]
        return mounts, text


def debian(folder: Path) -> Image:
    """Return a fresh Debian with Python, as the base image."""
    include = "ca-certificates,python3,python3-venv"
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={include}", "bookworm", str(folder)], check=True)
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    return Image(folder)


@contextmanager
def _without_mount_points(mounts: Sequence[str], root: Path) -> Iterator[None]:
    """Remove the empty files that mounts leave in an image."""
    places = [root / target.lstrip("/") for target in mounts[2::3]]
    new = [place for place in places if not place.exists()]
    yield
    for place in new:
        place.unlink()


def _copy(text: str, image: Image, images: Mapping[str, Image]) -> None:
    words = text.split()
    source = ROOT
    if words[0].startswith("--from="):
        source = images[words.pop(0).removeprefix("--from=")].root
    target = image.root / os.path.normpath(os.path.join(image.folder, words[-1])).lstrip("/")
    for word in words[:-1]:
        path = source / word.lstrip("/")
        (target if path.is_dir() or words[-1].endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        what = f"{path}/." if path.is_dir() else str(path)
        subprocess.run(["cp", "--archive", "--no-preserve=ownership", what, str(target)], check=True)


def _expanded(value: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: environment[match[1]], value)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Build the target that the command line names."""
    parser = argparse.ArgumentParser(description="Run the steps of the Dockerfile.")
    parser.add_argument("target")
    parser.add_argument("folder", type=Path, help="new folder for the roots")
    parser.add_argument("--base", type=Path, help="root to start from instead of a new Debian")
    parser.add_argument("--secret", action="append", default=[], metavar="ID=FILE", help="file of a secret mount")
    parser.add_argument(
        "--read", action="append", default=[], metavar="PATH", help="additional path that the steps may read"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    base = Image(args.base) if args.base else debian(args.folder / "base")
    secrets = {name: Path(file).absolute() for name, _, file in (entry.partition("=") for entry in args.secret)}
    binds = [text for path in args.read for text in ("--ro-bind", path, path)]
    builder = Builder(args.folder.absolute(), base, secrets, binds)
    image = builder.build(args.target, (ROOT / "Dockerfile").read_text())
    command = [*image.command.get("ENTRYPOINT", []), *image.command.get("CMD", [])]
    _say(f"as user {image.user}: {' '.join(command)}")
    builder.run(image, command)


if __name__ == "__main__":
    main()
