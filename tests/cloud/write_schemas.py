"""Writes the schemas that the recipes are checked against, from the packages that have them:

    python -m venv schemas && schemas/bin/pip install kubernetes-validate==1.37.0 skypilot==0.14.1
    schemas/bin/python tests/cloud/write_schemas.py

These packages are large and have many dependencies, so they are not development dependencies; use a separate
environment. Both are under the Apache License 2.0. Only the parts of Job and PersistentVolumeClaim are kept of
Kubernetes, and no descriptions.
"""

import json
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "schemas"
KINDS = ("io.k8s.api.batch.v1.Job", "io.k8s.api.core.v1.PersistentVolumeClaim")


def kubernetes() -> dict[str, Any]:
    """Return the strict schemas of the newest version, in which an unknown field is an error."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema"
    minor = version("kubernetes-validate").rpartition(".")[0]
    every = json.loads((folder / f"v{minor}.0-local-strict" / "_definitions.json").read_text())["$defs"]
    pending, kept = list(KINDS), {}
    while pending:
        name = pending.pop()
        if name not in kept:
            kept[name] = _without_descriptions(every[name])
            pending += re.findall(r'"#/\$defs/([^"]+)"', json.dumps(kept[name]))
    return kept


def skypilot() -> dict[str, Any]:
    """Return the schemas of a task, its resources and its storage, as SkyPilot's server uses them."""
    from sky.utils import schemas

    schemas._allow_additional_properties = lambda: False  # additions of server plug-ins are not used here
    task = schemas.get_task_schema()
    del task["properties"]["config"]
    return {"task": task, "resources": schemas.get_resources_schema(), "storage": schemas.get_storage_schema()}


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_descriptions(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _without_descriptions(part)
        for name, part in schema.items()
        if not (name.startswith("x-kubernetes") or (name == "description" and isinstance(part, str)))
    }


def _write(package: str, schemas: dict[str, Any]) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(schemas[name])}" for name in sorted(schemas)]
    head = f'  "": "from {package} {version(package)}, Apache License 2.0"'
    (FOLDER / f"{package}.json").write_text("{\n" + ",\n".join([head, *lines]) + "\n}\n")


if __name__ == "__main__":
    _write("kubernetes-validate", kubernetes())
    _write("skypilot", skypilot())
