"""A custom job on Vertex AI: building the request, sending it, and following the job.

The request is the JSON of the REST interface, which a dry run shows; Google's client sends it.
https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from dylo_moe.cloud.secrets import VARIABLE
from dylo_moe.cloud.settings import Settings
from dylo_moe.errors import CloudError, first_line

if TYPE_CHECKING:
    from google.cloud.aiplatform_v1 import JobServiceClient

POLL_SECONDS = 30
_PATIENCE_SECONDS = 600
"""Time in seconds to wait for the network to come back while a job is followed."""
_ENDED = ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED")
_SUCCEEDED = _ENDED[0]


@dataclass(frozen=True)
class JobSpec:
    """Description of a training job.

    Attributes:
        name: Name of the job, and of its folder in the bucket.
        machine_type: Vertex AI's machine type, such as ``a3-highgpu-1g``.
        accelerator_type: Vertex AI's name of the GPU; each machine has one.
        replicas: Number of machines.
        spot: Whether to use spot machines, which can be taken back at any time.
        timeout_hours: Time in hours after which the job is ended.
        disk_gb: Size of each machine's boot disk in GB.
        service_account: Account that the job acts as; None for the project's default.
        labels: Labels of the job.
        env: Environment variables of the container, which everybody with access to the job can read.
        secrets: ``SECRET`` or ``SECRET:VERSION`` of Secret Manager for each environment variable that is a secret.
    """

    name: str
    machine_type: str
    accelerator_type: str
    replicas: int = 1
    spot: bool = True
    timeout_hours: float = 24.0
    disk_gb: int = 200
    service_account: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)

    @property
    def machine_hours(self) -> float:
        """The most machine-hours that the job can use."""
        return self.replicas * self.timeout_hours


class JobRequest(TypedDict):
    """Request to create a job, ready for JSON, with the names of Google's API."""

    parent: str
    customJob: Mapping[str, object]


def create_request(job: JobSpec, settings: Settings, training: Sequence[str]) -> JobRequest:
    """Return the CreateCustomJob request: ``parent`` and ``customJob``, ready for JSON.

    Args:
        job: The job.
        settings: Project, region, bucket and image.
        training: Arguments of the container's training program.
    """
    scheduling: dict[str, object] = {
        "timeout": f"{round(job.timeout_hours * 3600)}s",
        "restartJobOnWorkerRestart": True,
        "strategy": "SPOT" if job.spot else "STANDARD",
    }
    spec: dict[str, object] = {
        # the leading machine has a pool of its own
        "workerPoolSpecs": [_pool(job, settings, training, replicas) for replicas in (1, job.replicas - 1) if replicas],
        "scheduling": scheduling,
        "baseOutputDirectory": {"outputUriPrefix": f"gs://{settings.bucket}/{job.name}"},
    }
    if job.service_account is not None:
        spec["serviceAccount"] = job.service_account
    custom_job = {"displayName": job.name, "labels": {"program": "dylora-moe", **job.labels}, "jobSpec": spec}
    return {"parent": f"projects/{settings.project}/locations/{settings.region}", "customJob": custom_job}


def connect(region: str) -> "JobServiceClient":
    """Return Google's client for a region, with this machine's credentials.

    Raises:
        CloudError: The client is not installed, or there are no credentials.
    """
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.aiplatform_v1 import JobServiceClient
    except ImportError as error:
        raise CloudError("submit needs google-cloud-aiplatform; run: pip install 'dylora-moe[vertex]'") from error
    try:
        endpoint = f"{region}-aiplatform.googleapis.com"
        return JobServiceClient(transport="rest", client_options={"api_endpoint": endpoint})
    except DefaultCredentialsError as error:
        raise CloudError(
            "this machine has no credentials for Google Cloud; run: gcloud auth application-default login"
        ) from error


def send(request: JobRequest, client: "JobServiceClient") -> str:
    """Create a job from a request of ``create_request``; return its resource name.

    Raises:
        CloudError: Vertex AI refused the request or cannot be reached.
    """
    from google.cloud.aiplatform_v1 import CustomJob
    from google.protobuf.json_format import ParseDict

    job = CustomJob()
    ParseDict(request["customJob"], CustomJob.pb(job))
    try:
        name: str = client.create_custom_job(parent=request["parent"], custom_job=job).name
    except _api_errors() as error:
        raise CloudError(f"Vertex AI did not accept the job: {first_line(error)}") from error
    return name


def watch(
    name: str,
    client: "JobServiceClient",
    report: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[bool, float]:
    """Follow a job to its end.

    Args:
        name: Resource name of the job.
        client: Google's client.
        report: Function that gets a line for each new state.
        sleep: Function that waits for a number of seconds.

    Returns:
        Whether the job succeeded, and the hours from its start to its end; 0 if it never started.

    Raises:
        CloudError: Vertex AI cannot be asked any longer; the job itself is not affected.
    """
    from google.api_core.retry import Retry

    previous = None
    while True:
        try:
            job = client.get_custom_job(name=name, retry=Retry(timeout=_PATIENCE_SECONDS))
        except _api_errors() as error:
            raise CloudError(
                f"the job {name} continues, but its state cannot be read: {first_line(error)}; see Google's console"
            ) from error
        state = job.state.name
        if state != previous:
            reason = f": {first_line(Exception(job.error.message))}" if job.error.message else ""
            report(f"{state.removeprefix('JOB_STATE_').lower()}{reason}")
            previous = state
        if state in _ENDED:
            hours = (job.end_time - job.start_time).total_seconds() / 3600 if job.start_time and job.end_time else 0.0
            return state == _SUCCEEDED, hours
        sleep(POLL_SECONDS)


def _api_errors() -> tuple[type[Exception], ...]:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    return GoogleAPIError, GoogleAuthError, RequestException


def _pool(job: JobSpec, settings: Settings, training: Sequence[str], replicas: int) -> dict[str, object]:
    container: dict[str, object] = {"imageUri": settings.image, "args": ["--train", *training]}
    variables = dict(job.env)
    if job.secrets:
        references = []
        for name, reference in job.secrets.items():
            secret, _, version = reference.partition(":")
            references.append(f"{name}=projects/{settings.project}/secrets/{secret}/versions/{version or 'latest'}")
        variables[VARIABLE] = ",".join(references)
    if variables:
        container["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    return {
        "machineSpec": {
            "machineType": job.machine_type,
            "acceleratorType": job.accelerator_type,
            "acceleratorCount": 1,
        },
        "replicaCount": str(replicas),  # 64-bit numbers are text in JSON
        "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": job.disk_gb},
        "containerSpec": container,
    }
