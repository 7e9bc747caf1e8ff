"""The file of a run's samples. Each is on disk as soon as it is finished, so that an interrupted run can resume.

The file holds JSON lines. The first identifies model, prompts and settings; a file of another run is refused.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from dylo_moe.errors import ConfigError
from dylo_moe.evaluation.generation import Sample


class SampleFile:
    """Samples of one run, in memory and on disk.

    Args:
        path: The file; created with its folder if it does not exist.
        identity: All that the samples depend on, as JSON values.

    Attributes:
        path: The file.
        samples: All samples so far, by task and number.

    Raises:
        ConfigError: The file belongs to another run, or is not a file of samples.
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path = path
        self.samples: dict[tuple[str, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        # a run that was killed while writing leaves part of a line: that sample is generated again
        lines = whole[: whole.rfind(b"\n") + 1].splitlines()
        if not whole:
            self._write([json.dumps(identity)])
            return
        self._check(lines[0] if lines else whole, identity)
        for number, line in enumerate(lines[1:], start=2):
            try:
                sample = Sample.model_validate_json(line)
            except ValidationError as error:
                raise ConfigError(f"`output`: {path} line {number} is not a sample; remove the file") from error
            self.samples[sample.task_id, sample.index] = sample
        os.truncate(path, whole.rfind(b"\n") + 1)

    def append(self, samples: Sequence[Sample]) -> None:
        """Append samples to the file; they are on disk when this returns."""
        self._write([sample.model_dump_json() for sample in samples])
        self.samples.update({(sample.task_id, sample.index): sample for sample in samples})

    def _write(self, lines: Sequence[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _check(self, header: bytes, identity: Mapping[str, object]) -> None:
        try:
            found = json.loads(header)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"`output`: {self.path} is not a file of samples; choose another `output`")
        for key, value in identity.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"`output`: {self.path} holds samples of another run: its {key} is {found.get(key)!r}, and this "
                    f"run's is {value!r}; choose another `output`, or remove that file to start again"
                )
