"""Training on other machines: where a container runs, and jobs on Vertex AI."""

from dylo_moe.cloud.platform import BARE, Platform, detect
from dylo_moe.cloud.secrets import load_secrets
from dylo_moe.cloud.settings import resolve
from dylo_moe.cloud.vertex import JobSpec, connect, create_request, send, watch

__all__ = [
    "BARE",
    "JobSpec",
    "Platform",
    "connect",
    "create_request",
    "detect",
    "load_secrets",
    "resolve",
    "send",
    "watch",
]
