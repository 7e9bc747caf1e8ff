"""``entrypoint``: what a container runs. Finds out what it runs on, and trains or benchmarks as that wants it.

The flags after ``--train`` or ``--benchmark`` are those of the same programs. One process runs the program itself, so
signals and exit codes are the program's own. Several processes run under torchrun's launcher; what the first of them
to fail exited with is then the exit code. Wherever it was stopped, starting the same command again goes on.
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

from dylo_moe.cloud.platform import BARE, Platform, detect
from dylo_moe.cloud.secrets import load_secrets
from dylo_moe.errors import EXIT_USER_ERROR, ConfigError

PROGRAMS = ("train", "benchmark")
SHUTDOWN_SECONDS = 600
"""How long the launcher waits for a step to end and its checkpoint to be written; who stopped us may kill us sooner."""
_USAGE = """usage: {program} --train [--flag value ...]
       {program} --benchmark [--flag value ...]

Runs train or benchmark with these flags, as the platform wants it: Vertex AI, Vast.ai, a container, or none of them.
NPROC_PER_NODE is the number of processes to train with on this machine; as many as it has GPUs if not set.
"""


def main(arguments: Sequence[str], program: str = "dylora-moe entrypoint") -> int:
    """Runs the program; returns its exit code.

    Raises:
        DyLoRAError: The user can mend it.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE.format(program=program))
        return 0 if arguments else EXIT_USER_ERROR
    what = arguments[0].removeprefix("--")
    if what not in PROGRAMS or not arguments[0].startswith("--"):
        raise ConfigError(f"the first flag must be --train or --benchmark, got {arguments[0]!r}; see {program} --help")
    platform = detect(os.environ)
    for line in platform.describe():
        _say(line)
    os.environ.update(platform.settings)
    if platform.tensorboard_dir is not None:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(platform.tensorboard_dir))
    os.environ.update(load_secrets(os.environ))
    if what == "benchmark":
        return _benchmark(platform, arguments[1:])
    signal.signal(signal.SIGTERM, _stopped_outside_of_training)
    return _train(platform, [*platform_flags(platform, arguments[1:]), *arguments[1:]])


def platform_flags(platform: Platform, given: Sequence[str]) -> list[str]:
    """The flags of ``train`` that the platform decides, but for those that are given."""
    names = _names(given)
    flags: dict[str, str] = {}
    if platform.checkpoint_dir is not None:
        flags["output_dir"] = str(platform.checkpoint_dir)
    if platform.name != BARE and not names & {"overwrite_output_dir", "wandb_checkpoint_artifact"}:
        flags["resume_from_checkpoint"] = "auto"  # a container is started again by somebody who cannot be asked
    if platform.cores is not None:
        flags["preprocessing_workers"] = str(platform.cores)
    return [text for name, value in flags.items() if name not in names for text in (f"--{name}", value)]


def benchmark_flags(platform: Platform, given: Sequence[str]) -> list[str]:
    """The flags of ``benchmark`` that the platform decides, but for those that are given."""
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
    """Benchmarks on the first machine; the others have nothing to do."""
    if platform.cluster is not None and platform.cluster.rank > 0:
        return 0
    flags = [*benchmark_flags(platform, flags), *flags]
    code: int = importlib.import_module("dylo_moe.programs.benchmark").main(flags, "entrypoint.py --benchmark")
    return code


def _train(platform: Platform, flags: Sequence[str]) -> int:
    from dylo_moe.config import TrainConfig
    from dylo_moe.flags import parse
    from dylo_moe.programs import train

    # read here as well: a mistake is told once, before any process is launched
    parsed = parse(TrainConfig, "entrypoint.py --train", "", flags)
    if platform.is_bucket(Path(parsed.training.output_dir)) and "save_in_place" not in _names(flags):
        flags = [*flags, "--save_in_place"]
        _say(f"{parsed.training.output_dir} is on object storage: --save_in_place")
    processes = _processes_here()
    if (platform.cluster is None and processes == 1) or parsed.run.dry_run:
        code = train.main(flags, "entrypoint.py --train")
    else:
        code = _launched(platform, processes, flags)
    first = platform.cluster is None or platform.cluster.rank == 0
    if code == 0 and first and platform.model_dir is not None and not parsed.run.dry_run:
        _publish(Path(parsed.training.output_dir), platform.model_dir)
    return code


def _processes_here() -> int:
    import torch

    if "WORLD_SIZE" in os.environ:
        return 1  # somebody else's launcher has started this process as one of several
    asked = os.environ.get("NPROC_PER_NODE")
    if asked is None:
        return max(1, torch.accelerator.device_count())
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"NPROC_PER_NODE must be a number of processes, at least 1, got {asked!r}")
    return int(asked)


def _launched(platform: Platform, processes: int, flags: Sequence[str]) -> int:
    """Trains in several processes, on one machine or on several."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    from dylo_moe.training.interruption import EXIT_STOPPED

    if platform.cores is not None and "OMP_NUM_THREADS" in platform.settings:
        os.environ["OMP_NUM_THREADS"] = str(max(1, platform.cores // processes))
    cluster = platform.cluster
    where = (
        ["--standalone", f"--nproc-per-node={processes}"] if cluster is None else cluster.launch_arguments(processes)
    )
    where.append(f"--shutdown-timeout={SHUTDOWN_SECONDS}")
    config, command, command_arguments = config_from_args(parse_args([*where, "-m", "dylo_moe", "train", *flags]))
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = int(failure.exitcode)
        return code if code > 0 else 128 - code  # a process that a signal ended, as a shell says it
    except SignalException as stop:
        # the launcher has passed it on and waited; what the processes exited with it does not say
        return EXIT_STOPPED if stop.sigval == signal.SIGTERM else 128 + stop.sigval
    return 0


def _publish(output: Path, model_dir: Path) -> None:
    """Copies the finished mixture to where the platform looks for it."""
    from dylo_moe.core.checkpoint import DESCRIPTION_FILE, atomic_directory
    from dylo_moe.programs.train import BEST_MODEL

    with atomic_directory(model_dir, marker=DESCRIPTION_FILE, in_place=True) as folder:
        shutil.copytree(output / BEST_MODEL, folder, dirs_exist_ok=True)
    _say(f"Copied {output / BEST_MODEL} to {model_dir}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _stopped_outside_of_training(number: int, frame: FrameType | None) -> NoReturn:
    """Before and after the steps there is nothing to save: end at once, and say that starting again goes on."""
    from dylo_moe.training.interruption import EXIT_STOPPED

    raise SystemExit(EXIT_STOPPED)
