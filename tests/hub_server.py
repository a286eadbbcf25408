"""A loopback Hugging Face Hub: the real client talks to it over HTTP, tests look inside.

It speaks what `huggingface_hub` and `datasets` ask for: whoami-v2, repos/create, branches, tags, pull requests,
validate-yaml, preupload with .gitignore rules, LFS batch + PUT + verify, NDJSON commits, revision and model info,
trees, paths-info, resolve with ranges, xet tokens (a CAS in a local folder). Like the real Hub, a new repo starts
with a commit that holds `.gitattributes`; without a token a repo that may not be seen answers 401, with one 404.

`hub.fail(...)` makes the next matching requests go wrong, before or after they took effect; `hub.hold(...)` lets
them hang, for clients that are to be killed.
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
import yaml
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
    skip: int = 0  # so many requests that match go through before it begins
    run: Callable[[], object] | None = None  # called instead, and the request goes through
    holds: bool = False  # it hangs instead until `times` is set to 0


@dataclass
class Repo:
    """One model or data set: its commits (newest last), branches (pull requests too), tags, and who may see it."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # sha -> path -> sha256 of the content
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)  # number -> title; its branch is refs/pr/<number>

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
        """Return the commit of a branch, tag or commit id, None when there is none."""
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)

    def split(self, rest: str) -> tuple[str, str]:
        """Return (revision, path) of `<revision>/<path>`: a revision may hold slashes."""
        names = [name for name in (*self.branches, *self.tags) if rest == name or rest.startswith(f"{name}/")]
        revision = max(names, key=len, default=rest.partition("/")[0])
        return revision, rest[len(revision) + 1 :]


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
        self.ignored: set[str] = set()  # paths that are dropped whatever the client asks for
        self.xet_hashes: dict[str, str] = {}  # sha256 -> xet hash: those are pulled by xet
        self.requests: list[tuple[str, str]] = []
        self.asked_paths: list[list[str]] = []  # of each preupload
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

    def meanwhile(self, method: str, path: str, run: Callable[[], object]) -> Rule:
        """Let something happen just before the next request that matches is answered as usual."""
        return self.fail(method, path, run=run)

    def hold(self, method: str, path: str) -> Rule:
        """Let each request whose path matches hang until the rule's `times` is set to 0."""
        return self.fail(method, path, times=1_000_000, holds=True)

    def count(self, method: str, path: str) -> int:
        """How many requests with this method had a path that matches."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def writes(self) -> list[str]:
        """Every request that stored something, in order."""
        return [f"{m} {p}" for m, p in self.requests if m == "PUT" or "/commit/" in p or p.endswith("repos/create")]

    def learn_xet_hashes(self, folder: Path) -> None:
        """Let the files of `folder` that xet sent be pulled by xet: the real Hub learns their hashes from its CAS."""
        import hf_xet

        sent = {digest(path): path for path in folder.rglob("*") if path.is_file()}
        wanted = {sha: path for sha, path in sent.items() if sha in self.sizes and sha not in self.blobs}
        hashes = hf_xet.hash_files([str(path) for path in wanted.values()])
        self.xet_hashes |= {sha: found.hash for sha, found in zip(wanted, hashes, strict=True)}

    def content(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repo holds at a revision."""
        repo = self.repos[kind, name]
        commit = repo.resolve(revision)
        assert commit is not None
        return {path: self.blobs[sha] for path, sha in repo.commits[commit].items()}


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        matching = [r for r in self.hub.rules if r.times > 0 and r.method == method and r.path.search(path)]
        rule = next((r for r in matching if not r.skip), None)
        for waiting in matching:
            waiting.skip = max(0, waiting.skip - 1)
        if rule is None:
            await self.app(scope, receive, send)
            return
        rule.hits += 1
        if rule.holds:
            while rule.times > 0:
                await asyncio.sleep(0.02)
            return
        rule.times -= 1
        if rule.run:
            rule.run()
            await self.app(scope, receive, send)
            return
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
    if write and not _may_write(hub, user, name) and not _may_by_scope(hub, request, name):
        raise _RefusedError(403, "You don't have the rights to write to this repo with this token")
    return repo


