"""``entrypoint``: the program of a container: detect the platform, then train or benchmark with its settings.

The flags after ``--train`` or ``--benchmark`` are those of that program. With one process the program runs in this
process, so signals and exit codes are its own. With several it runs under torchrun's launcher, and the exit code is
that of the first process to fail. After an interruption the same command resumes.
"""

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dylo_moe.cloud import BARE, Platform, detect, load_secrets
from dylo_moe.errors import EXIT_STOPPED, EXIT_USER_ERROR, ConfigError

PROGRAMS = ("train", "benchmark")
_SHUTDOWN_SECONDS = 600
"""Time in which the processes may finish their step and save; the platform may kill them sooner."""
_USAGE = """usage: {program} --train [--flag value ...]
       {program} --benchmark [--flag value ...]

Runs train or benchmark with these flags and the settings of the platform: Vertex AI, Vast.ai, a container, or none.
NPROC_PER_NODE is the number of training processes on this machine; by default one for each GPU.
"""


def main(arguments: Sequence[str], program: str = "dylora-moe entrypoint") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE.format(program=program))
        return 0 if arguments else EXIT_USER_ERROR
    verb = arguments[0].removeprefix("--")
    if verb not in PROGRAMS or not arguments[0].startswith("--"):
        raise ConfigError(f"the first flag must be --train or --benchmark, got {arguments[0]!r}; see {program} --help")
    platform = detect(os.environ)
    for line in platform.describe():
        _print(line)
    os.environ.update(platform.settings)
    if platform.tensorboard_dir is not None:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(platform.tensorboard_dir))
    os.environ.update(load_secrets(os.environ))
    if verb == "benchmark":
        return _benchmark(platform, arguments[1:])
    signal.signal(signal.SIGTERM, _exit_stopped)
    return _train(platform, [*platform_flags(platform, arguments[1:]), *arguments[1:]])


def platform_flags(platform: Platform, given: Sequence[str]) -> list[str]:
    """Return the flags of ``train`` that the platform sets, except those in ``given``."""
    names = _names(given)
    flags: dict[str, str] = {}
    if platform.checkpoint_dir is not None:
        flags["output_dir"] = str(platform.checkpoint_dir)
    if platform.name != BARE and not names & {"overwrite_output_dir", "wandb_checkpoint_artifact"}:
        flags["resume_from_checkpoint"] = "auto"  # a platform restarts the same command
    if platform.cores is not None:
        flags["preprocessing_workers"] = str(platform.cores)
    return [text for name, value in flags.items() if name not in names for text in (f"--{name}", value)]


def benchmark_flags(platform: Platform, given: Sequence[str]) -> list[str]:
    """Return the flags of ``benchmark`` that the platform sets, except those in ``given``."""
    names, folder = _names(given), platform.checkpoint_dir
    if folder is None or "compare" in names:
        return []
    flags = [] if "output" in names else ["--output", str(folder / "benchmark.json")]
    if not names & {"trained_model", "base_model", "wandb_artifact"}:
        flags += ["--trained_model", str(folder / "best_model")]
    return flags


def _names(flags: Sequence[str]) -> set[str]:
    return {text.partition("=")[0].lstrip("-").replace("-", "_") for text in flags if text.startswith("--")}


def _benchmark(platform: Platform, flags: Sequence[str]) -> int:
    """Benchmark on the first machine, and return 0 at once on every other."""
    if platform.cluster is not None and platform.cluster.rank > 0:
        return 0
    flags = [*benchmark_flags(platform, flags), *flags]
    code: int = importlib.import_module("dylo_moe.commands.benchmark").main(flags, "entrypoint.py --benchmark")
    return code


def _train(platform: Platform, flags: Sequence[str]) -> int:
    from dylo_moe.commands import train
    from dylo_moe.config import TrainConfig, parse

    # parsed here too, so that a mistake is reported once and before any launch
    parsed = parse(TrainConfig, "entrypoint.py --train", "", flags)
    if platform.is_bucket(Path(parsed.training.output_dir)) and "save_in_place" not in _names(flags):
        flags = [*flags, "--save_in_place"]
        _print(f"{parsed.training.output_dir} is on object storage: --save_in_place")
    processes = _count_processes()
    if (platform.cluster is None and processes == 1) or parsed.run.dry_run:
        code = train.main(flags, "entrypoint.py --train")
    else:
        code = _launch(platform, processes, flags)
    first = platform.cluster is None or platform.cluster.rank == 0
    if code == 0 and first and platform.model_dir is not None and not parsed.run.dry_run:
        _publish(Path(parsed.training.output_dir), platform.model_dir)
    return code


def _count_processes() -> int:
    """Return the number of training processes on this machine.

    Raises:
        ConfigError: ``NPROC_PER_NODE`` is not a positive number.
    """
    import torch

    if "WORLD_SIZE" in os.environ:
        return 1  # a launcher started this process, and others
    given = os.environ.get("NPROC_PER_NODE")
    if given is None:
        return max(1, torch.accelerator.device_count())
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"NPROC_PER_NODE must be a number of processes, at least 1, got {given!r}")
    return int(given)


def _launch(platform: Platform, processes: int, flags: Sequence[str]) -> int:
    """Train in several processes on one or more machines, and return the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    if platform.cores is not None and "OMP_NUM_THREADS" in platform.settings:
        os.environ["OMP_NUM_THREADS"] = str(max(1, platform.cores // processes))
    cluster = platform.cluster
    options = (
        ["--standalone", f"--nproc-per-node={processes}"] if cluster is None else cluster.launch_arguments(processes)
    )
    options.append(f"--shutdown-timeout={_SHUTDOWN_SECONDS}")
    config, command, command_arguments = config_from_args(parse_args([*options, "-m", "dylo_moe", "train", *flags]))
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = int(failure.exitcode)
        return code if code > 0 else 128 - code  # 128 + n for signal n, as in a shell
    except SignalException as stop:
        # the launcher forwarded the signal and waited, but hides the exit codes
        return EXIT_STOPPED if stop.sigval == signal.SIGTERM else 128 + stop.sigval
    return 0


def _publish(output: Path, model_dir: Path) -> None:
    """Copy the finished mixture to the folder in which the platform expects the model."""
    from dylo_moe.commands.train import BEST_MODEL
    from dylo_moe.core import DESCRIPTION_FILE
    from dylo_moe.durable import atomic_directory

    with atomic_directory(model_dir, marker=DESCRIPTION_FILE, in_place=True) as folder:
        shutil.copytree(output / BEST_MODEL, folder, dirs_exist_ok=True)
    _print(f"Copied {output / BEST_MODEL} to {model_dir}")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _exit_stopped(number: int, frame: FrameType | None) -> NoReturn:
    """Exit with the code that asks for a restart: outside the training loop there is nothing to save."""
    raise SystemExit(EXIT_STOPPED)
