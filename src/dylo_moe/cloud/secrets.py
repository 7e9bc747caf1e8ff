"""Secrets by reference: a job's environment names them, and the process that needs them fetches them.

A custom job of Vertex AI has plain environment variables only, which everybody sees who may look at the job. So
``DYLO_MOE_SECRETS`` holds ``NAME=projects/P/secrets/S/versions/V`` entries, and the job's service account reads them.
"""

import base64
import re
from collections.abc import Mapping
from typing import Any

from dylo_moe.errors import CloudError, first_line

VARIABLE = "DYLO_MOE_SECRETS"
REFERENCE = re.compile(r"projects/[a-z0-9:.-]+/secrets/[A-Za-z0-9_-]+/versions/(latest|\d+)")
SERVICE = "https://secretmanager.googleapis.com/v1"


def parse_references(text: str) -> dict[str, str]:
    """The entries of ``VARIABLE``: the secret that each environment variable gets its value from.

    Raises:
        CloudError: An entry has another form.
    """
    entries = {}
    for part in filter(None, text.split(",")):
        name, _, reference = part.partition("=")
        if not name.isidentifier() or not REFERENCE.fullmatch(reference):
            # not quoted: what stands in the wrong place may be the secret itself
            raise CloudError(f"{VARIABLE} must have NAME=projects/PROJECT/secrets/SECRET/versions/VERSION entries")
        entries[name] = reference
    return entries


def load_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Fetches what ``VARIABLE`` refers to.

    Args:
        environment: The process's.

    Returns:
        The variables to set; those that are set already stay as they are.

    Raises:
        CloudError: A secret cannot be had.
    """
    wanted = parse_references(environment.get(VARIABLE, ""))
    wanted = {name: reference for name, reference in wanted.items() if not environment.get(name)}
    if not wanted:
        return {}
    session = _own_session()
    return {name: _fetch(session, name, reference) for name, reference in wanted.items()}


def _fetch(session: Any, name: str, reference: str) -> str:
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    try:
        answer = session.get(f"{SERVICE}/{reference}:access", timeout=60)
    except (RequestException, GoogleAuthError) as error:
        raise CloudError(f"the secret {reference} for {name} cannot be had: {first_line(error)}") from error
    if answer.status_code != 200:
        raise CloudError(
            f"the secret {reference} for {name} cannot be had: HTTP {answer.status_code}; it has to exist, and the "
            "job's service account needs the role roles/secretmanager.secretAccessor on it"
        )
    return base64.b64decode(answer.json()["payload"]["data"]).decode()


def _own_session() -> Any:
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from google.auth.transport.requests import AuthorizedSession
    except ImportError as error:
        raise CloudError(f"{VARIABLE} needs google-auth; run: pip install 'dylora-moe[secrets]'") from error
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except DefaultCredentialsError as error:
        raise CloudError(f"{VARIABLE} is set, and this machine has no credentials: {first_line(error)}") from error
    return AuthorizedSession(credentials)