def _may_write(hub: HubServer, user: tuple[str, str] | None, repo: str) -> bool:
    owner = repo.partition("/")[0]
    if user is None or user[1] != "write":
        return False
    return owner == user[0] or hub.orgs.get(user[0], {}).get(owner, "read") != "read"


def _may_by_scope(hub: HubServer, request: Request, repo: str) -> bool:
    secret = request.headers.get("authorization", "").removeprefix("Bearer ")
    named = {repo, repo.partition("/")[0]}
    scopes = hub.scopes.get(secret, [])
    return any(s["entity"]["name"] in named and "repo.write" in s["permissions"] for s in scopes)


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
        if not _may_write(hub, user, name) and not _may_by_scope(hub, request, name):
            return _error(403 if user else 401, "You don't have the rights to create a repo with this token")
        if (body.get("type", "model"), name) in hub.repos:
            told = {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            return JSONResponse(told, 409)
        repo = hub.repos[body.get("type", "model"), name] = Repo(body.get("type", "model"), name)
        repo.private = body.get("visibility") == "private" or bool(body.get("private"))
        repo.add("main", {".gitattributes": hub.store(_GITATTRIBUTES)})
        return JSONResponse({"url": f"{hub.url}/{name}", "name": name})

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request) -> Response:
        body = await request.json()
        errors, warnings = _faults_of_card(body["content"])
        told = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return JSONResponse(told, 400 if errors else 200)


def _faults_of_card(text: str) -> tuple[list[str], list[str]]:
    """What the Hub says of a card's front matter: (errors, warnings)."""
    found = re.match(r"\A---\r?\n(.*?)\r?\n---\r?\n", text, re.S)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"invalid yaml: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata is no mapping"], []
    errors = [f'"{key}" must be a string' for key in _STRINGS if not isinstance(data.get(key, ""), str)]
    lists = {key: data.get(key, []) for key in _LISTS}
    errors += [f'"{key}" must be an array' for key, value in lists.items() if not isinstance(value, list)]
    ids = [data["base_model"]] if isinstance(data.get("base_model"), str) else []
    ids += lists["datasets"] if isinstance(lists["datasets"], list) else []
    errors += [f"{name!r} is no valid id" for name in ids if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
    if data.get("license", "mit") not in _LICENSES:
        errors.append(f'"license" must be one of {sorted(_LICENSES)}')
    if data.get("base_model_relation", "adapter") not in {"adapter", "finetune", "merge", "quantized"}:
        errors.append('"base_model_relation" is none that is known')
    if any(not isinstance(r, dict) or not {"task", "dataset", "metrics"} <= r.keys() for r in _results(data)):
        errors.append('"model-index" lacks task, dataset or metrics')
    return errors, []


def _results(data: dict[str, Any]) -> list[Any]:
    return [result for model in data.get("model-index", []) for result in model.get("results", [])]


_STRINGS = ("license", "library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")
_LISTS = ("tags", "datasets", "language")
_LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "llama3.1", "gemma", "unknown", "other"}


