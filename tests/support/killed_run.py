"""A training run that is killed repeatedly, for ``test_killed.py`` and for longer trials that are started manually:

    python -m tests.support.killed_run 40        kills a run 40 times and compares it with an uninterrupted one
    python -m tests.support.killed_run 40 bucket the same if folders cannot be renamed, with --save_in_place

Half of the kills come at a random time, the others right before a random file operation that writes, renames or
removes a checkpoint.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
STEPS = 24


def arguments(base: Path, output: Path, data: Path) -> list[str]:
    """Return the flags of a short run with every source of randomness: dropout, several experts, several epochs."""
    flags = {
        "model_name": base,
        "datasets": f"one={data / 'one.jsonl'},two={data / 'two.jsonl'}",
        "max_seq_length": 48,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "lora_r": 4,
        "lora_dropout": 0.3,
        "learning_rate": 1e-2,
        "save_minutes": 1e-4,
        "save_total_limit": 2,
        "output_dir": output,
        "resume_from_checkpoint": "auto",
        "preprocessing_workers": 1,
    }
    return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))] + ["--interleaved_sampling"]


def write_data(folder: Path) -> None:
    """Write two small datasets."""
    for name, count in (("one", 40), ("two", 25)):
        rows = [{"prompt": f"{name} {n}\n", "response": f"the answer {n * n} of {name}\n"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(flags: list[str], die_at: int | None, bucket: Path | None, done: Any) -> None:
    """Run the program in this process; with ``die_at``, kill it right before the file operation of that index."""
    import torch

    from dylo_moe.cli import main
    from tests.support import flat_bucket

    torch.set_num_threads(1)
    if bucket is not None:
        flat_bucket.install(bucket)
    if die_at is not None:
        remaining = [die_at]

        def count(event: str, values: tuple[Any, ...]) -> None:
            if event in CHANGES and any(part in str(values[0]) for part in ("checkpoint-", "best_model")):
                remaining[0] -= 1
                if remaining[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        code = main(["train", *flags])
    done.value = code


def started(flags: list[str], die_at: int | None = None, bucket: Path | None = None) -> tuple[BaseProcess, Any]:
    """Start a process that trains; its fork server has the libraries loaded, so it begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "datasets", "dylo_moe.commands.train"])
    done = context.Value("i", -1)
    process = context.Process(target=train, args=(flags, die_at, bucket, done))
    process.start()
    return process, done


def killed_run(kills: int, folder: Path, seed: int = 0, *, on_bucket: bool = False) -> dict[str, int]:
    """Kill a run ``kills`` times, let it end, and compare it with an uninterrupted one.

    Returns:
        Number of kills by the clock, of kills before file operations, and of runs that ended before their kill.
    """
    from tests.support.tiny_folder import write_tiny_folder

    base = write_tiny_folder(folder / "base")
    write_data(folder)
    start = time.monotonic()
    process, done = started(arguments(base, folder / "uninterrupted", folder))
    process.join()
    assert done.value == 0
    duration = time.monotonic() - start
    rng = random.Random(seed)
    counts = {"by the clock": 0, "in file operations": 0, "the run was faster": 0}
    flags = arguments(base, folder / "killed", folder)
    bucket = None
    if on_bucket:
        flags, bucket = [*flags, "--save_in_place"], folder / "killed"
    while counts["by the clock"] + counts["in file operations"] < kills:
        inside = rng.random() < 0.5
        process, done = started(flags, rng.randrange(60) if inside else None, bucket)
        process.join(None if inside else rng.random() * duration)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            counts["in file operations" if inside else "by the clock"] += 1
        else:
            assert done.value == 0, "a resumed run must not fail"
            counts["the run was faster"] += 1
            # start again, so that every kill hits a run with work left
            (folder / "killed").rename(folder / f"finished-{counts['the run was faster']}")
            same(folder / "uninterrupted", folder / f"finished-{counts['the run was faster']}")
    process, done = started(flags, bucket=bucket)
    process.join()
    assert done.value == 0
    same(folder / "uninterrupted", folder / "killed")
    return counts


def same(one: Path, other: Path) -> None:
    """Check that two runs ended with the same bits: the mixture, and the state of the last checkpoint."""
    import torch

    for folder in ("best_model", f"checkpoint-{STEPS}"):
        names = sorted(path.relative_to(one) for path in (one / folder).rglob("*.safetensors"))
        assert len(names) == 5
        for name in names:
            ours, theirs = load_file(one / name), load_file(other / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    optimizers = [torch.load(run / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True) for run in (one, other)]
    ours, theirs = (optimizer["state"] for optimizer in optimizers)
    assert all(torch.equal(ours[key][name], theirs[key][name]) for key in ours for name in ours[key])


def main() -> None:
    """Run the trial that the command line asks for."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        counts = killed_run(kills, Path(folder), on_bucket="bucket" in sys.argv[2:])
    sys.stdout.write(f"bit-equal after {kills} kills: {counts}\n")


if __name__ == "__main__":
    main()
