"""A double of the Hugging Face Hub on loopback: enough of its HTTP API for the real client to publish and download.

Repositories live in memory. Git is left out: a commit is a whole dictionary of files under an invented hash. Large
files go through the LFS protocol; switch Xet off in the client, its storage has no double here.
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
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

WRITER = "hf_writer"  # the only token the double knows


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, dict(files)))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files


class HubDouble:
    """What the Hub holds, what it was asked, and what it shall do wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.status: int | None = None  # answer everything with this
        self.before_commit = lambda: None  # what somebody else does in the meantime
        self.endpoint = ""

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, **options) -> Repository:
        repository = self.repositories[repo_id] = Repository(**options)
        repository.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        if files:
            repository.commit("by hand", {**repository.files, **files})
        return repository

    def downloaded(self) -> set[str]:
        return {line.rsplit("/", 1)[1] for line in self.requests if re.match(r"GET .*/resolve/", line)}


@contextmanager
def connected(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A double that Hugging Face's client speaks to until the block ends, with caches in `home`."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with running() as double:
        # The client reads its environment once, on import.
        monkeypatch.setattr(constants, "ENDPOINT", double.endpoint)
        template = f"{double.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "harnesses.json"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # proxies are read when a session opens
        yield double
        huggingface_hub.close_session()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5, a client of many threads waits a second for its connection


@contextmanager
def running() -> Iterator[HubDouble]:
    """A double that serves until the block ends."""
    double = HubDouble()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": double}))
    double.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_large(path) else _git_hash(content)


def _entry(name: str, files: dict[str, bytes]) -> dict[str, object]:
    content = files[name]
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
    if _is_large(name):
        entry["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    double: HubDouble

    def do_GET(self):
        self._route()

    def do_HEAD(self):
        self._route()

    def do_POST(self):
        self._route()

    def do_PUT(self):
        self._route()

    def log_message(self, format, *args):
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.double.requests.append(f"{self.command} {path}")
        if self.double.status is not None:
            return self._fail(self.double.status, None, "as the test wants")
        for method, pattern, answer in (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("GET", r"/api/models/([^/]+/[^/]+)()", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths_info),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/large/([0-9a-f]{64})", self._lfs_upload),
            ("POST", r"/large/([0-9a-f]{64})/verify", self._lfs_verify),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return answer(body, *match.groups())
        return self._fail(404, None, "no such address")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _fail(self, status: int, code: str | None, message: str) -> None:
        self._json({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITER}"

    def _readable(self, repo_id: str) -> Repository | None:
        repository = self.double.repositories.get(repo_id)
        if repository is None or (repository.private and not self._logged_in()):
            # The Hub answers an anonymous client 401 without a code, which the client takes for "not found" over
            # https only; the code makes it do so on loopback.
            status = 404 if self._logged_in() else 401
            self._fail(status, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _commit_at(self, repo_id: str, revision: str) -> tuple[Repository, Commit] | None:
        repository = self._readable(repo_id)
        if repository is None:
            return None
        commit = repository.at(revision or "main")
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _create(self, body: bytes) -> None:
        if not self._logged_in():
            return self._fail(401, None, "Invalid username or password.")
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}"
        if request["organization"] == "somebody-else":
            return self._fail(403, None, "You don't have the rights to create a model under this namespace")
        answer = {"url": f"{self.double.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.double.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        self.double.create(repo_id, private=request.get("visibility") == "private")
        return self._json(answer)

    def _validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        errors = []
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", metadata.get("base_model", "a/b")):
            errors.append({"message": '"base_model" is not valid'})
        if metadata.get("license", "mit") not in ("mit", "apache-2.0", "llama3.1", "other"):
            errors.append({"message": '"license" must be one of those'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._commit_at(repo_id, revision):
            repository, commit = found
            siblings = [{"rfilename": name} for name in commit.files]
            self._json({"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings})

    def _tree(self, body: bytes, repo_id: str, revision: str, folder: str | None) -> None:
        if found := self._commit_at(repo_id, revision):
            files, home = found[1].files, f"{folder}/" if folder else ""
            below = [name for name in files if name.startswith(home)]
            if folder and not below:
                return self._fail(404, "EntryNotFound", f"{folder} does not exist")
            recursive = "recursive=true" in self.path.lower()
            entries = [_entry(name, files) for name in below if recursive or "/" not in name.removeprefix(home)]
            parents = {str(parent) for name in below for parent in PurePosixPath(name).parents}
            folders = sorted(name for name in parents if name.startswith(home) and name not in (".", folder))
            entries += [
                {"type": "directory", "path": name, "oid": _git_hash(name.encode())}
                for name in folders
                if recursive or "/" not in name.removeprefix(home)
            ]
            self._json(entries)
        return None

    def _paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._commit_at(repo_id, revision):
            asked = json.loads(body)["paths"]
            self._json([_entry(name, found[1].files) for name in asked if name in found[1].files])

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._commit_at(repo_id, revision):
            there = found[1].files
            answers = []
            for file in json.loads(body)["files"]:
                name = file["path"]
                answer = {"path": name, "uploadMode": "lfs" if _is_large(name) else "regular", "shouldIgnore": False}
                answers.append(answer | ({"oid": _oid(name, there[name])} if name in there else {}))
            self._json({"files": answers})

    def _lfs_batch(self, body: bytes, repo_id: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.double.large:
                address = f"{self.double.endpoint}/large/{entry['oid']}"
                entry["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._fail(400, None, "another content than announced")
        self.double.large[oid] = body
        return self._send(200, b"")

    def _lfs_verify(self, body: bytes, oid: str) -> None:
        self._send(200 if oid in self.double.large else 404, b"")

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if not self._logged_in():
            return self._fail(401, None, "Invalid username or password.")
        self.double.before_commit()
        repository = self.double.repositories[repo_id]
        files, header = dict(repository.files), {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.double.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    return self._fail(400, None, f"unknown operation {other}")
        if header.get("parentCommit") not in (None, repository.commits[-1].oid):
            return self._fail(412, None, "A commit has happened since. Please refresh and try again.")
        commit = repository.commit(header["summary"], files)
        address = f"{self.double.endpoint}/{repo_id}/commit/{commit.oid}"
        return self._json({"success": True, "commitOid": commit.oid, "commitUrl": address})

    def _resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        if found := self._commit_at(repo_id, revision):
            repository, commit = found
            if repository.gated:
                return self._fail(403, "GatedRepo", f"Access to model {repo_id} is restricted")
            if name not in commit.files:
                return self._fail(404, "EntryNotFound", "Entry not found")
            content, headers = (
                commit.files[name],
                {"X_Repo_Commit": commit.oid, "ETag": f'"{_oid(name, commit.files[name])}"'},
            )
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
                if first > last:
                    return self._fail(416, None, "Range not satisfiable")
                part = content[first : last + 1]
                return self._send(206, part, Content_Range=f"bytes {first}-{last}/{len(content)}", **headers)
            self._send(200, content, **headers)
        return None