def _add_upload_routes(app: FastAPI, hub: HubServer) -> None:
    @app.post("/api/{kind}/{owner}/{name}/branch/{branch:path}")
    async def branch(request: Request, kind: str, owner: str, name: str, branch: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=True)
        if branch in repo.branches:
            return _error(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return JSONResponse({})

    @app.post("/api/{kind}/{owner}/{name}/tag/{revision:path}")
    async def tag(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=True)
        asked, commit = (await request.json())["tag"], _commit_of(repo, revision)
        if asked in repo.tags:
            return _error(409, "Tag reference exists already")
        repo.tags[asked] = commit
        return JSONResponse({})

    @app.get("/api/{kind}/{owner}/{name}/discussions")
    async def discussions(request: Request, kind: str, owner: str, name: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}")
        said = {"status": "open", "isPullRequest": True, "createdAt": "2026-11-21T00:00:00.000Z"}
        said |= {"repo": {"name": repo.name, "type": repo.kind}, "author": {"name": "ada"}}
        return JSONResponse(
            {"discussions": [{**said, "num": n, "title": t} for n, t in repo.pulls.items()], "count": len(repo.pulls)}
            | {"start": 0}
        )

    @app.post("/api/{kind}/{owner}/{name}/preupload/{revision:path}")
    async def preupload(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=not _is_pull(request, revision))
        tree, body = repo.commits[_commit_of(repo, revision)], await request.json()
        hub.asked_paths.append([file["path"] for file in body["files"]])
        rules = body.get("gitIgnore")
        if rules is None:
            rules = hub.blobs[tree[".gitignore"]].decode() if ".gitignore" in tree else ""
        return JSONResponse({"files": [_preuploaded(hub, tree, f, rules.split()) for f in body["files"]]})

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request, owner: str, name: str) -> Response:
        return await batched(request, "models", f"{owner}/{name}")

    @app.post("/datasets/{owner}/{name}.git/info/lfs/objects/batch")
    async def dataset_batch(request: Request, owner: str, name: str) -> Response:
        return await batched(request, "datasets", f"{owner}/{name}")

    async def batched(request: Request, kind: str, name: str) -> Response:
        body = await request.json()
        _repo(hub, request, kind, name, write=body.get("ref", {}).get("name", "pull") != "pull")
        prefix = "" if kind == "models" else f"{kind}/"
        objects = [_lfs_actions(hub, prefix + name, o) for o in body["objects"]]
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
        return await verified(request, "models", f"{owner}/{name}")

    @app.post("/datasets/{owner}/{name}.git/info/lfs/verify")
    async def dataset_verify(request: Request, owner: str, name: str) -> Response:
        return await verified(request, "datasets", f"{owner}/{name}")

    async def verified(request: Request, kind: str, name: str) -> Response:
        _repo(hub, request, kind, name)
        body = await request.json()
        whole = hub.sizes.get(body["oid"]) == body["size"]
        return Response() if whole else _error(422, "Size mismatch")

    @app.post("/api/{kind}/{owner}/{name}/commit/{revision:path}")
    async def commit(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}", write=not _is_pull(request, revision))
        head = _commit_of(repo, revision)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            return _error(412, "A commit has happened since. Please refresh and try again.")
        pull = _open_pull(repo, head, header["summary"]) if request.query_params.get("create_pr") else 0
        branch = f"refs/pr/{pull}" if pull else revision
        oid = repo.add(branch, dict(change for line in lines for change in _changes(hub, line)))
        answer = {"commitUrl": f"{hub.url}/{owner}/{name}/commit/{oid}", "commitOid": oid}
        if pull:
            answer["pullRequestUrl"] = f"{hub.url}/{owner}/{name}/discussions/{pull}"
        return JSONResponse(answer)

    @app.get("/api/{kind}/{owner}/{name}/xet-write-token/{revision:path}")
    async def xet_write_token(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        _repo(hub, request, kind, f"{owner}/{name}", write=not _is_pull(request, revision))
        return _xet_token(hub)

    @app.get("/api/{kind}/{owner}/{name}/xet-read-token/{revision:path}")
    async def xet_read_token(request: Request, kind: str, owner: str, name: str, revision: str) -> Response:
        _open_gate(hub, request, _repo(hub, request, kind, f"{owner}/{name}"))
        return _xet_token(hub)


def _xet_token(hub: HubServer) -> Response:
    told = {"casUrl": f"local://{hub.folder}/cas", "accessToken": "xet-jwt", "exp": int(time.time()) + 3600}
    names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
    return JSONResponse(told, headers={names[key]: str(value) for key, value in told.items()})


def _is_pull(request: Request, revision: str) -> bool:
    """Who may only read may still open a pull request, and commit to it."""
    return bool(request.query_params.get("create_pr")) or revision.startswith("refs/pr/")


def _open_pull(repo: Repo, head: str, title: str) -> int:
    number = len(repo.pulls) + 1
    repo.pulls[number], repo.branches[f"refs/pr/{number}"] = title, head
    return number


def _preuploaded(hub: HubServer, tree: dict[str, str], asked: dict[str, Any], rules: list[str]) -> dict[str, Any]:
    path = asked["path"]
    is_ignored = path in hub.ignored or any(fnmatch(path, rule) for rule in rules)
    is_lfs = path.endswith(_LFS_SUFFIXES)
    known = tree.get(path)
    oid = known if known is None or is_lfs else _git_oid(hub.blobs[known])
    mode = "lfs" if is_lfs else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": is_ignored, "oid": oid}


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
        card = hub.blobs.get(repo.commits[commit].get("README.md", ""), b"").decode()
        if found := re.match(r"\A---\n(.*?)\n---\n", card, re.S):
            body["cardData"] = yaml.safe_load(found[1])
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
        heads = {n: c for n, c in repo.branches.items() if not n.startswith("refs/")}
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in heads.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
        return JSONResponse({"branches": branches, "tags": tags, "converts": []})

    @app.get("/api/{kind}/{owner}/{name}/tree/{rest:path}")
    async def tree(request: Request, kind: str, owner: str, name: str, rest: str) -> Response:
        repo = _repo(hub, request, kind, f"{owner}/{name}")
        revision, under = repo.split(rest)
        held = repo.commits[_commit_of(repo, revision)]
        found = {path: sha for path, sha in held.items() if not under or path.startswith(f"{under}/")}
        if under and not found:
            return _error(404, "Entry not found", "EntryNotFound")
        folders = {path for path in _folders(list(found)) if not under or path.startswith(f"{under}/")}
        if request.query_params.get("recursive", "false").lower() != "true":
            found = {path: sha for path, sha in found.items() if str(Path(path).parent) == (under or ".")}
            folders = {path for path in folders if str(Path(path).parent) == (under or ".")}
        listed = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        return JSONResponse([*listed, *(_entry(hub, path, sha) for path, sha in sorted(found.items()))])

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
    data, size = hub.blobs.get(sha, b""), hub.sizes[sha]  # what xet stored lies in its CAS
    etag = sha if path.endswith(_LFS_SUFFIXES) else _git_oid(data)
    headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if path.endswith(_LFS_SUFFIXES):
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size)}
    if sha in hub.xet_hashes:
        route = f"{hub.url}/api/{repo.kind}s/{repo.name}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": hub.xet_hashes[sha], "X-Xet-Refresh-Route": route}
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(size)})
    if sha not in hub.blobs:
        return _error(500, "only xet holds this file")
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


def run_client(hub: HubServer, home: Path, code: str, *words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python `code` in a process that knows only the loopback Hub, `said` on its stdin; no token may come out."""
    env = {**os.environ, **client_environment(hub, home), "HUB": hub.url}
    argv = [sys.executable, "-c", code, *words]
    done = subprocess.run(argv, input=said, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert WRITE not in done.stdout + done.stderr and READ not in done.stdout + done.stderr
    return done


WRITE, READ, NOBODY = "hf_writeTokenOfTheTests", "hf_readTokenOfTheTests", "hf_nobodysTokenOfTheTests"


@pytest.fixture(name="hub")
def hub_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A loopback Hub with three tokens; the client library is online for it, retries without waiting.

    Constants are patched as the library's own tests do: it reads the environment at import, and our
    conftest sets it offline. Only the loopback endpoint is reachable.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, _xet

    _xet.XET_CONNECTION_INFO_CACHE.clear()  # of another test's CAS
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
