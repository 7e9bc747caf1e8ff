"""The samples of a run on the disk: each is there as soon as it is finished, and an interrupted run goes on from them.

A file of JSON lines. The first says which model, prompts and settings the samples are of; samples of others are
never taken for this run's.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dylo_moe.errors import ConfigError
from dylo_moe.evaluation.generation import Sample


class SampleFile:
    """Samples of one run.

    Args:
        path: The file; made, with its folder, where it is not there.
        identity: What the samples depend on, as JSON has it.

    Attributes:
        samples: All that there are, by task and number.

    Raises:
        ConfigError: The file is of another run, or no file of samples.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.samples: dict[tuple[str, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        # a run that was killed while it wrote leaves part of a line: that sample is made anew
        lines = whole[: whole.rfind(b"\n") + 1].splitlines()
        if not whole:
            self._write([json.dumps(identity)])
            return
        self._check(lines[0] if lines else whole, identity)
        for number, line in enumerate(lines[1:], start=2):
            try:
                sample = Sample.model_validate_json(line)
            except ValidationError as error:
                raise ConfigError(f"--output: {path} line {number} is no sample; remove the file") from error
            self.samples[sample.task_id, sample.index] = sample
        os.truncate(path, whole.rfind(b"\n") + 1)

    def append(self, samples: Sequence[Sample]) -> None:
        """Adds samples; they are on the disk when this returns."""
        self._write([sample.model_dump_json() for sample in samples])
        self.samples.update({(sample.task_id, sample.index): sample for sample in samples})

    def _write(self, lines: Sequence[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _check(self, header: bytes, identity: Mapping[str, Any]) -> None:
        try:
            found = json.loads(header)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"--output: {self.path} is no file of samples; name another --output")
        for key, value in identity.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"--output: {self.path} holds samples of another run: its {key} is {found.get(key)!r}, and this "
                    f"run's is {value!r}; name another --output, or remove that file to begin anew"
                )
