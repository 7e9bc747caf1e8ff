"""Project, region, bucket and image of a job: given, or from the environment, or from gcloud's configuration."""

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dylo_moe.errors import ConfigError, did_you_mean

_EUROPE, _ASIA = "europe-", "asia-"
_REGIONS = frozenset(
    ["africa-south1", "australia-southeast1", "australia-southeast2", "me-central1", "me-central2", "me-west1"]
    + ["northamerica-northeast1", "northamerica-northeast2", "southamerica-east1", "southamerica-west1"]
    + ["us-central1", "us-east1", "us-east4", "us-east5", "us-south1", "us-west1", "us-west2", "us-west3", "us-west4"]
    + [_EUROPE + part for part in ("central2", "north1", "southwest1", "west1", "west2", "west3", "west4")]
    + [_EUROPE + part for part in ("west6", "west8", "west9", "west12")]
    + [_ASIA + part for part in ("east1", "east2", "northeast1", "northeast2", "northeast3", "south1")]
    + [_ASIA + part for part in ("southeast1", "southeast2")]
)
"""Regions in which Vertex AI trains: https://cloud.google.com/vertex-ai/docs/general/locations"""

_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_IMAGE = re.compile(
    r"(?P<host>[a-z0-9][a-z0-9.-]*\.[a-z]+(:\d+)?)/[a-z0-9._/-]*[a-z0-9](:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_GCLOUD_SECONDS = 30


@dataclass(frozen=True)
class Settings:
    """Settings that every job needs.

    Attributes:
        project: Id of the Google Cloud project.
        region: Region in which Vertex AI trains.
        bucket: Name of the Cloud Storage bucket, without ``gs://``.
        image: Container image, ``REGISTRY/NAME:TAG``.
    """

    project: str
    region: str
    bucket: str
    image: str


def resolve(
    environment: Mapping[str, str],
    ask_gcloud: Callable[[str], str | None] | None = None,
    *,
    project: str | None = None,
    region: str | None = None,
    bucket: str | None = None,
    image: str | None = None,
) -> Settings:
    """Find and check each setting that is not given, without asking the cloud.

    Args:
        environment: Environment variables of the process.
        ask_gcloud: Function that returns a property of gcloud's configuration, or None; by default it runs gcloud.
        project: Id of the Google Cloud project.
        region: Region in which Vertex AI trains.
        bucket: Name of the Cloud Storage bucket, with or without ``gs://``.
        image: Container image, ``REGISTRY/NAME:TAG``.

    Raises:
        ConfigError: A setting is missing or malformed.
    """
    ask = ask_gcloud or gcloud_property
    project = project or _first(environment, "GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT") or ask("core/project")
    region = region or _first(environment, "GOOGLE_CLOUD_REGION", "CLOUDSDK_AI_REGION", "CLOUDSDK_COMPUTE_REGION")
    region = region or ask("ai/region") or ask("compute/region")
    bucket = bucket or _first(environment, "DYLO_MOE_BUCKET")
    image = image or _first(environment, "DYLO_MOE_IMAGE")
    project = _checked("project", project, _PROJECT, "GOOGLE_CLOUD_PROJECT, or gcloud config set project PROJECT")
    region = _checked_region(region)
    bucket = _checked("bucket", (bucket or "").removeprefix("gs://").rstrip("/"), _BUCKET, "DYLO_MOE_BUCKET")
    image = _checked("image", image, _IMAGE, "DYLO_MOE_IMAGE to what build_and_push.sh printed")
    return Settings(project, region, bucket, image)


def gcloud_property(name: str) -> str | None:
    """Return a property of gcloud's active configuration; None if it is not set or gcloud is not installed.

    Raises:
        ConfigError: gcloud did not answer in time.
    """
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        return None
    command = [gcloud, "config", "get-value", name, "--quiet"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GCLOUD_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"gcloud did not answer for {name} within {_GCLOUD_SECONDS} seconds; set `{name.rpartition('/')[2]}`"
        ) from error
    value = done.stdout.strip()
    return value if done.returncode == 0 and value not in ("", "(unset)") else None


def _first(environment: Mapping[str, str], *names: str) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)


def _checked(parameter: str, value: str | None, form: re.Pattern[str], elsewhere: str) -> str:
    if not value:
        raise ConfigError(f"`{parameter}` is missing: give it, or set {elsewhere}")
    if not form.fullmatch(value):
        expected = "REGISTRY/NAME:TAG" if parameter == "image" else f"the name of a {parameter}"
        raise ConfigError(f"`{parameter}` must be {expected}, got {value!r}")
    return value


def _checked_region(region: str | None) -> str:
    if not region:
        raise ConfigError(
            "`region` is missing: give it, or set GOOGLE_CLOUD_REGION, or gcloud config set compute/region REGION"
        )
    if region not in _REGIONS:
        raise ConfigError(
            f"`region` must be one that Vertex AI trains in, got {region!r}{did_you_mean(region, _REGIONS)}"
        )
    return region
