"""A stand-in for the Hub on loopback: repositories with commits, branches and large files, tokens, and trouble.

It answers what huggingface_hub asks, over the plain LFS protocol where HF_HUB_DISABLE_XET is set, else as `stand_in_xet`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml
from stand_in_xet import ROUTES as XET_ROUTES
from stand_in_xet import TOKEN as XET_TOKEN
from stand_in_xet import Xet

REPO = "me/tiny"
TOKEN = "hf_mineAndSecret"
LARGE = (".safetensors", ".pt", ".onnx")  # what a repository's .gitattributes sends to large file storage


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "", sha: str | None = None) -> str:
        sha = sha or hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def head(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class Fault:
    """What to do to requests of a method whose path has a part: answer with a status, or cut after so many bytes."""

    method: str
    part: str
    status: int = 0
    cut: int | None = None
    times: int = 1 << 30
    headers: dict[str, str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # what arrived in large file storage, by sha256
        self.xet = Xet()
        self.tokens: dict[str, tuple[str, bool]] = {}  # token -> (user, may write)
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.asked: list[str] = []  # files whose content was fetched
        self.received = self.sent = 0  # bytes of large files, either way
        self.part_bytes: int | None = None  # larger files come in parts of so many bytes
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.hook: Callable[[str], None] = lambda request: None
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # connections that break are what some tests are about

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.part in path and fault.times:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms behind its headers
    server: Hub

    # ---- answers

    def answer(self, status, body: bytes | dict | list = b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code="", message=""):
        headers = {"X-Error-Code": code} if code else {}
        self.answer(status, {"error": message}, **headers, **({"X-Error-Message": message} if message else {}))

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(2)

    # ---- requests

    def handle_any(self):
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        self.server.hook(f"{self.command} {path}")
        fault = self.trouble = self.server.fault(self.command, path)
        if fault and fault.status:
            self.body()
            self.send_response(fault.status)
            for key, value in {"Content-Length": "0", **fault.headers}.items():
                self.send_header(key, value)
            return self.end_headers()
        if fault and fault.cut is not None and self.command != "GET":
            self.rfile.read(min(fault.cut, int(self.headers.get("Content-Length", 0))))
            return self.cut()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (*self.server.tokens, XET_TOKEN) and not path.startswith("/large/"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        self.user, self.writes = self.server.tokens.get(token, (None, False))
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.path.partition('?')[0]}"):
                return handle(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
        return self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def repository(self, repo, *, write=False) -> Repository | None:
        """None, and an answer given, where the user may not see it or write to it."""
        data = self.server.repositories.get(repo)
        if data is None or (data.private and not self.owns(repo)):
            return self.refuse(404 if self.user else 401, "RepoNotFound")
        if write and not (self.owns(repo) and self.writes):
            return self.refuse(403, message="You don't have the rights to write here")
        return data

    def owns(self, repo):
        return self.user is not None and repo.partition("/")[0] == self.user

    def revision(self, data, name) -> str | None:
        sha = data.branches.get(name, name)
        return sha if sha in data.commits else self.refuse(404, "RevisionNotFound")

    def create(self):
        asked = json.loads(self.body())
        if self.user is None:
            return self.refuse(401, message="no token")
        repo = f"{asked['organization']}/{asked['name']}"
        if not (self.writes and self.owns(repo)):
            return self.refuse(403, message=f"You don't have the rights to create a model under {repo}")
        if repo in self.server.repositories:
            return self.answer(409, {"url": f"{self.server.address}/{repo}"})
        data = self.server.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        data.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, {"url": f"{self.server.address}/{repo}"})

    def info(self, repo, revision=None):
        if (data := self.repository(repo)) and (sha := self.revision(data, revision or "main")):
            siblings = [{"rfilename": name} for name in data.commits[sha]]
            self.answer(200, {"id": repo, "sha": sha, "private": data.private, "siblings": siblings})

    def tree(self, repo, revision):
        if (data := self.repository(repo)) and (sha := self.revision(data, revision)):
            self.answer(200, [_entry(name, content) for name, content in data.commits[sha].items()])

    def branch(self, repo, name):
        asked = json.loads(self.body() or b"{}")
        if data := self.repository(repo, write=True):
            if name in data.branches:
                return self.refuse(409)
            data.branches[name] = asked.get("startingPoint") or data.branches["main"]
            self.answer(200, {})

    def preupload(self, repo, revision):
        asked = json.loads(self.body())
        if (data := self.repository(repo, write=True)) and (sha := self.revision(data, revision)):
            there = data.commits[sha]
            self.answer(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                            "oid": _oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                        }
                        for file in asked["files"]
                    ]
                },
            )

    def batch(self, repo):
        asked = json.loads(self.body())
        if self.repository(repo, write=True):
            self.answer(200, {"objects": [self._transfer(file) for file in asked["objects"]]})

    def _transfer(self, file):
        oid, size, step = file["oid"], file["size"], self.server.part_bytes
        if oid in self.server.large:
            return file
        href = f"{self.server.address}/large/{oid}"
        if not step or size <= step:
            return file | {"actions": {"upload": {"href": href}}}
        parts = {str(n + 1): f"{href}/{n + 1}" for n in range(-(-size // step))}
        return file | {"actions": {"upload": {"href": href, "header": {"chunk_size": str(step), **parts}}}}

    def store(self, oid, part=None):
        data = self.body()
        self.server.received += len(data)
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = data
            return self.answer(200, ETag=f'"{part}"')
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        return self.answer(200)

    def complete(self, oid):
        asked = json.loads(self.body())
        found = b"".join(self.server.parts[oid][part["partNumber"]] for part in asked["parts"])
        assert hashlib.sha256(found).hexdigest() == oid
        self.server.large[oid] = found
        self.answer(200, {})

    def validate(self):
        wrong = _card_errors(json.loads(self.body())["content"])
        self.answer(400 if wrong else 200, {"errors": [{"message": message} for message in wrong], "warnings": []})

    def whoami(self):
        if self.user is None:
            return self.refuse(401, message="no token")
        return self.answer(200, {"type": "user", "name": self.user})

    def commit(self, repo, branch):
        lines = [json.loads(line) for line in self.body().splitlines()]
        data = self.repository(repo, write=True)
        if data is None:
            return None
        header = lines[0]["value"]
        if branch not in data.branches:
            return self.refuse(404, "RevisionNotFound")
        if header.get("parentCommit") not in (None, data.branches[branch]):
            return self.refuse(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(data.head(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                del files[value["path"]]
        sha = data.commit(branch, files, header["summary"])
        if self.trouble and self.trouble.cut is not None:
            return self.cut()
        return self.answer(200, {"commitUrl": f"{self.server.address}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo, revision, name):
        data = self.repository(repo)
        sha = self.revision(data, revision) if data else None
        if data is None or sha is None:
            return
        content = data.commits[sha].get(name)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        about = {"ETag": f'"{_oid(name, content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if found := self.server.xet.known.get(hashlib.sha256(content).hexdigest()):
            address = f"{self.server.address}/api/models/{repo}/xet-read-token/{sha}"
            about |= {"X-Xet-Hash": found, "Link": f'<{address}>; rel="xet-auth"'}
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            self.server.ranges.append(f"{name} {start}")
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "HEAD":
            return self.answer(200, content, **about)
        self.server.asked.append(name)
        if self.trouble and self.trouble.cut is not None:
            self.send_response(206 if start else 200)
            for key, value in {"Content-Length": str(len(content) - start), **about}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[start : start + self.trouble.cut])
            self.wfile.flush()
            return self.cut()
        self.server.sent += len(content) - start
        return self.answer(206 if start else 200, content[start:], **about)

    def log_message(self, *_):
        pass


NAMED = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{NAMED}", _Handler.info),
    (rf"GET /api/models/{NAMED}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET /api/models/{NAMED}/tree/(?P<revision>.+)", _Handler.tree),
    (rf"POST /api/models/{NAMED}/branch/(?P<name>.+)", _Handler.branch),
    (rf"POST /api/models/{NAMED}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST /api/models/{NAMED}/commit/(?P<branch>.+)", _Handler.commit),
    (rf"POST /{NAMED}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(?P<oid>\w+)", _Handler.store),
    (r"PUT /large/(?P<oid>\w+)/(?P<part>\d+)", _Handler.store),
    (r"POST /large/(?P<oid>\w+)", _Handler.complete),
    (rf"(?:GET|HEAD) /{NAMED}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    *XET_ROUTES,
]


def _card_errors(text):
    """What the Hub has against a card's metadata, of those keys that ours have."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["no metadata"]
    allowed = {
        "license": lambda value: value in ("apache-2.0", "mit", "other"),
        "language": lambda value: all(re.fullmatch("[a-z]{2,3}", code) for code in value),
        "base_model": lambda value: re.fullmatch(r"[\w.-]+/[\w.-]+", value),
        "base_model_relation": lambda value: value in ("adapter", "finetune", "merge", "quantized"),
        "pipeline_tag": lambda value: value == "text-to-speech",
        "library_name": lambda value: re.fullmatch(r"[\w-]+", value),
        "tags": lambda value: all(isinstance(tag, str) for tag in value),
    }
    return [f'"{key}" must be otherwise' for key in data if key not in allowed or not allowed[key](data[key])]


def _oid(name, content):
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name, content):
    entry = {"type": "file", "path": name, "size": len(content), "oid": _oid(name, content)}
    if name.endswith(LARGE):
        entry["oid"] = "0" * 40  # of the pointer file
        entry["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # how soon it ends
    yield server
    server.shutdown()
    server.server_close()
