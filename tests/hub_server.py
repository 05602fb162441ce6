"""A Hub of models on 127.0.0.1, in memory: the endpoints that uploading, loading and asking for metadata use.

Source: huggingface_hub's `hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`, and https://huggingface.co/.well-known/openapi.json.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_someone"
USER = "someone"


@dataclass
class Hub:
    """What was uploaded: the files of each repository, commit by commit."""

    endpoint: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        commits = self.commits[repository]
        return commits[
            -1 if revision == "main" else [self.sha(repository, i) for i in range(len(commits))].index(revision)
        ]

    def sha(self, repository: str, index: int = -1) -> str:
        return hashlib.sha1(f"{repository} {index % len(self.commits[repository])}".encode()).hexdigest()


class _Refused(Exception):
    """(status, the error code by which huggingface_hub tells causes apart)."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, self.path)
                if match and method == self.command.replace("HEAD", "GET"):
                    if (
                        method != "GET"
                        and self.headers.get("Authorization") != f"Bearer {TOKEN}"
                        and "/lfs/" not in pattern
                    ):
                        raise _Refused(401, "Unauthorized")
                    content, headers = answer(self, body, **match.groupdict())
                    return self.send(200, content, headers)
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise _Refused(404, "NotFound")
        except _Refused as refused:
            status, code = refused.args
            self.send(status, {"error": code}, {"X-Error-Code": code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def send(self, status: int, content: bytes | dict | list, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def commit_of(self, repository: str, revision: str) -> tuple[dict[str, bytes], str]:
        if repository not in self.hub.commits:
            raise _Refused(404, "RepoNotFound")
        try:
            files = self.hub.files(repository, revision)
        except ValueError as error:
            raise _Refused(404, "RevisionNotFound") from error
        return files, self.hub.sha(repository) if revision == "main" else revision

    def whoami(self, body: bytes):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, "Unauthorized")
        return {"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []}, {}

    def create(self, body: bytes):
        asked = json.loads(body)
        repository = f"{asked.get('organization') or USER}/{asked['name']}"
        if repository.split("/")[0] != USER:
            raise _Refused(403, "Forbidden")
        if repository in self.hub.commits:
            return {"url": f"{self.hub.endpoint}/{repository}", "name": repository, "id": repository}, {}
        self.hub.commits[repository] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repository)
        return {"url": f"{self.hub.endpoint}/{repository}", "name": repository, "id": repository}, {}

    def validate_card(self, body: bytes):
        return {"errors": [], "warnings": []}, {}

    def preupload(self, body: bytes, repository: str, revision: str):
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]
        return {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]}, {}

    def lfs_batch(self, body: bytes, repository: str):
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "BadRequest")
        self.hub.blobs[oid] = body
        return {}, {}

    def commit(self, body: bytes, repository: str, revision: str):
        files = dict(self.commit_of(repository, revision)[0])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.blobs[line["value"]["oid"]]
        self.hub.commits[repository].append(files)
        sha = self.hub.sha(repository)
        return {"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{sha}", "commitOid": sha, "success": True}, {}

    def info(self, body: bytes, repository: str, revision: str | None = None):
        files, sha = self.commit_of(repository, revision or "main")
        return {"id": repository, "sha": sha, "private": False, "siblings": [{"rfilename": name} for name in files]}, {}

    def tree(self, body: bytes, repository: str, revision: str, path: str | None = None):
        files, _ = self.commit_of(repository, revision)
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
            if name.startswith(f"{path}/" if path else "")
        ]
        if path and not entries:
            raise _Refused(404, "EntryNotFound")
        return entries, {}

    def file(self, body: bytes, repository: str, revision: str, path: str):
        files, sha = self.commit_of(repository, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        return files[path], {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}


_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/{_REPOSITORY}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_upload),
    ("POST", f"/api/models/{_REPOSITORY}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", f"/api/models/{_REPOSITORY}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _Handler.tree),
    ("GET", f"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.file),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub while the block runs. `unknown` lists requests that it had no answer for."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
