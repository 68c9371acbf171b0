"""A hub on the loopback interface: enough of the Hugging Face Hub for its real client.

Repositories live in memory. It answers what `huggingface_hub` asks when it creates, pushes,
tags, lists and downloads, and goes wrong on demand: `fail`, `truncate` and `hang_up`.

    with Hub() as hub: HfApi(endpoint=hub.url, token=hub.token).create_repo("me/x")
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

RELATIONS = ("adapter", "finetune", "merge", "quantized")
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refused(Exception):
    """An answer with an error status, as the Hub words it."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


@dataclass
class Blob:
    content: bytes
    is_lfs: bool = False

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass
class Repo:
    name: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        listing = "".join(f"{p}{b.etag}" for p, b in sorted(files.items()))
        text = f"{self.name}{len(self.commits)}{message}{listing}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        if found not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    @property
    def card(self) -> dict[str, Any]:
        readme = self.commits[self.branches["main"]].get("README.md")
        return front_matter(readme.content.decode()) if readme else {}

    @property
    def labels(self) -> list[str]:
        """The tags that the Hub derives from a card, by which models are found."""
        card = self.card
        bases = card.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        made = [*card.get("tags", []), *(f"base_model:{base}" for base in bases)]
        if relation := card.get("base_model_relation"):
            made += [f"base_model:{relation}:{base}" for base in bases]
        return made + [card[k] for k in ("library_name", "pipeline_tag") if k in card]


