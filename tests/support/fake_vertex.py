"""A local Vertex AI server: accepts any job, reports a sequence of states, and records the requests.

It also serves Secret Manager, with the same value for every secret.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "projects/1/locations/us-central1/customJobs/42"
STATES = ("PENDING", "RUNNING", "RUNNING", "SUCCEEDED")


class Vertex(ThreadingHTTPServer):
    """The server.

    Attributes:
        requests: Recorded requests: ``method``, ``path``, ``body``, and the bytes of headers and body in ``raw``.
        states: States still to report; a number is an HTTP status.
        secret_status: HTTP status of the answer to a request for a secret.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.states: list[str | int] = [*STATES]
        self.secret_status = 200


class _Handler(BaseHTTPRequestHandler):
    server: Vertex

    def do_POST(self) -> None:
        self._answer({"name": NAME, "state": "JOB_STATE_PENDING"})

    def do_GET(self) -> None:
        if self.path.endswith(":access"):
            self._answer({"payload": {"data": base64.b64encode(b"a secret").decode()}}, self.server.secret_status)
            return
        state = self.server.states.pop(0)
        times = {"startTime": "2026-01-01T00:00:00Z", "endTime": "2026-01-01T02:30:00Z"}
        if isinstance(state, int):
            self._answer({"error": {"code": state, "message": "not now", "status": "UNAVAILABLE"}}, state)
        else:
            self._answer({"name": NAME, "state": f"JOB_STATE_{state}", **times})

    def _answer(self, answer: dict[str, Any], status: int = 200) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(
            {
                "method": self.command,
                "path": self.path,
                "body": json.loads(raw) if raw else None,
                "raw": self.headers.as_bytes() + raw,
            }
        )
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Vertex]:
    """Yield the server, running until the end of the block."""
    server = Vertex()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client_of(vertex: Vertex) -> Any:
    """Return the real client, without credentials, connected to the fake server."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1 import JobServiceClient
    from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceRestTransport

    transport = JobServiceRestTransport(
        host=f"127.0.0.1:{vertex.server_port}",
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        url_scheme="http",
    )
    return JobServiceClient(transport=transport)
