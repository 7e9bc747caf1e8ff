"""The flags of ``submit``: which machines, where, with what, for how long.

``cloud/settings.py`` looks up in the environment and in gcloud's configuration what is not given here. Values that are
wrong whatever those say are refused here.
"""

import re
from dataclasses import dataclass

from dylo_moe.config.parser import Group, flag, require, split_names
from dylo_moe.errors import ConfigError

MACHINES = {"a3-highgpu-1g": "NVIDIA_H100_80GB", "a2-highgpu-1g": "NVIDIA_TESLA_A100"}
"""The machine types that a job can have, each with one GPU of this kind."""

LIKE_A_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}")
_SECRET = re.compile(r"[A-Za-z_]\w*=[A-Za-z0-9_-]{1,255}(:(latest|\d+))?")


@dataclass
class SubmitArgs(Group):
    """The job. The flags of ``train`` follow after ``--``."""

    title = "job"

    project: str | None = flag(None, "Google Cloud project; GOOGLE_CLOUD_PROJECT or gcloud's if not given.")
    region: str | None = flag(None, "Region, like us-central1; GOOGLE_CLOUD_REGION or gcloud's if not given.")
    bucket: str | None = flag(
        None, "Cloud Storage bucket for checkpoints, model and logs; DYLO_MOE_BUCKET if not given."
    )
    image: str | None = flag(None, "Image that build_and_push.sh has pushed; DYLO_MOE_IMAGE if not given.")
    machine_type: str = flag(
        "a3-highgpu-1g", "a3-highgpu-1g (one H100) or a2-highgpu-1g (one A100).", choices=tuple(MACHINES)
    )
    replicas: int = flag(1, "Machines to train on together.", ge=1)
    spot: bool = flag(True, "Machines that can be taken back at any time, for a fraction of the price.")
    timeout_hours: float = flag(24.0, "The job is ended after this many hours.", gt=0, le=168)
    disk_gb: int = flag(200, "Boot disk of each machine in GB: image, base model and datasets.", ge=100)
    service_account: str | None = flag(
        None,
        "Account that the job acts as: NAME@PROJECT.iam.gserviceaccount.com.",
        pattern=r"[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com",
        wording="NAME@PROJECT.iam.gserviceaccount.com",
    )
    job_name: str = flag(
        "dylora-moe",
        "Name of the job, and of its folder in the bucket.",
        pattern=r"[a-z0-9][a-z0-9-]{0,99}",
        wording="small letters, digits and -",
    )
    labels: list[str] | None = flag(None, "KEY=VALUE labels of the job, for bills.")
    env: list[str] | None = flag(None, "NAME=VALUE variables of the container; everybody can read them.")
    secrets: list[str] | None = flag(
        None, "NAME=SECRET or NAME=SECRET:VERSION: variables that the job reads from Secret Manager."
    )
    dry_run: bool = flag(False, "Print the request as JSON and stop; nothing is asked of the cloud.")
    watch: bool = flag(False, "Wait for the job's end and print its states.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = [label for text in self.labels or [] for label in split_names(text)]
        for label in self.labels:
            ok = _LABEL.fullmatch(label) is not None
            require(ok, "labels", "KEY=VALUE in small letters, digits, - and _", repr(label))
        self.secrets = [secret for text in self.secrets or [] for secret in split_names(text)]
        for secret in self.secrets:
            # the value is not quoted: it may be the secret itself
            ok = _SECRET.fullmatch(secret) is not None
            require(ok, "secrets", "NAME=SECRET or NAME=SECRET:VERSION", "another form")
        for variable in self.env or []:
            name, separator, _ = variable.partition("=")
            require(bool(separator) and name.isidentifier(), "env", "NAME=VALUE", "another form")
            if LIKE_A_SECRET.search(name):
                raise ConfigError(
                    f"--env {name}=... would show a secret to everybody who may look at the job; put it into Secret "
                    f"Manager, and give --secrets {name}=ITS_NAME"
                )

    @property
    def gpu(self) -> str:
        """The accelerator of each machine, in the words of Vertex AI."""
        return MACHINES[self.machine_type]
