"""A small Hub on the loopback interface: what huggingface_hub asks for when it downloads and uploads models.

It keeps repositories in memory, asks for tokens, redirects large files as the Hub does, answers range requests, and
breaks transfers on demand. Use: `with HubServer() as hub: hub.add("user/adapter", files)`, and `hub.environment(...)`
for a process that should talk to it, because huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "r" * 20
LARGE = (".safetensors", ".pth", ".bin")


@dataclass
class Repository:
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = self.commits.get(self.branches.get(branch, ""), {}) | files
        self.branches[branch] = sha
        return sha


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    sent: int  # bytes of the body
    has_token: bool


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[Request] = []
        self.break_after: int | None = None  # bytes of the next large file, after which the connection is gone
        self.out_of_order = False  # large files cannot be had at all
        self.busy: dict[str, int] = {}  # method -> how many of the next requests for files are answered with 503
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        self.port = 0

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        self.port = self.http.server_address[1]  # the same one when it is started again
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.connections):  # those that clients keep alive
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """The environment of a process that knows no other Hub. Args: home: where its cache and token are."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        here = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return own | here | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | changes

    def add(self, name: str, files: Path | dict[str, bytes], branch: str = "main", **options: bool) -> str:
        """A commit with these files, in a repository that is made if there is none; gives its hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        repository = self.repositories.setdefault(name, Repository(name, **options))
        return repository.commit(files, branch)

    def downloads(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.path.startswith("/cdn/")]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.record = Request(self.command, path, self.headers.get("Range"), 0, "Authorization" in self.headers)
            self.hub.requests.append(self.record)
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                return getattr(self, method)(**match.groupdict())
        self.send(404, {"error": f"no such page {path}"})
        return None

    def send(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.record.sent += len(body)

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self.send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **headers)

    # ---- who may see what ----

    @property
    def knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def open(self, name: str, *, writes: bool = False) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.knows_token):
            status = 404 if self.knows_token else 401  # the Hub does not tell strangers which names exist
            self.refuse(status, "RepoNotFound", "Repository not found")
        elif writes and not self.knows_token:
            self.refuse(401, "", "Invalid username or password.")
        elif repository.gated and not self.knows_token:
            self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return repository
        return None

    def files_at(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = repository.branches.get(revision, revision)
        if commit in repository.commits:
            return commit, repository.commits[commit]
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # ---- reading ----

    def info(self, name: str, revision: str = "main") -> None:
        if (repository := self.open(name)) and (found := self.files_at(repository, revision)):
            facts = {"id": name, "modelId": name, "private": repository.private, "sha": found[0], "tags": []}
            self.send(200, facts | {"siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, name: str, revision: str) -> None:
        if (repository := self.open(name)) and (found := self.files_at(repository, revision)):
            entries = [{"type": "file", "path": p, "size": len(c), "oid": _sha1(c)} for p, c in found[1].items()]
            self.send(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        if self.is_busy():
            return
        if not ((repository := self.open(name)) and (found := self.files_at(repository, revision))):
            return
        commit, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
            return
        content = files[path]
        if not path.endswith(LARGE):
            self.send(200, content, ETag=f'"{_sha1(content)}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
            return
        sha = hashlib.sha256(content).hexdigest()
        self.hub.objects[sha] = content
        large = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
        # another host, as the Hub's is: the client must not send its token there
        self.send(302, Location=f"http://localhost:{self.hub.port}/cdn/{sha}", **large)

    def is_busy(self) -> bool:
        with self.hub.lock:
            if left := self.hub.busy.get(self.command, 0):
                self.hub.busy[self.command] = left - 1
        if left:
            self.send(503, b"busy")
        return left > 0

    def large_file(self, sha: str) -> None:
        if self.is_busy():
            return
        content, status, headers = self.hub.objects[sha], 200, {"ETag": f'"{sha}"', "Accept_Ranges": "bytes"}
        if self.record.range:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.record.range)[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        if self.hub.out_of_order:
            self.send(500, b"out of order")
        elif self.command == "HEAD" or self.hub.break_after is None:
            self.send(status, content, **headers)
        else:
            part, self.hub.break_after = content[: self.hub.break_after], None
            self.send(status, part, **headers, Content_Length=str(len(content)))
            self.close_connection = True

    # ---- writing ----

    def create(self) -> None:
        if not self.knows_token:
            self.refuse(401, "", "Invalid username or password.")
            return
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.add(name, {".gitattributes": b""}, private=private)
        self.send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def branch(self, name: str, branch: str) -> None:
        if repository := self.open(name, writes=True):
            if branch in repository.branches:
                self.send(409, {"error": "Reference already exists"})
                return
            repository.branches[branch] = repository.branches["main"]
            self.send(200, {})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.open(name, writes=True):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        if self.open(name, writes=True):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{each['oid']}"}}}
                for each in json.loads(self.body)["objects"]
            ]
            self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, sha: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha:
            self.send(422, {"error": "wrong hash"})
            return
        self.hub.objects[sha] = self.body
        self.send(200)

    def commit(self, name: str, revision: str) -> None:
        repository = self.open(name, writes=True)
        if repository is None or self.files_at(repository, revision) is None:
            return
        files: dict[str, bytes] = {}
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (rf"/api/models/{NAME}/tree/{REVISION}", "tree"),
    (rf"/api/models/{NAME}/preupload/{REVISION}", "preupload"),
    (rf"/api/models/{NAME}/commit/{REVISION}", "commit"),
    (rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", "branch"),
    (rf"/api/models/{NAME}/revision/{REVISION}", "info"),
    (rf"/api/models/{NAME}", "info"),
    (rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    (rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/cdn/(?P<sha>\w+)", "large_file"),
    (r"/upload/(?P<sha>\w+)", "upload"),
]


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
