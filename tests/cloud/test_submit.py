"""Requests to Vertex AI equal the golden files exactly, and invalid jobs are never sent.

A golden file is the request as Google's own client sent it. ``python -m tests.cloud.test_submit``
writes them; review them before committing.
"""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.cli import main
from dylo_moe.cloud.settings import Settings, gcloud_property, resolve
from dylo_moe.cloud.vertex import connect, send, watch
from dylo_moe.config.cloud import MACHINES
from dylo_moe.errors import EXIT_USER_ERROR, CloudError, ConfigError
from tests.support.fake_vertex import NAME, Vertex, client_of, running
from tests.support.secret_scan import TOKEN

GOLDEN = Path(__file__).parent / "golden"
IMAGE = "us-central1-docker.pkg.dev/my-project/dylora-moe/dylora-moe:0.1.0-cuda"
PLACES = ["--project", "my-project", "--region", "us-central1", "--bucket", "my-bucket", "--image", IMAGE]
JOB = [
    *("--service_account", "trainer@my-project.iam.gserviceaccount.com", "--labels", "team=research"),
    *("--env", "HF_HUB_ENABLE_HF_TRANSFER=1", "--secrets", "HF_TOKEN=hf-token,WANDB_API_KEY=wandb:3"),
]
TRAINING = ["--", "--bf16", "--num_epochs=3"]
CASES = [(machine, replicas) for machine in MACHINES for replicas in (1, 4)]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:google")


@pytest.fixture
def vertex() -> Iterator[Vertex]:
    with running() as server:
        yield server


def command(machine: str, replicas: int) -> list[str]:
    return ["submit", *PLACES, "--machine_type", machine, "--replicas", str(replicas), *JOB]


def golden(machine: str, replicas: int) -> Path:
    return GOLDEN / f"{machine}-{replicas}.json"


