"""What is sent to Vertex AI is exactly what the golden files say, and what is wrong is never sent.

The golden files are written by ``python tests/cloud/test_submit.py``, to be read before they are committed.
"""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.cli import main
from dylo_moe.cloud.settings import Settings, resolve
from dylo_moe.cloud.vertex import create_request, send, watch
from dylo_moe.cloud_config import MACHINES, SubmitArguments
from dylo_moe.errors import EXIT_USER_ERROR, ConfigError

GOLDEN = Path(__file__).parent / "golden"
IMAGE = "us-central1-docker.pkg.dev/my-project/dylora-moe/dylora-moe:0.1.0-cuda"
PLACES = ["--project", "my-project", "--region", "us-central1", "--bucket", "my-bucket", "--image", IMAGE]
NAME = "projects/1/locations/us-central1/customJobs/42"
CASES = [(machine, replicas) for machine in MACHINES for replicas in (1, 4)]


def request(machine: str, replicas: int) -> dict[str, Any]:
    args = SubmitArguments(
        machine_type=machine,
        replicas=replicas,
        service_account="trainer@my-project.iam.gserviceaccount.com",
        labels=["team=research"],
        env=["HF_HUB_ENABLE_HF_TRANSFER=1"],
        secrets=["HF_TOKEN=hf-token", "WANDB_API_KEY=wandb:3"],
    )
    settings = Settings("my-project", "us-central1", "my-bucket", IMAGE)
    return create_request(args, settings, ["--bf16", "--num_epochs=3"])


def golden(machine: str, replicas: int) -> Path:
    return GOLDEN / f"{machine}-{replicas}.json"


@pytest.mark.parametrize(("machine", "replicas"), CASES)
def test_the_request_is_the_golden_one(machine: str, replicas: int) -> None:
    assert request(machine, replicas) == json.loads(golden(machine, replicas).read_text())


class Vertex(ThreadingHTTPServer):
    """Takes any job, and goes through some states with it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, Any]] = []
        self.states = ["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]


class _Handler(BaseHTTPRequestHandler):
    server: Vertex

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer("POST", json.loads(body), {"name": NAME, "state": "JOB_STATE_PENDING"})

    def do_GET(self) -> None:
        times = {"startTime": "2026-01-01T00:00:00Z", "endTime": "2026-01-01T02:30:00Z"}
        self._answer("GET", None, {"name": NAME, "state": self.server.states.pop(0), **times})

    def _answer(self, method: str, body: Any, answer: dict[str, str]) -> None:
        self.server.requests.append((method, self.path.partition("?")[0], body))
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def vertex() -> Iterator[Vertex]:
    server = Vertex()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client_of(vertex: Vertex) -> Any:
    """The real client, without credentials, speaking to the fake one."""
    pytest.importorskip("google.cloud.aiplatform_v1", reason="google-cloud-aiplatform is not installed")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1 import JobServiceClient
    from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceRestTransport

    transport = JobServiceRestTransport(
        host=f"127.0.0.1:{vertex.server_port}",
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        url_scheme="http",
    )
    return JobServiceClient(transport=transport)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("machine", "replicas"), CASES)
def test_what_goes_over_the_wire_is_the_golden_request(vertex: Vertex, machine: str, replicas: int) -> None:
    client = client_of(vertex)
    from google.cloud.aiplatform_v1 import CustomJob
    from google.protobuf.json_format import MessageToDict, ParseDict

    assert send(request(machine, replicas), client) == NAME
    ((method, path, body),) = vertex.requests
    wanted = json.loads(golden(machine, replicas).read_text())
    assert (method, path) == ("POST", f"/v1/{wanted['parent']}/customJobs")
    # on the wire names of states and kinds are numbers: read both as the message that they are
    sent, meant = (MessageToDict(ParseDict(job, CustomJob.pb(CustomJob()))) for job in (body, wanted["customJob"]))
    assert sent == meant == wanted["customJob"]


@pytest.mark.filterwarnings("ignore")
def test_a_job_is_followed_to_its_end(vertex: Vertex) -> None:
    lines: list[str] = []
    waits: list[float] = []
    assert watch(NAME, client_of(vertex), lines.append, waits.append) == (True, 2.5)
    assert lines == ["pending", "running", "succeeded"] and len(waits) == 3
    vertex.states = ["JOB_STATE_CANCELLED"]
    assert watch(NAME, client_of(vertex), lines.append, waits.append)[0] is False


def test_a_dry_run_prints_the_request_and_asks_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dylo_moe.programs.submit.connect", refuse)
    code = main(["submit", *PLACES, "--replicas", "4", "--dry-run", "--", "--bf16", "--num-epochs", "2"])
    assert code == 0
    job = json.loads(capsys.readouterr().out)["customJob"]
    assert job["jobSpec"]["workerPoolSpecs"][1]["replicaCount"] == "3"
    assert job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"] == ["--train", "--bf16", "--num-epochs", "2"]


def refuse(*args: object) -> None:
    raise AssertionError("the cloud was asked")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--machine_type", "a3-highgpu-1"], "did you mean 'a3-highgpu-1g'"),
        (["--region", "us-centrall1"], "did you mean 'us-central1'"),
        (["--image", "no image"], "--image must be REGISTRY/NAME:TAG"),
        (["--image", "ubuntu"], "--image must be REGISTRY/NAME:TAG"),
        (["--project", "Not A Project"], "--project must be the name of a project"),
        (["--bucket", "Bad_Bucket!"], "--bucket must be the name of a bucket"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--service_account", "me"], "--service_account must be NAME@PROJECT"),
        (["--labels", "Team"], "--labels must be KEY=VALUE"),
        (["--env", "HF_TOKEN=planted"], "give --secrets HF_TOKEN=ITS_NAME"),
        (["--secrets", "HF_TOKEN=hf:planted"], "--secrets must be NAME=SECRET"),
        (["--", "--num_epoch", "3"], "did you mean '--num_epochs'"),
    ],
)
def test_what_is_wrong_is_refused_before_any_call(
    changed: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dylo_moe.programs.submit.connect", refuse)
    assert main(["submit", *PLACES, *changed]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "planted" not in said


@pytest.mark.parametrize("missing", ["project", "region", "bucket", "image"])
def test_each_missing_setting_is_named(missing: str) -> None:
    given = {"project": "my-project", "region": "us-central1", "bucket": "my-bucket", "image": IMAGE}
    args = SubmitArguments(**{name: value for name, value in given.items() if name != missing})
    with pytest.raises(ConfigError, match=f"--{missing} is missing: give it, or set"):
        resolve(args, {}, lambda name: None)


def test_settings_come_from_the_flag_then_the_environment_then_gcloud() -> None:
    environment = {
        "DYLO_MOE_BUCKET": "gs://env-bucket/",
        "DYLO_MOE_IMAGE": IMAGE,
        "GOOGLE_CLOUD_PROJECT": "env-project",
    }
    gcloud = {"core/project": "gcloud-project", "compute/region": "europe-west4"}.get
    assert resolve(SubmitArguments(), environment, gcloud) == Settings(
        "env-project", "europe-west4", "env-bucket", IMAGE
    )
    del environment["GOOGLE_CLOUD_PROJECT"]
    assert resolve(SubmitArguments(), environment, gcloud).project == "gcloud-project"
    assert resolve(SubmitArguments(project="my-project"), environment, gcloud).project == "my-project"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        golden(*case).write_text(json.dumps(request(*case), indent=2) + "\n")
    sys.stdout.write(f"wrote {GOLDEN}\n")
