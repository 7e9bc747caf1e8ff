"""Each platform is detected from the environment alone, and has the right effects."""

import json
from pathlib import Path

import pytest

from dylo_moe.cloud.platform import BARE, DOCKER, VAST, VERTEX, Cluster, Platform, detect, local_folder
from dylo_moe.cloud.secrets import VARIABLE, load_secrets
from dylo_moe.commands.entrypoint import benchmark_flags, platform_flags
from dylo_moe.errors import CloudError
from tests.support.fake_vertex import running
from tests.support.secret_scan import TOKEN


def spec(kind: str, index: int) -> str:
    pools = {"workerpool0": ["first-0:2222"], "workerpool1": ["second-0:2222", "second-1:2222"]}
    return json.dumps({"cluster": pools, "environment": "cloud", "task": {"type": kind, "index": index}})


def test_vertex_writes_below_gcs(tmp_path: Path) -> None:
    (tmp_path / "gcs").mkdir()
    environment = {
        "CLOUD_ML_JOB_ID": "123",
        "AIP_CHECKPOINT_DIR": "gs://bucket/run/checkpoints/",
        "AIP_MODEL_DIR": "gs://bucket/run/model/",
        "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/run/logs/",
    }
    found = detect(environment, tmp_path)
    assert (found.name, found.job, found.cluster) == (VERTEX, "job 123", None)
    assert found.checkpoint_dir == tmp_path / "gcs/bucket/run/checkpoints"
    assert found.model_dir == tmp_path / "gcs/bucket/run/model"
    assert found.tensorboard_dir == tmp_path / "gcs/bucket/run/logs"
    assert found.is_bucket(found.checkpoint_dir) and found.is_bucket(tmp_path / "gcs/other/run")
    assert not found.is_bucket(tmp_path / "data") and not detect({}, tmp_path).is_bucket(tmp_path / "gcs")
    assert f"Checkpoints: {found.checkpoint_dir}" in found.describe()


@pytest.mark.parametrize(
    ("kind", "index", "rank"), [("workerpool0", 0, 0), ("workerpool1", 0, 1), ("workerpool1", 1, 2)]
)
def test_a_cluster_is_ranked_by_its_pools(kind: str, index: int, rank: int) -> None:
    found = detect({"CLOUD_ML_JOB_ID": "1", "CLUSTER_SPEC": spec(kind, index)})
    assert found.cluster == Cluster(machines=3, rank=rank, address="first-0", port=2222)
    assert found.cluster.launch_arguments(2) == [
        "--nnodes=3",
        f"--node-rank={rank}",
        "--nproc-per-node=2",
        "--master-addr=first-0",
        "--master-port=2222",
    ]


def test_a_cluster_of_one_machine_is_none() -> None:
    one = {"cluster": {"workerpool0": ["a:2222"]}, "task": {"type": "workerpool0", "index": 0}}
    assert detect({"CLOUD_ML_JOB_ID": "1", "CLUSTER_SPEC": json.dumps(one)}).cluster is None


@pytest.mark.parametrize("text", ["{", "{}", "[]", spec("workerpool1", 2), spec("workerpool2", 0), '{"cluster": 1}'])
def test_a_malformed_cluster_is_refused(text: str) -> None:
    with pytest.raises(CloudError, match="CLUSTER_SPEC must be JSON"):
        detect({"CLOUD_ML_JOB_ID": "1", "CLUSTER_SPEC": text})