def sent_by(vertex: Vertex, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the requests that submit sends, in the form of the golden files."""
    monkeypatch.setattr("dylo_moe.commands.submit.connect", lambda region: client_of(vertex))
    monkeypatch.setattr("dylo_moe.cloud.vertex.POLL_SECONDS", 0)
    assert main(arguments) == 0
    return [{key: one[key] for key in ("method", "path", "body")} for one in vertex.requests]


@pytest.mark.parametrize(("machine", "replicas"), CASES)
def test_the_request_sent_equals_the_golden_file(
    vertex: Vertex, machine: str, replicas: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sent,) = sent_by(vertex, [*command(machine, replicas), *TRAINING], monkeypatch)
    assert sent == json.loads(golden(machine, replicas).read_text())
    said = capsys.readouterr().out
    assert f"Created {NAME}" in said and f"at most {24 * replicas} machine-hours" in said


@pytest.mark.parametrize(("machine", "replicas"), CASES)
def test_a_dry_run_prints_the_golden_request_and_sends_nothing(
    machine: str, replicas: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.cloud.aiplatform_v1 import CustomJob
    from google.protobuf.json_format import MessageToDict, ParseDict

    monkeypatch.setattr("dylo_moe.commands.submit.connect", refuse)
    assert main([*command(machine, replicas), "--dry-run", *TRAINING]) == 0
    shown, wanted = json.loads(capsys.readouterr().out), json.loads(golden(machine, replicas).read_text())
    assert wanted["path"].startswith(f"/v1/{shown['parent']}/customJobs?")
    # the client sends names of machines and strategies as numbers: compare the parsed messages
    assert MessageToDict(ParseDict(wanted["body"], CustomJob.pb(CustomJob()))) == shown["customJob"]


def test_a_job_is_followed_to_its_end(
    vertex: Vertex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vertex.states.insert(2, 503)
    sent = sent_by(vertex, ["submit", *PLACES, "--replicas", "4", "--watch"], monkeypatch)
    assert [one["method"] for one in sent] == ["POST"] + ["GET"] * 5, "an unavailable server is asked again"
    said = capsys.readouterr().out.splitlines()
    assert said[-4:] == ["pending", "running", "succeeded", "Took 10.00 machine-hours of a3-highgpu-1g"]
    vertex.states = ["CANCELLED"]
    assert watch(NAME, client_of(vertex), lambda line: None) == (False, 2.5)


def test_an_error_of_the_cloud_is_one_line(vertex: Vertex, monkeypatch: pytest.MonkeyPatch) -> None:
    vertex.states = [403]
    with pytest.raises(CloudError, match=r"customJobs/42 continues, but its state cannot be read: 403 .*not now"):
        watch(NAME, client_of(vertex), lambda line: None)
    request = {"parent": "projects/my-project/locations/us-central1", "customJob": {}}
    client = client_of(vertex)
    vertex.shutdown()
    vertex.server_close()
    with pytest.raises(CloudError, match=r"Vertex AI did not accept the job: "):
        send(request, client)


def test_without_credentials_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(CloudError, match=r"no credentials for Google Cloud; run: gcloud auth application-default"):
        connect("us-central1")


def test_no_token_is_in_a_request_or_in_the_output(
    vertex: Vertex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    (sent,) = sent_by(vertex, [*command("a3-highgpu-1g", 4), *TRAINING], monkeypatch)
    assert "HF_TOKEN" in json.dumps(sent["body"]), "the job refers to the secret"
    assert TOKEN.encode() not in vertex.requests[0]["raw"] and TOKEN not in sent["path"]
    assert main([*command("a3-highgpu-1g", 4), "--dry_run", *TRAINING]) == 0
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err


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
        (["--env", f"HF_TOKEN={TOKEN}"], "give --secrets HF_TOKEN=ITS_NAME"),
        (["--secrets", f"HF_TOKEN=hf:{TOKEN}"], "--secrets must be NAME=SECRET"),
        (["--", "--num_epoch", "3"], "did you mean '--num_epochs'"),
    ],
)
def test_invalid_flags_are_refused_before_any_call(
    changed: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dylo_moe.commands.submit.connect", refuse)
    assert main(["submit", *PLACES, *changed]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and TOKEN not in said


@pytest.mark.parametrize("missing", ["project", "region", "bucket", "image"])
def test_each_missing_setting_is_named(missing: str) -> None:
    given = {"project": "my-project", "region": "us-central1", "bucket": "my-bucket", "image": IMAGE}
    del given[missing]
    with pytest.raises(ConfigError, match=f"`{missing}` is missing: give it, or set"):
        resolve({}, lambda name: None, **given)


def test_settings_come_from_the_caller_then_the_environment_then_gcloud() -> None:
    environment = {
        "DYLO_MOE_BUCKET": "gs://env-bucket/",
        "DYLO_MOE_IMAGE": IMAGE,
        "GOOGLE_CLOUD_PROJECT": "env-project",
    }
    gcloud = {"core/project": "gcloud-project", "compute/region": "europe-west4"}.get
    assert resolve(environment, gcloud) == Settings("env-project", "europe-west4", "env-bucket", IMAGE)
    del environment["GOOGLE_CLOUD_PROJECT"]
    assert resolve(environment, gcloud).project == "gcloud-project"
    assert resolve(environment, gcloud, project="my-project").project == "my-project"


def test_gcloud_is_asked_for_its_properties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\n[ "$3" = core/project ] && echo gcloud-project && exit\necho "(unset)"\n')
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gcloud_property("core/project") == "gcloud-project"
    assert gcloud_property("compute/region") is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert gcloud_property("core/project") is None


def test_importing_the_script_submits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dylo_moe.commands.submit.main", refuse)
    runpy.run_path(str(GOLDEN.parents[2] / "submit_full_training.py"), run_name="imported")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        with running() as server, pytest.MonkeyPatch.context() as patch:
            (request,) = sent_by(server, [*command(*case), *TRAINING], patch)
        golden(*case).write_text(json.dumps(request, indent=2) + "\n")
