"""Secrets by reference: the job's environment names them, and the process that needs them fetches them.

A custom job of Vertex AI has only plain environment variables, which everybody with access to the job can read. So
``DYLO_MOE_SECRETS`` holds ``NAME=projects/P/secrets/S/versions/V`` entries, which the job's service account resolves.
"""

import base64
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dylo_moe.errors import CloudError, first_line

if TYPE_CHECKING:
    from google.auth.transport.requests import AuthorizedSession

VARIABLE = "DYLO_MOE_SECRETS"
REFERENCE = re.compile(r"projects/[a-z0-9:.-]+/secrets/[A-Za-z0-9_-]+/versions/(latest|\d+)")
SERVICE = "https://secretmanager.googleapis.com/v1"


def _parse_references(text: str) -> dict[str, str]:
    """Return the reference of a secret for each environment variable that ``VARIABLE`` lists.

    Args:
        text: Value of ``VARIABLE``: comma-separated ``NAME=REFERENCE`` entries.

    Raises:
        CloudError: An entry is malformed.
    """
    entries = {}
    for part in filter(None, text.split(",")):
        name, _, reference = part.partition("=")
        if not name.isidentifier() or not REFERENCE.fullmatch(reference):
            # the entry is not quoted: it may be the secret itself
            raise CloudError(
                f"{VARIABLE} must have NAME=projects/PROJECT/secrets/SECRET/versions/VERSION entries, got another form"
            )
        entries[name] = reference
    return entries


def load_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Fetch the secrets that ``VARIABLE`` refers to; return the environment variables to set.

    Args:
        environment: Environment variables of the process; those that are set already are not fetched.

    Raises:
        CloudError: A secret cannot be fetched.
    """
    references = _parse_references(environment.get(VARIABLE, ""))
    missing = {name: reference for name, reference in references.items() if not environment.get(name)}
    if not missing:
        return {}
    session = _authorized_session()
    return {name: _fetch(session, name, reference) for name, reference in missing.items()}


def _fetch(session: "AuthorizedSession", name: str, reference: str) -> str:
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    try:
        answer = session.get(f"{SERVICE}/{reference}:access", timeout=60)
    except (RequestException, GoogleAuthError) as error:
        raise CloudError(f"the secret {reference} for {name} cannot be fetched: {first_line(error)}") from error
    if answer.status_code != 200:
        raise CloudError(
            f"the secret {reference} for {name} cannot be fetched: HTTP {answer.status_code}; check that it exists and "
            "that the job's service account has the role roles/secretmanager.secretAccessor on it"
        )
    return base64.b64decode(answer.json()["payload"]["data"]).decode()


def _authorized_session() -> "AuthorizedSession":
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from google.auth.transport.requests import AuthorizedSession
    except ImportError as error:
        raise CloudError(f"{VARIABLE} needs google-auth; run: pip install 'dylora-moe[secrets]'") from error
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except DefaultCredentialsError as error:
        raise CloudError(f"{VARIABLE} is set, but this machine has no credentials: {first_line(error)}") from error
    return AuthorizedSession(credentials)
