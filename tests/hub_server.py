"""A loopback Hugging Face Hub: the real client talks to it over HTTP, tests look inside.

It speaks what `huggingface_hub` and `datasets` ask for: whoami-v2, repos/create, branches, validate-yaml,
preupload, LFS batch + PUT + verify, NDJSON commits, revision and model info, trees, paths-info, resolve with
ranges, xet write tokens (a CAS in a local folder). Like the real Hub, a new repo starts with a commit that
holds `.gitattributes`; without a token a repo that may not be seen answers 401, with one 404.

`hub.fail(...)` makes the next matching requests go wrong, before or after they took effect.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

_LFS_SUFFIXES = (".safetensors", ".parquet", ".bin")
_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Rule:
    """What goes wrong: the next `times` requests that match get `status` (0: the connection is cut)."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int
    after: bool = False
    keep_bytes: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    hits: int = 0


@dataclass
class Repo:
    """One model or data set: its commits (newest last), branches, and who may see it."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # sha -> path -> sha256 of the content
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, changes: dict[str, str | None]) -> str:
        """Commit `changes` (path -> sha256, None deletes) to `branch`; return the commit id."""
        parent = self.branches.get(branch, "")
        tree = {**self.commits.get(parent, {}), **changes}
        kept = {path: sha for path, sha in tree.items() if sha is not None}
        commit = hashlib.sha1(json.dumps([self.name, len(self.commits), parent, kept]).encode()).hexdigest()
        self.commits[commit] = kept
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch or commit id, None when there is none."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """State and switches of the loopback Hub."""

    def __init__(self) -> None:
        self.url = ""
        self.reset(Path())

    def reset(self, folder: Path) -> None:
        """Forget everything but the address; `folder` holds the CAS of the xet path."""
        self.folder = folder
        self.tokens: dict[str, tuple[str, str]] = {}  # token -> (user, role: write | read | none)
        self.orgs: dict[str, dict[str, str]] = {}  # user -> organisation -> role in it
        self.scopes: dict[str, list[dict[str, Any]]] = {}  # fine-grained token -> what it may do where
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content that arrived
        self.sizes: dict[str, int] = {}
        self.tampered: dict[str, str] = {}  # sha256 sent -> sha256 that the tree shows
        self.ignored: set[str] = set()  # paths that a .gitignore rule of the repo drops
        self.requests: list[tuple[str, str]] = []
        self.rules: list[Rule] = []

    def add_repo(self, kind: str, name: str, files: dict[str, bytes], **traits: bool) -> Repo:
        """Put a repo there with one commit of `files` after the initial one."""
        repo = self.repos.setdefault((kind, name), Repo(kind, name, **traits))
        if not repo.commits:
            repo.add("main", {".gitattributes": self.store(_GITATTRIBUTES)})
        repo.add("main", {path: self.store(data) for path, data in files.items()})
        return repo

    def store(self, data: bytes) -> str:
        """Keep a content; return its sha256."""
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha], self.sizes[sha] = data, len(data)
        return sha

    def fail(self, method: str, path: str, *, times: int = 1, status: int = 503, **more: Any) -> Rule:
        """Make the next `times` requests whose path matches `path` go wrong."""
        rule = Rule(method, re.compile(path), times, status, **more)
        self.rules.append(rule)
        return rule

    def count(self, method: str, path: str) -> int:
        """How many requests with this method had a path that matches."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def writes(self) -> list[str]:
        """Every request that stored something, in order."""
        return [f"{m} {p}" for m, p in self.requests if m == "PUT" or "/commit/" in p or p.endswith("repos/create")]

    def content(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repo holds at a revision."""
        repo = self.repos[kind, name]
        commit = repo.resolve(revision)
        assert commit is not None
        return {path: self.blobs[sha] for path, sha in repo.commits[commit].items()}


class _Failures:
    """ASGI layer that notes each request and plays the rules."""

    def __init__(self, app: Any, hub: HubServer) -> None:
        self.app, self.hub = app, hub

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        self.hub.requests.append((method, path))
        rule = next((r for r in self.hub.rules if r.times > 0 and r.method == method and r.path.search(path)), None)
        if rule is None:
            await self.app(scope, receive, send)
            return
        rule.times -= 1
        rule.hits += 1
        if rule.after:
            await self.app(scope, receive, _swallow)
        else:
            await _drain(receive)
        if rule.status:
            headers = [(name.lower().encode(), value.encode()) for name, value in rule.headers.items()]
            await send({"type": "http.response.start", "status": rule.status, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "weather"}'})
        elif rule.keep_bytes:
            await self.app(scope, receive, _cut_after(send, rule.keep_bytes))
        else:  # an answer that is promised but never comes: uvicorn closes the connection
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})


async def _swallow(message: Any) -> None:
    """Take an answer that its caller must not see."""


async def _drain(receive: Any) -> None:
    while (await receive()).get("more_body"):
        pass


def _cut_after(send: Any, keep_bytes: int) -> Any:
    left = keep_bytes

    async def cut(message: Any) -> None:
        nonlocal left
        if message["type"] == "http.response.start":
            await send(message)
        elif left > 0:
            body = message["body"][:left]
            left = 0
            await send({"type": "http.response.body", "body": body, "more_body": True})

    return cut


def _error(status: int, message: str, code: str = "") -> JSONResponse:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return JSONResponse({"error": message}, status, headers)


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.response = _error(status, message, code)


def _user(hub: HubServer, request: Request) -> tuple[str, str] | None:
    """Return (name, role) behind the token, None without one; a token that is unknown is refused."""
    header = request.headers.get("authorization", "")
    if not header:
        return None
    user = hub.tokens.get(header.removeprefix("Bearer "))
    if user is None:
        raise _RefusedError(401, "Invalid credentials in Authorization header")
    return user


def _repo(hub: HubServer, request: Request, kind: str, name: str, *, write: bool = False) -> Repo:
    user = _user(hub, request)
    repo = hub.repos.get((kind.rstrip("s"), name))
    hidden = repo is None or (repo.private and (user is None or user[1] == "none"))
    if repo is None or hidden:
        if user is None:
            raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise _RefusedError(404, "Repository not found", "RepoNotFound")
    if write and not _may_write(hub, user, name):
        raise _RefusedError(403, "You don't have the rights to write to this repo with this token")
    return repo


def _may_write(hub: HubServer, user: tuple[str, str] | None, repo: str) -> bool:
    owner = repo.partition("/")[0]
    if user is None or user[1] != "write":
        return False
    return owner == user[0] or hub.orgs.get(user[0], {}).get(owner, "read") != "read"


def _commit_of(repo: Repo, revision: str) -> str:
    commit = repo.resolve(revision)
    if commit is None:
        raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _entry(hub: HubServer, path: str, sha: str) -> dict[str, Any]:
    """One line of a tree: `oid` is git's, LFS files carry their sha256 beside it."""
    shown = hub.tampered.get(sha, sha)
    size = hub.sizes[sha]
    if path.endswith(_LFS_SUFFIXES):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{shown}\nsize {size}\n".encode()
        return {
            "type": "file",
            "path": path,
            "size": size,
            "oid": _git_oid(pointer),
            "lfs": {"oid": shown, "size": size, "pointerSize": len(pointer)},
        }
    data = hub.blobs[sha] if shown == sha else b"tampered"
    return {"type": "file", "path": path, "size": size, "oid": _git_oid(data)}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _folders(paths: list[str]) -> set[str]:
    return {str(parent) for path in paths for parent in Path(path).parents if str(parent) != "."}


def create_app(hub: HubServer) -> FastAPI:
    """Build the app over `hub`'s state."""
    app = FastAPI(openapi_url=None)

    @app.exception_handler(_RefusedError)
    async def refused(request: Request, error: _RefusedError) -> JSONResponse:
        return error.response

    _add_account_routes(app, hub)
    _add_upload_routes(app, hub)
    _add_read_routes(app, hub)
    return app


def _add_account_routes(app: FastAPI, hub: HubServer) -> None:
    @app.get("/api/whoami-v2")
    async def whoami(request: Request) -> Response:
        user = _user(hub, request)
        if user is None:
            return _error(401, "Invalid username or password.")
        role = "fineGrained" if user[1] == "none" else user[1]
        token: dict[str, Any] = {"displayName": "test", "role": role}
        secret = request.headers["authorization"].removeprefix("Bearer ")
        if secret in hub.scopes:
            token["fineGrained"] = {"scoped": hub.scopes[secret], "canReadGatedRepos": False, "global": []}
        orgs = [{"type": "org", "name": n, "roleInOrg": r} for n, r in hub.orgs.get(user[0], {}).items()]
        return JSONResponse({"type": "user", "name": user[0], "orgs": orgs, "auth": {"accessToken": token}})

    @app.post("/api/repos/create")
    async def create_repo(request: Request) -> Response:
        user = _user(hub, request)
        body = await request.json()
        name = f"{body.get('organization') or (user or ['nobody'])[0]}/{body['name']}"
        if not _may_write(hub, user, name):
            return _error(403 if user else 401, "You don't have the rights to create a repo with this token")
        if (body.get("type", "model"), name) in hub.repos:
            told = {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            return JSONResponse(told, 409)
        repo = hub.repos[body.get("type", "model"), name] = Repo(body.get("type", "model"), name)
        repo.private = body.get("visibility") == "private" or bool(body.get("private"))
        repo.add("main", {".gitattributes": hub.store(_GITATTRIBUTES)})
        return JSONResponse({"url": f"{hub.url}/{name}", "name": name})

    @app.post("/api/validate-yaml")
    async def validate_yaml() -> dict[str, list[Any]]:
        return {"errors": [], "warnings": []}


def _add_upload_routes(app: FastAPI, hub: HubServer) -> None:
    @app.post("/api/{kind}/{owner}/{name}/branch/{branch:path}")
    async def branch(request: Request, kind: str, owner: str, name: str, branch: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=True)
        if branch in repo.branches:
            return _error(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return JSONResponse({})

    @app.post("/api/{kind}/{owner}/{name}/preupload/{revision:path}")
    async def preupload(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=True)
        tree = repo.commits[_commit_of(repo, revision)]
        return JSONResponse({"files": [_preuploaded(hub, tree, f) for f in (await request.json())["files"]]})

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request, owner: str, name: str) -> Response:
        _repo(hub, request, "models", f"{owner}/{name}", write=True)
        objects = [_lfs_actions(hub, f"{owner}/{name}", o) for o in (await request.json())["objects"]]
        return JSONResponse({"transfer": "basic", "objects": objects})

    @app.put("/storage/{sha}")
    async def put(request: Request, sha: str) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != sha:
            return _error(400, "BadDigest")
        hub.store(data)
        return Response()

    @app.post("/{owner}/{name}.git/info/lfs/verify")
    async def verify(request: Request, owner: str, name: str) -> Response:
        _repo(hub, request, "models", f"{owner}/{name}", write=True)
        body = await request.json()
        whole = hub.sizes.get(body["oid"]) == body["size"]
        return Response() if whole else _error(422, "Size mismatch")

    @app.post("/api/{kind}/{owner}/{name}/commit/{revision:path}")
    async def commit(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=True)
        _commit_of(repo, revision)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        oid = repo.add(revision, dict(change for line in lines for change in _changes(hub, line)))
        return JSONResponse({"commitUrl": f"{hub.url}/{owner}/{name}/commit/{oid}", "commitOid": oid})

    @app.get("/api/{kind}/{owner}/{name}/xet-write-token/{revision:path}")
    async def xet_token(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        _repo(hub, request, kind, f"{owner}/{name}", write=True)
        return JSONResponse(
            {"casUrl": f"local://{hub.folder}/cas", "accessToken": "xet-jwt", "exp": int(time.time()) + 3600}
        )


def _preuploaded(hub: HubServer, tree: dict[str, str], asked: dict[str, Any]) -> dict[str, Any]:
    path = asked["path"]
    is_lfs = path.endswith(_LFS_SUFFIXES)
    known = tree.get(path)
    oid = known if known is None or is_lfs else _git_oid(hub.blobs[known])
    mode = "lfs" if is_lfs else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": path in hub.ignored, "oid": oid}


def _lfs_actions(hub: HubServer, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["oid"] in hub.blobs:
        return asked
    verify = {"href": f"{hub.url}/{name}.git/info/lfs/verify"}
    return {**asked, "actions": {"upload": {"href": f"{hub.url}/storage/{asked['oid']}"}, "verify": verify}}


def _changes(hub: HubServer, line: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    value = line["value"]
    if line["key"] == "file":
        yield value["path"], hub.store(base64.b64decode(value["content"]))
    elif line["key"] == "lfsFile":
        hub.sizes.setdefault(value["oid"], value.get("size", 0))
        yield value["path"], value["oid"]
    elif line["key"] == "deletedFile":
        yield value["path"], None


def _add_read_routes(app: FastAPI, hub: HubServer) -> None:
    def info(request: Request, kind: str, full: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, full)
        commit = _commit_of(repo, revision)
        siblings = [_sibling(hub, path, sha) for path, sha in sorted(repo.commits[commit].items())]
        gated = "manual" if repo.gated else False
        body = {"id": full, "sha": commit, "private": repo.private, "gated": gated, "siblings": siblings}
        return JSONResponse({**body, "disabled": False, "tags": [], "downloads": 0, "likes": 0})

    @app.get("/api/{kind}/{owner}/{name}/revision/{revision:path}")
    async def at_revision(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        return info(request, kind, f"{owner}/{name}", revision)

    @app.get("/api/{kind}/{owner}/{name}/auth-check")
    async def auth_check(request: Request, kind: str, owner: str, name: str) -> Response:
        _open_gate(hub, request, _repo(hub, request, kind, f"{owner}/{name}"))
        return JSONResponse({})

    @app.get("/api/{kind}/{owner}/{name}/auth-check/write")
    async def auth_check_write(request: Request, kind: str, owner: str, name: str) -> Response:
        _repo(hub, request, kind, f"{owner}/{name}", write=True)
        return JSONResponse({})

    @app.get("/api/{kind}/{owner}/{name}/refs")
    async def refs(request: Request, kind: str, owner: str, name: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}")
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
        return JSONResponse({"branches": branches, "tags": [], "converts": []})

    @app.get("/api/{kind}/{owner}/{name}/tree/{rest:path}")
    async def tree(request: Request, kind: str, owner: str, name: str, rest: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}")
        revision, _, under = rest.partition("/")
        held = repo.commits[_commit_of(repo, revision)]
        found = {path: sha for path, sha in held.items() if not under or path.startswith(f"{under}/")}
        if under and not found:
            return _error(404, "Entry not found", "EntryNotFound")
        if request.query_params.get("recursive", "false").lower() != "true":
            found = {path: sha for path, sha in found.items() if str(Path(path).parent) == (under or ".")}
        return JSONResponse([_entry(hub, path, sha) for path, sha in sorted(found.items())])

    @app.post("/api/{kind}/{owner}/{name}/paths-info/{revision:path}")
    async def paths_info(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}")
        held = repo.commits[_commit_of(repo, revision)]
        asked = (await request.json())["paths"]
        entries = [_entry(hub, path, held[path]) for path in asked if path in held]
        folders = [{"type": "directory", "path": p, "oid": "0" * 40} for p in asked if p in _folders(list(held))]
        return JSONResponse([*entries, *folders])

    @app.get("/api/{kind}/{owner}/{name}")
    async def at_main(request: Request, kind: str, owner: str, name: str) -> Response:
        return info(request, kind, f"{owner}/{name}", "main")

    @app.api_route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def dataset_file(request: Request, owner: str, name: str, revision: str, path: str) -> Response:
        return _file(hub, request, _repo(hub, request, "datasets", f"{owner}/{name}"), revision, path)

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def model_file(request: Request, owner: str, name: str, revision: str, path: str) -> Response:
        return _file(hub, request, _repo(hub, request, "models", f"{owner}/{name}"), revision, path)


def _sibling(hub: HubServer, path: str, sha: str) -> dict[str, Any]:
    entry = _entry(hub, path, sha)
    lfs = {"lfs": {"sha256": sha, "size": entry["size"], "pointerSize": 130}} if "lfs" in entry else {}
    return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"], **lfs}


def _open_gate(hub: HubServer, request: Request, repo: Repo) -> None:
    user = _user(hub, request)
    if repo.gated and (user is None or user[1] == "none"):
        message = f"Access to {repo.kind} {repo.name} is restricted and you are not in the authorized list."
        raise _RefusedError(403 if user else 401, message, "GatedRepo")


def _file(hub: HubServer, request: Request, repo: Repo, revision: str, path: str) -> Response:
    """Answer HEAD and GET of one file, ranges included."""
    _open_gate(hub, request, repo)
    commit = _commit_of(repo, revision)
    sha = repo.commits[commit].get(path)
    if sha is None:
        refused = _error(404, "Entry not found", "EntryNotFound")
        refused.headers["X-Repo-Commit"] = commit
        return refused
    data = hub.blobs[sha]
    etag = sha if path.endswith(_LFS_SUFFIXES) else _git_oid(data)
    headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if path.endswith(_LFS_SUFFIXES):
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(len(data))})
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked:
        first = int(asked[1])
        last = min(int(asked[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Response(data[first : last + 1], 206, headers)
    return Response(data, headers=headers, media_type="application/octet-stream")


@cache
def shared_hub() -> HubServer:
    """Start the one Hub of this process in a daemon thread on a free loopback port."""
    hub = HubServer()
    config = uvicorn.Config(
        _Failures(create_app(hub), hub), host="127.0.0.1", port=0, log_level="critical", lifespan="off", loop="asyncio"
    )
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, name="loopback-hub", daemon=True).start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the loopback Hub did not start"
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    return hub


def client_environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Environment of a subprocess whose huggingface_hub and datasets know only the loopback Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


WRITE, READ, NOBODY = "hf_writeTokenOfTheTests", "hf_readTokenOfTheTests", "hf_nobodysTokenOfTheTests"


@pytest.fixture(name="hub")
def hub_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A loopback Hub with three tokens; the client library is online for it, retries without waiting.

    Constants are patched as the library's own tests do: it reads the environment at import, and our
    conftest sets it offline. Only the loopback endpoint is reachable.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    hub = shared_hub()
    hub.reset(tmp_path / "hub-server")
    hub.tokens = {WRITE: ("ada", "write"), READ: ("ada", "read"), NOBODY: ("eve", "none")}
    fast = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    nowhere = "http://127.0.0.1:9"  # refuses: our code must pass its client's endpoint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", fast)
    monkeypatch.setattr(file_download, "time", fast)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _http.close_session()
    yield hub
    _http.close_session()
