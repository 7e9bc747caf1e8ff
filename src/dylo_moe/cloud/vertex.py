"""A custom job on Vertex AI: the request, sending it, and following it.

The request is made as the JSON of the REST interface, which is what ``--dry-run`` shows; Google's client sends it.
https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from dylo_moe.cloud.secrets import VARIABLE
from dylo_moe.cloud.settings import Settings
from dylo_moe.cloud_config import SubmitArgs
from dylo_moe.errors import CloudError, first_line

POLL_SECONDS = 30
PATIENCE_SECONDS = 600
"""How long a network that is gone is waited for, while a job is followed."""
ENDED = ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED")
_SUCCEEDED = ENDED[0]


def create_request(args: SubmitArgs, settings: Settings, training: Sequence[str]) -> dict[str, Any]:
    """The CreateCustomJob request.

    Args:
        args: The flags of the job.
        settings: Project, region, bucket and image.
        training: The flags of ``train``.

    Returns:
        ``parent`` and ``customJob``, as JSON writes them.
    """
    scheduling: dict[str, Any] = {
        "timeout": f"{round(args.timeout_hours * 3600)}s",
        "restartJobOnWorkerRestart": True,
        "strategy": "SPOT" if args.spot else "STANDARD",
    }
    spec: dict[str, Any] = {
        # the first pool is the one machine that leads, the second one all others
        "workerPoolSpecs": [
            _pool(args, settings, training, replicas) for replicas in (1, args.replicas - 1) if replicas
        ],
        "scheduling": scheduling,
        "baseOutputDirectory": {"outputUriPrefix": f"gs://{settings.bucket}/{args.job_name}"},
    }
    if args.service_account is not None:
        spec["serviceAccount"] = args.service_account
    labels = dict(label.split("=", 1) for label in args.labels or [])
    job = {"displayName": args.job_name, "labels": {"program": "dylora-moe", **labels}, "jobSpec": spec}
    return {"parent": f"projects/{settings.project}/locations/{settings.region}", "customJob": job}


def machine_hours(args: SubmitArgs) -> float:
    """The most that a job can cost, in hours of one of its machines."""
    return args.replicas * args.timeout_hours


def connect(region: str) -> Any:
    """Google's client for a region, with the machine's credentials.

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
            "there are no credentials for Google Cloud; run: gcloud auth application-default login"
        ) from error


def send(request: dict[str, Any], client: Any) -> str:
    """Creates the job; returns its resource name.

    Raises:
        CloudError: Vertex AI refused, or cannot be reached.
    """
    from google.cloud.aiplatform_v1 import CustomJob
    from google.protobuf.json_format import ParseDict

    job = CustomJob()
    ParseDict(request["customJob"], CustomJob.pb(job))
    try:
        name: str = client.create_custom_job(parent=request["parent"], custom_job=job).name
    except _refusals() as error:
        raise CloudError(f"Vertex AI did not take the job: {first_line(error)}") from error
    return name


def watch(
    name: str, client: Any, tell: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> tuple[bool, float]:
    """Follows a job to its end.

    Args:
        name: Its resource name.
        client: Google's.
        tell: Gets a line for each new state.
        sleep: Waits for so many seconds.

    Returns:
        Whether it succeeded, and the hours from its start to its end; 0 where it never started.

    Raises:
        CloudError: Vertex AI cannot be asked any more.
    """
    from google.api_core.retry import Retry

    before = None
    while True:
        try:
            job = client.get_custom_job(name=name, retry=Retry(timeout=PATIENCE_SECONDS))
        except _refusals() as error:
            raise CloudError(f"the job {name} goes on, and cannot be asked for: {first_line(error)}") from error
        state = job.state.name
        if state != before:
            why = f": {first_line(Exception(job.error.message))}" if job.error.message else ""
            tell(f"{state.removeprefix('JOB_STATE_').lower()}{why}")
            before = state
        if state in ENDED:
            hours = (job.end_time - job.start_time).total_seconds() / 3600 if job.start_time and job.end_time else 0.0
            return state == _SUCCEEDED, hours
        sleep(POLL_SECONDS)


def _refusals() -> tuple[type[Exception], ...]:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    return GoogleAPIError, GoogleAuthError, RequestException


def _pool(args: SubmitArgs, settings: Settings, training: Sequence[str], replicas: int) -> dict[str, Any]:
    container: dict[str, Any] = {"imageUri": settings.image, "args": ["--train", *training]}
    variables = dict(entry.split("=", 1) for entry in args.env or [])
    if args.secrets:
        variables[VARIABLE] = ",".join(_reference(entry, settings.project) for entry in args.secrets)
    if variables:
        container["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    return {
        "machineSpec": {"machineType": args.machine_type, "acceleratorType": args.gpu, "acceleratorCount": 1},
        "replicaCount": str(replicas),  # 64-bit numbers are text in JSON
        "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": args.disk_gb},
        "containerSpec": container,
    }


def _reference(entry: str, project: str) -> str:
    name, _, secret = entry.partition("=")
    secret, _, version = secret.partition(":")
    return f"{name}=projects/{project}/secrets/{secret}/versions/{version or 'latest'}"