@pytest.mark.parametrize("variable", ["CONTAINER_ID", "VAST_CONTAINERLABEL"])
def test_vast_uses_only_its_share_of_the_cores(tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("650000 100000\n")
    found = detect({variable: "C.77"}, tmp_path)
    assert (found.name, found.job, found.cores) == (VAST, "instance C.77", 6)
    assert found.settings == {"OMP_NUM_THREADS": "6"}
    assert platform_flags(found, []) == ["--resume_from_checkpoint", "auto", "--preprocessing_workers", "6"]
    assert detect({variable: "C.77", "OMP_NUM_THREADS": "2"}, tmp_path).settings == {}


def test_nccl_does_not_use_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr("dylo_moe.cloud.platform.SMALL_SHARED_MEMORY", 0)
    assert "NCCL_SHM_DISABLE" not in detect({"CONTAINER_ID": "1"}, tmp_path).settings
    monkeypatch.setattr("dylo_moe.cloud.platform.SMALL_SHARED_MEMORY", 1 << 80)
    assert detect({"CONTAINER_ID": "1"}, tmp_path).settings["NCCL_SHM_DISABLE"] == "1"


def test_containers_and_bare_machines_are_detected(tmp_path: Path) -> None:
    assert detect({}, tmp_path) == Platform(BARE)
    assert platform_flags(Platform(BARE), []) == []
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod"}
    assert detect(pod, tmp_path) == Platform(DOCKER, job="pod")
    (tmp_path / ".dockerenv").touch()
    assert detect({"HOSTNAME": "abc"}, tmp_path) == Platform(DOCKER, job="abc")


@pytest.mark.parametrize("value", ["s3://bucket/x", "gs://", "gs:///"])
def test_a_value_that_is_not_a_folder_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(CloudError, match="AIP_MODEL_DIR must be a folder or gs://"):
        local_folder("AIP_MODEL_DIR", value, tmp_path)


def test_a_bucket_that_is_not_mounted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CloudError, match="gcs is not mounted"):
        local_folder("AIP_MODEL_DIR", "gs://bucket/x", tmp_path)


def test_given_flags_override_those_of_the_platform() -> None:
    vertex = Platform(VERTEX, checkpoint_dir=Path("/c"))
    assert platform_flags(vertex, []) == ["--output_dir", "/c", "--resume_from_checkpoint", "auto"]
    assert platform_flags(vertex, ["--output-dir=/mine", "--resume-from-checkpoint"]) == []
    assert platform_flags(vertex, ["--overwrite_output_dir"]) == ["--output_dir", "/c"]


def test_a_benchmark_scores_the_trained_model_and_stores_its_result() -> None:
    vertex = Platform(VERTEX, checkpoint_dir=Path("/c"))
    output = ["--output", "/c/benchmark.json"]
    assert benchmark_flags(vertex, ["--max-samples", "20"]) == [*output, "--trained_model", "/c/best_model"]
    assert benchmark_flags(vertex, ["--trained-model=/mine"]) == output
    assert benchmark_flags(vertex, ["--base-model"]) == output
    assert benchmark_flags(vertex, ["--compare", "a.json", "b.json"]) == benchmark_flags(Platform(BARE), []) == []


REFERENCE = "projects/p/secrets/hf/versions/latest"


@pytest.mark.filterwarnings("ignore::FutureWarning:google")
def test_a_secret_is_fetched_by_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import google.auth
    from google.auth.credentials import AnonymousCredentials

    monkeypatch.setattr(google.auth, "default", lambda scopes: (AnonymousCredentials(), None))
    environment = {VARIABLE: f"HF_TOKEN={REFERENCE}"}
    with running() as server:
        monkeypatch.setattr("dylo_moe.cloud.secrets.SERVICE", f"http://127.0.0.1:{server.server_port}/v1")
        assert load_secrets(environment) == {"HF_TOKEN": "a secret"}
        assert load_secrets({**environment, "HF_TOKEN": "mine"}) == load_secrets({}) == {}
        assert [one["path"] for one in server.requests] == [f"/v1/{REFERENCE}:access"]
        server.secret_status = 403
        with pytest.raises(CloudError, match=r"HTTP 403.*secretAccessor"):
            load_secrets(environment)
    with pytest.raises(CloudError, match=f"the secret {REFERENCE} for HF_TOKEN cannot be fetched: "):
        load_secrets(environment)


@pytest.mark.filterwarnings("ignore::FutureWarning:google")
def test_without_credentials_no_secret_is_requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(CloudError, match=f"{VARIABLE} is set, but this machine has no credentials"):
        load_secrets({VARIABLE: f"HF_TOKEN={REFERENCE}"})


def test_a_secret_given_instead_of_its_reference_is_not_repeated() -> None:
    with pytest.raises(CloudError) as caught:
        load_secrets({VARIABLE: f"HF_TOKEN={TOKEN}"})
    assert TOKEN not in str(caught.value)
