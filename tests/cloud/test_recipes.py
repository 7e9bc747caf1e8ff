"""The recipes for Kubernetes and SkyPilot are valid, and both resume an interrupted run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from dylo_moe.config.commands import TrainConfig
from dylo_moe.config.parser import parse
from dylo_moe.errors import EXIT_STOPPED, EXIT_USER_ERROR

RECIPES = Path(__file__).parents[2] / "recipes" / "cloud"
SCHEMAS = Path(__file__).with_name("schemas")
KINDS = {"Job": "io.k8s.api.batch.v1.Job", "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim"}


def schemas_of(package: str) -> dict[str, Any]:
    schemas: dict[str, Any] = json.loads((SCHEMAS / f"{package}.json").read_text())
    assert schemas.pop("").startswith(f"from {package} ")
    return schemas


def errors_of(manifest: dict[str, Any]) -> list[str]:
    """Return the errors that Kubernetes would report."""
    schema = {"$ref": f"#/$defs/{KINDS[manifest['kind']]}", "$defs": schemas_of("kubernetes-validate")}
    return [error.message for error in Draft202012Validator(schema).iter_errors(manifest)]


def errors_of_task(task: dict[str, Any]) -> list[str]:
    """Return the errors that SkyPilot would report; it checks a task, its resources and each storage separately."""
    schemas = schemas_of("skypilot")
    parts = [("task", task), ("resources", task["resources"])]
    parts += [("storage", mount) for mount in task["file_mounts"].values()]
    return [error.message for name, part in parts for error in Draft202012Validator(schemas[name]).iter_errors(part)]


def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    return claim, job


def sky() -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((RECIPES / "sky.yaml").read_text())
    return task


def test_the_manifests_are_valid_for_kubernetes() -> None:
    claim, job = manifests()
    assert errors_of(claim) == errors_of(job) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("backoffLimits",), 6),
        (("template", "spec", "containers", 0, "resources", "limit"), {}),
        (("template", "spec", "containers", 0, "env", 0, "valueFrom", "secretRef"), {}),
        (("podFailurePolicy", "rules", 0, "onExitCodes", "values"), ["75"]),
    ],
)
def test_the_schema_of_kubernetes_finds_mistakes(path: tuple[str | int, ...], value: object) -> None:
    _, job = manifests()
    part: Any = job["spec"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert errors_of(job)


def test_the_kubernetes_job_resumes_an_interrupted_run() -> None:
    _, job = manifests()
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [EXIT_USER_ERROR], "Ignore": [EXIT_STOPPED]}
    (container,) = pod["containers"]
    assert container["args"][0] == "--train"
    flags = parse(TrainConfig, "train", "", container["args"][1:])
    assert flags.training.resume_from_checkpoint == "auto"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts[str(Path(flags.training.output_dir).parent)] == "data"
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert all("value" not in entry for entry in container["env"]), "secrets come by reference"


def test_the_task_is_valid_for_skypilot() -> None:
    assert errors_of_task(sky()) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("secret",), {}),
        (("resources", "use_spots"), True),
        (("resources", "job_recovery", "recover_on_exit_code"), [75]),
        (("resources", "job_recovery", "recover_on_exit_codes"), [756]),
        (("file_mounts", "/checkpoints", "modus"), "MOUNT"),
    ],
)
def test_the_schema_of_skypilot_finds_mistakes(path: tuple[str, ...], value: object) -> None:
    task = sky()
    part: Any = task
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert errors_of_task(task)


def test_the_sky_task_resumes_an_interrupted_run() -> None:
    task = sky()
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_STOPPED]
    assert task["secrets"] == {"HF_TOKEN": None}
    command = task["run"].replace("\\\n", "").partition("--train")[2].replace('"', "").split()
    flags = parse(TrainConfig, "train", "", command)
    assert flags.training.resume_from_checkpoint == "auto" and flags.training.save_in_place
    (mount,) = task["file_mounts"]
    assert Path(flags.training.output_dir).is_relative_to(mount)