def front_matter(text: str) -> dict[str, Any]:
    """Return the YAML between the two `---` lines at the top of a card."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(match[1]) or {} if match else {}


def card_errors(text: str) -> list[str]:
    """Return what the Hub would refuse in a card's front matter."""
    try:
        card = front_matter(text)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(card, dict):
        return ["metadata must be a mapping"]
    errors = []
    bases = card.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not NAME.fullmatch(base):
            errors.append(f'"base_model" with value {base!r} is not valid')
    if card.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}')
    for key in ("tags", "datasets", "language"):
        values = card.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            errors.append(f'"{key}" must be a list of strings')
    for key in ("library_name", "license", "pipeline_tag"):
        if not isinstance(card.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    return errors


class Hub:
    """The server: a context manager with `url`, `token`, `repos` and ways to go wrong."""

    token = "hf_" + "a" * 34

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}  # LFS objects that no commit names yet
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()  # file -> bytes that downloads of it took
        self.corrupted: str | None = None
        self.faults: list[tuple[re.Pattern[str], Callable[[Any], bool], list[int]]] = []
        self.lock = threading.RLock()
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a repository holds."""
        found = self.repos[repo]
        return {path: blob.content for path, blob in found.commits[found.sha(revision)].items()}

    def put(self, repo: str, files: dict[str, bytes], message: str = "put") -> str:
        """Commit files without the client's checks, as a hostile repository may hold them."""
        found = self.repos.setdefault(repo, Repo(repo))
        blobs = {path: Blob(data, path.endswith(".safetensors")) for path, data in files.items()}
        return found.commit("main", blobs, message)

    # -- going wrong: `pattern` is searched in "METHOD /path", `times` requests are hit ---------

    def fail(self, pattern: str, status: int, *, times: int = 1, **headers: str) -> None:
        """Answer with `status`."""

        def fault(handler: _Handler) -> bool:
            names = {k.replace("_", "-"): v for k, v in headers.items()}
            handler.answer(status, json.dumps({"error": "on demand"}).encode(), **names)
            return True

        self._fault(pattern, fault, times)

    def truncate(self, pattern: str, n_bytes: int, *, times: int = 1) -> None:
        """Answer with the first bytes only, and close the connection."""

        def fault(handler: _Handler) -> bool:
            handler.most_bytes = n_bytes
            return False

        self._fault(pattern, fault, times)

    def hang_up(self, pattern: str, *, times: int = 1) -> None:
        """Close the connection without an answer."""

        def fault(handler: _Handler) -> bool:
            handler.close_connection = True
            return True

        self._fault(pattern, fault, times)

    def corrupt(self, name: str | None) -> None:
        """Flip a bit in what is downloaded of files whose path contains `name`."""
        self.corrupted = name

    def _fault(self, pattern: str, fault: Callable[[Any], bool], times: int) -> None:
        self.faults.append((re.compile(pattern), fault, [times]))

    def goes_wrong(self, handler: _Handler, line: str) -> bool:
        """Apply the first fault that is left for this request; return whether it was answered."""
        with self.lock:
            hits = [(f, left) for p, f, left in self.faults if left[0] > 0 and p.search(line)]
            if not hits:
                return False
            fault, left = hits[0]
            left[0] -= 1
        return fault(handler)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: no waiting for a delayed acknowledgement
    disable_nagle_algorithm = True
    most_bytes: int | None = None

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def _dispatch(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.data = self.rfile.read(length)
        url = urlsplit(self.path)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = parse_qs(url.query)
        line = f"{self.command} {unquote(url.path)}"
        self.most_bytes = None
        with self.hub.lock:
            self.hub.requests.append(line)
        if self.hub.goes_wrong(self, line):
            return
        try:
            with self.hub.lock:
                self._route()
        except Refused as refused:
            body = {"error": refused.message, **refused.body}
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.answer(refused.status, json.dumps(body).encode(), **headers)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.most_bytes is not None:
                body, self.close_connection = body[: self.most_bytes], True
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _route(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != self.hub.token:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.is_known = bool(token)
        parts = self.parts
        # the Hub's read-only POSTs need no token; its upload links are signed
        if (
            self.command == "POST"
            and not self.is_known
            and "paths-info" not in parts
            and parts[-1] != "batch"
        ):
            raise Refused(401, message="Access token required")
        match parts:
            case ["api", "whoami-v2"]:
                self._json({"name": "me", "type": "user", "orgs": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                errors = card_errors(json.loads(self.data)["content"])
                body = {"errors": [{"message": e} for e in errors], "warnings": []}
                self._json(body, 400 if errors else 200)
            case ["api", "models"]:
                self._list()
            case ["api", "models", owner, name, *rest]:
                self._api(self._repo(f"{owner}/{name}"), rest)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(self._repo(f"{owner}/{name.removesuffix('.git')}"))
            case ["lfs", oid]:
                if hashlib.sha256(self.data).hexdigest() != oid:
                    raise Refused(400, message="content does not match its id")
                self.hub.uploads[oid] = self.data
                self.answer(200)
            case [owner, name, "resolve", revision, *path]:
                self._resolve(self._repo(f"{owner}/{name}"), revision, "/".join(path))
            case _:
                raise Refused(404, message="Sorry, we can't find the page you are looking for.")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.is_known):
            raise Refused(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
        return repo

    def _create(self) -> None:
        asked = json.loads(self.data)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise Refused(409, message="You already created this model repo", url=url)
        is_private = asked.get("visibility") == "private" or asked.get("private") is True  # < 2.0
        repo = self.hub.repos[name] = Repo(name, is_private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial")
        self._json({"url": url, "name": name})

    def _list(self) -> None:
        wanted = self.query.get("filter", [])
        found = [r for r in self.hub.repos.values() if not r.private or self.is_known]
        self._json([self._info(r) for r in found if set(wanted) <= set(r.labels)])

    def _info(self, repo: Repo, revision: str = "main") -> dict[str, Any]:
        sha = repo.sha(revision)
        siblings = [
            {"rfilename": path, "size": len(b.content)} for path, b in self._files(repo, sha)
        ]
        return {
            "_id": hashlib.md5(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "sha": sha,
            "private": repo.private,
            "tags": repo.labels,
            "siblings": siblings,
            "downloads": 0,
            "likes": 0,
            "cardData": repo.card,
        }

    @staticmethod
    def _files(repo: Repo, sha: str) -> list[tuple[str, Blob]]:
        return sorted(repo.commits[sha].items())

    def _api(self, repo: Repo, rest: list[str]) -> None:
        match rest:
            case [] if self.command == "GET":
                self._json(self._info(repo))
            case ["revision", revision]:
                self._json(self._info(repo, revision))
            case ["refs"]:
                kinds = {"branches": repo.branches, "tags": repo.tags, "converts": {}}
                prefix = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": ""}
                self._json(
                    {
                        kind: [
                            {"name": n, "ref": prefix[kind] + n, "targetCommit": sha}
                            for n, sha in refs.items()
                            if not n.startswith("refs/")
                        ]
                        for kind, refs in kinds.items()
                    }
                )
            case ["tree", revision, *_]:
                self._json([_entry(p, b) for p, b in self._files(repo, repo.sha(revision))])
            case ["paths-info", revision]:
                files = repo.commits[repo.sha(revision)]
                wanted = parse_qs(self.data.decode()).get("paths", [])
                self._json([_entry(p, files[p]) for p in wanted if p in files])
            case ["preupload", revision]:
                self._preupload(repo.commits[repo.sha(revision)])
            case ["tag", revision]:
                tag = json.loads(self.data)["tag"]
                if tag in repo.tags:
                    raise Refused(409, message="Tag already exists")
                repo.tags[tag] = repo.sha(revision)
                self._json({})
            case ["branch", branch]:
                if branch in repo.branches:
                    raise Refused(409, message="Branch already exists")
                start = json.loads(self.data or b"{}").get("startingPoint", "main")
                repo.branches[branch] = repo.sha(start)
                self._json({})
            case ["commit", revision]:
                self._commit(repo, revision)
            case _:
                raise Refused(404, message=f"no such part of the API: {rest}")

    def _preupload(self, there: dict[str, Blob]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].etag if file["path"] in there else None,
            }
            for file in json.loads(self.data)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, repo: Repo) -> None:
        objects = []
        stored = {b.sha256 for files in repo.commits.values() for b in files.values()}
        for wanted in json.loads(self.data)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            new = wanted["oid"] not in stored
            objects.append({**wanted, **({"actions": upload} if new else {})})
        self._json({"objects": objects, "transfer": "basic"})

    def _commit(self, repo: Repo, revision: str) -> None:
        header, *changes = [json.loads(line) for line in self.data.splitlines()]
        if revision not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if header["value"].get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[revision]])
        for change in changes:
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    content = self.hub.uploads.get(value["oid"])
                    if content is None:
                        raise Refused(400, message=f"{value['path']} was not uploaded")
                    files[value["path"]] = Blob(content, is_lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        is_pr = "create_pr" in self.query
        branch = f"refs/pr/{len(repo.branches)}" if is_pr else revision
        sha = repo.commit(branch, files, header["value"]["summary"])
        body = {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{sha}"}
        if is_pr:
            body["pullRequestUrl"] = f"{self.hub.url}/{repo.name}/discussions/{branch[8:]}"
        self._json(body)

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = repo.sha(revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        content, status = blob.content, 200
        if self.hub.corrupted and self.hub.corrupted in path:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if self.command == "GET":
            self.hub.sent[path] += len(content)
        self.answer(status, content, **headers)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry
