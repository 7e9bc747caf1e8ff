"""A local Weights & Biases server: enough of the protocol for runs and artifacts of the real client.

The client (its Python part and the program that it starts) is the real one; ``WANDB_BASE_URL`` has the server's
address. The server answers the GraphQL operations and file transfers of a run that logs, puts artifacts and fetches
them, as observed with wandb 0.31; any other operation is an error, which the client reports.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

KEY = "0123456789" * 4


class FakeWandb:
    """The server and its data.

    Attributes:
        artifacts: Artifacts by ``entity/project/name:version``, with each alias as a version too.
        blobs: Uploaded contents by path.
        runs: Ids of the runs that were started.
        history: Bodies of the logging requests.
        unknown: Operations that the server does not know.
        gone: Whether the server was stopped.
    """

    def __init__(self) -> None:
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.runs: set[str] = set()
        self.history: list[str] = []
        self.unknown: list[str] = []
        self.gone = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address for ``WANDB_BASE_URL``."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Stop the server: nothing listens at its address any longer."""
        if self.gone:
            return
        self.gone = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def damage(self, reference: str, name: str) -> None:
        """Flip one bit of a stored file of an artifact."""
        path = self._file(self.artifacts[reference], name)
        self.blobs[path] = bytes([self.blobs[path][0] ^ 1]) + self.blobs[path][1:]

    # Operations, under the client's names; each takes the variables and returns the ``data`` of the answer.

    def Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        user = {"id": "u1", "entity": "me", "username": "me", "email": None, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": user}

    GetDefaultEntity = Viewer

    def RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        project = self._project(given)
        return {"model": {**project, "bucket": self._run(given) if given["name"] in self.runs else None}}

    def UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        inserted = given["name"] not in self.runs
        self.runs.add(given["name"])
        return {"upsertBucket": {"bucket": self._run(given), "inserted": inserted}}

    def ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def OrganizationCoreWeaveOrganizationID(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._url(f"run/{name}")} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        wanted = given["input"]
        collection = f"{wanted['entityName']}/{wanted['projectName']}/{wanted['artifactCollectionName']}"
        index = sum(":v" in name and name.startswith(f"{collection}:") for name in self.artifacts)
        artifact = {**wanted, "index": index, "id": _encoded(f"Artifact:{collection}:v{index}"), "state": "PENDING"}
        for version in (f"v{index}", *[alias["alias"] for alias in wanted["aliases"]]):
            self.artifacts[f"{collection}:{version}"] = artifact
        return {"createArtifact": {"artifact": self._created(artifact)}}

    def CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        path = f"manifest/{given['artifactID']}"
        file = {"id": "f", "name": path, "displayName": path, "uploadUrl": self._url(path), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    def UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        path = f"manifest/{given['artifactManifestID']}"
        file = {"id": "f", "name": path, "displayName": path, "uploadUrl": self._url(path), "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": given["artifactManifestID"], "file": file}}}

    def CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in given["input"]["artifactFiles"]:
            path = f"artifact/{file['artifactID']}/{file['name']}"
            node = {"id": path, "name": file["name"], "displayName": file["name"], "uploadUrl": self._url(path)}
            node |= {"storagePath": path, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": {**node, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._by_id(given["artifactID"])
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def ArtifactByID(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"artifact": self._described(self._by_id(given["id"]))}

    def ArtifactMembershipByName(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts.get(f"{given['entity']}/{given['project']}/{given['name']}")
        if artifact is None:
            return {"project": {"artifactCollectionMembership": None}}
        described = self._described(artifact)
        collection = {**described["artifactSequence"], "__typename": "ArtifactSequence"}
        membership = {"id": "m", "versionIndex": artifact["index"], "createdAt": "2026-01-01T00:00:00Z", "aliases": []}
        return {
            "project": {
                "artifactCollectionMembership": {
                    "__typename": "ArtifactCollectionMembership",
                    "artifactCollection": collection,
                    "artifact": described,
                    **membership,
                }
            }
        }

    def FetchArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"artifact": {"currentManifest": {"file": {"directUrl": self._url(f"manifest/{given['id']}")}}}}

    def GetArtifactMembershipFileUrls(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[f"{given['entity']}/{given['project']}/{given['collection']}:{given['alias']}"]
        names = json.loads(self.blobs[f"manifest/{artifact['id']}"])["contents"]
        nodes = [
            {"__typename": "File", "name": name, "directUrl": self._url(self._file(artifact, name))} for name in names
        ]
        files = {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": [{"node": node} for node in nodes]}
        sequence = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": sequence}}

    def _created(self, artifact: dict[str, Any]) -> dict[str, Any]:
        return {"id": artifact["id"], "state": artifact["state"], "artifactSequence": {"latestArtifact": None}}

    def _described(self, artifact: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p1", "internalId": _encoded("Project:1"), "name": artifact["projectName"]}
        project["entity"] = {"name": artifact["entityName"]}
        sequence = {
            "__typename": "ArtifactSequence",
            "name": artifact["artifactCollectionName"],
            "project": project,
        }
        contents = json.loads(self.blobs[f"manifest/{artifact['id']}"])["contents"]
        return {
            "__typename": "Artifact",
            "id": artifact["id"],
            "artifactSequence": sequence,
            "versionIndex": artifact["index"],
            "artifactType": {"name": artifact["artifactTypeName"]},
            "description": None,
            "metadata": artifact["metadata"],
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": artifact["state"],
            "size": sum(entry["size"] for entry in contents.values()),
            "digest": artifact["digest"],
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "abc",
            "fileCount": len(contents),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
            "aliases": [],
        }

    def _file(self, artifact: dict[str, Any], name: str) -> str:
        return f"artifact/{artifact['id']}/{name}"

    def _by_id(self, identity: str) -> dict[str, Any]:
        return next(artifact for artifact in self.artifacts.values() if artifact["id"] == identity)

    def _project(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"id": "p1", "name": given["project"], "entity": {"id": "e1", "name": given["entity"] or "me"}}

    def _run(self, given: dict[str, Any]) -> dict[str, Any]:
        lines = {f"{kind}LineCount": 0 for kind in ("log", "history", "events")}
        tails = {
            "historyTail": "[]",
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
        }
        names = {"id": _encoded(f"Run:{given['name']}"), "name": given["name"], "displayName": given["name"]}
        return {**lines, **tails, **names, "tags": [], "notes": "", "sweepName": None, "project": self._project(given)}

    def _url(self, path: str) -> str:
        return f"{self.url}/storage/{quote(path, safe='')}"


class _Handler(BaseHTTPRequestHandler):
    """Handler of one request."""

    fake: FakeWandb
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fake.gone:  # for open connections too
            self.close_connection = True
            return
        area, _, rest = self.path.lstrip("/").partition("/")
        if area == "storage":
            self._storage(unquote(rest), body)
        elif area == "graphql":
            self._graphql(json.loads(body))
        else:  # metrics, logs and the client's own telemetry
            if "file_stream" in self.path:
                self.fake.history.append(body.decode())
            self._answer(b"{}")

    do_GET = do_PUT = do_POST = handle_request

    def _storage(self, path: str, body: bytes) -> None:
        if self.command == "PUT":
            self.fake.blobs[path] = body
            self._answer(b"")
        else:
            self._answer(self.fake.blobs[path])

    def _graphql(self, request: dict[str, Any]) -> None:
        expected = base64.b64encode(f"api:{KEY}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            self._answer(b'{"errors": [{"message": "user is not logged in"}]}', 401)
            return
        name = request["query"].replace("{", " ").replace("(", " ").split()[1]
        operation: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self.fake, name, None)
        if operation is None:
            self.fake.unknown.append(" ".join(request["query"].split()) + json.dumps(request.get("variables")))
            message = {"errors": [{"message": f"unknown operation {name}"}]}
            self._answer(json.dumps(message).encode(), 400)
            return
        self._answer(json.dumps({"data": operation(request.get("variables") or {})}).encode())

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", hashlib.md5(body).hexdigest())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
