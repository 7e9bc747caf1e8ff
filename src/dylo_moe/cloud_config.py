"""The flags of ``submit``: which machines, where, with what, for how long.

Part of the configuration. What is not given is looked up in the environment and in gcloud's configuration by
``cloud/settings.py``; what is wrong whatever those say is refused here.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from dylo_moe.errors import ConfigError, did_you_mean
from dylo_moe.flags import flag as _flag
from dylo_moe.flags import require as _require
from dylo_moe.flags import split_names

MACHINES = {"a3-highgpu-1g": "NVIDIA_H100_80GB", "a2-highgpu-1g": "NVIDIA_TESLA_A100"}
"""The machine types that a job can have, each with one GPU of this kind."""

LIKE_A_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}")
_ACCOUNT = re.compile(r"[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com")


@dataclass
class SubmitArguments:
    """The job; what follows ``--`` are the flags of ``train``."""

    _argument_group_name: ClassVar[str] = "job"

    project: str | None = _flag(
        default=None, help="Google Cloud project; GOOGLE_CLOUD_PROJECT or gcloud's if not given."
    )
    region: str | None = _flag(
        default=None, help="Region, like us-central1; GOOGLE_CLOUD_REGION or gcloud's if not given."
    )
    bucket: str | None = _flag(
        default=None, help="Cloud Storage bucket for checkpoints, model and logs; DYLO_MOE_BUCKET if not given."
    )
    image: str | None = _flag(
        default=None, help="Image that build_and_push.sh has pushed; DYLO_MOE_IMAGE if not given."
    )
    machine_type: str = _flag(default="a3-highgpu-1g", help="a3-highgpu-1g (one H100) or a2-highgpu-1g (one A100).")
    replicas: int = _flag(default=1, help="Machines to train on together.")
    spot: bool = _flag(default=True, help="Machines that can be taken back at any time, for a fraction of the price.")
    timeout_hours: float = _flag(default=24.0, help="The job is ended after so many hours.")
    disk_gb: int = _flag(default=200, help="Boot disk of each machine in GB: image, base model and datasets.")
    service_account: str | None = _flag(
        default=None, help="Account that the job acts as: NAME@PROJECT.iam.gserviceaccount.com."
    )
    job_name: str = _flag(default="dylora-moe", help="Name of the job, and of its folder in the bucket.")
    labels: list[str] | None = _flag(default=None, help="KEY=VALUE labels of the job, for bills.")
    env: list[str] | None = _flag(default=None, help="NAME=VALUE variables of the container; everybody can read them.")
    secrets: list[str] | None = _flag(
        default=None, help="NAME=SECRET or NAME=SECRET:VERSION: variables that the job reads from Secret Manager."
    )
    dry_run: bool = _flag(default=False, help="Print the request as JSON and stop; nothing is asked of the cloud.")
    watch: bool = _flag(default=False, help="Wait for the job's end and tell its states.")

    def __post_init__(self) -> None:
        if self.machine_type not in MACHINES:
            known = ", ".join(MACHINES)
            hint = did_you_mean(self.machine_type, MACHINES)
            raise ConfigError(f"--machine_type must be one of {known}, got {self.machine_type!r}{hint}")
        _require(self.replicas >= 1, "replicas", "at least 1", self.replicas)
        _require(0 < self.timeout_hours <= 168, "timeout_hours", "above 0 and up to 168", self.timeout_hours)
        _require(self.disk_gb >= 100, "disk_gb", "at least 100", self.disk_gb)
        named = re.fullmatch(r"[a-z0-9][a-z0-9-]{0,99}", self.job_name)
        _require(bool(named), "job_name", "small letters, digits and -", repr(self.job_name))
        account = self.service_account
        ok = account is None or _ACCOUNT.fullmatch(account)
        _require(bool(ok), "service_account", "NAME@PROJECT.iam.gserviceaccount.com", repr(account))
        self.labels = _entries(self.labels)
        for label in self.labels:
            _require(
                bool(_LABEL.fullmatch(label)), "labels", "KEY=VALUE in small letters, digits, - and _", repr(label)
            )
        self.secrets = _entries(self.secrets)
        for entry in self.secrets:
            # the value is not quoted: it may be the secret itself
            ok = re.fullmatch(r"[A-Za-z_]\w*=[A-Za-z0-9_-]{1,255}(:(latest|\d+))?", entry)
            _require(bool(ok), "secrets", "NAME=SECRET or NAME=SECRET:VERSION", "another form")
        self._check_env()

    def _check_env(self) -> None:
        for entry in self.env or []:
            name, separator, _ = entry.partition("=")
            _require(bool(separator) and name.isidentifier(), "env", "NAME=VALUE", "another form")
            if LIKE_A_SECRET.search(name):
                raise ConfigError(
                    f"--env {name}=... would show a secret to everybody who may look at the job; put it into Secret "
                    f"Manager, and give --secrets {name}=ITS_NAME"
                )

    @property
    def gpu(self) -> str:
        """The accelerator of each machine, as Vertex AI calls it."""
        return MACHINES[self.machine_type]


def _entries(given: list[str] | None) -> list[str]:
    return [entry for text in given or [] for entry in split_names(text)]
