"""A Hugging Face Hub on 127.0.0.1, small enough to read: what the real client asks of it, and faults on
demand.

Speaks whoami, repos, LFS uploads, commits, branches, pull requests, collections, file listings and (ranged)
downloads to
the unmodified `huggingface_hub` and `transformers`, pointed here by HF_ENDPOINT, with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopbackTokenThatMustNeverLeak"
KINDS = "(?:models|datasets)"  # both kinds of repo share one name space here
LFS_BYTES = 64 << 10  # files at least this large, and all safetensors, go through LFS


@dataclass
class Repo:
    """Branches and commits of one repo; a commit maps paths to sha256."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    pull_requests: int = 0
    dataset: bool = False
    changed: int = 0  # number of the request that changed it last, as a time


@dataclass
class Collection:
    """A titled list of repos of one account; items are (kind, repo)."""

    title: str
    owner: str
    private: bool = False
    items: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self, slug: str) -> dict[str, Any]:
        """What the Hub answers of it."""
        items = [
            {"_id": f"{place:024x}", "id": repo, "type": kind, "position": place}
            for place, (kind, repo) in enumerate(self.items)
        ]
        fields = {"slug": slug, "title": self.title, "owner": {"name": self.owner}, "private": self.private}
        fields |= {"lastUpdated": "2026-11-26T00:00:00.000Z", "theme": "blue", "upvotes": 0}
        return {**fields, "items": items}


@dataclass
class Fault:
    """Answer the next `times` requests whose method and path match with a status, a cut body or a dropped
    line.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_body: bool = False
    drop: bool = False
    corrupt: bool = False


class LoopbackHub:
    """The server's state; `url` is its address once `serving`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, Collection] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.bytes_out: dict[str, int] = {}
        self.uploaded: list[int] = []
        self.role = "write"
        self.lock = threading.Lock()
        self.url = ""

    def commit(self, repo: str, branch: str, files: dict[str, str]) -> str:
        """Record a commit on a branch."""
        sha = hashlib.sha1(
            json.dumps([branch, sorted(files.items()), len(self.requests)]).encode()
        ).hexdigest()
        self.repos[repo].commits[sha] = files
        self.repos[repo].branches[branch] = sha
        self.repos[repo].changed = len(self.requests)
        return sha

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main", **options: Any) -> str:
        """Publish files directly, as a test's starting point; returns the commit."""
        self.repos.setdefault(repo, Repo(**options))
        hashes = {}
        for path, data in files.items():
            hashes[path] = hashlib.sha256(data).hexdigest()
            self.blobs[hashes[path]] = data
        return self.commit(repo, branch, hashes)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds now."""
        state = self.repos[repo]
        return {path: self.blobs[oid] for path, oid in state.commits[state.branches[branch]].items()}

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault due for this request, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serving(port: int = 0) -> Iterator[LoopbackHub]:
    """Run a LoopbackHub on a port of 127.0.0.1: on `port` if it is free, else on any."""
    hub = LoopbackHub()

    class Bound(Handler):
        state = hub

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Bound)
    except OSError:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request: routed by method and path to a method below."""

    state: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for its headers to be acknowledged, 40 ms
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/datasets", "search"),
        ("POST", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/(datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs-verify", "lfs_verify"),
        ("POST", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "make_commit"),
        ("POST", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "make_branch"),
        ("GET", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<path>.*))?", "tree"),
        ("GET", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?", "info"),
        ("POST", rf"/api/{KINDS}/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("GET", r"/api/collections", "list_collections"),
        ("POST", r"/api/collections", "create_collection"),
        ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "get_collection"),
        ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "add_item"),
        ("GET", r"/(datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_: Any) -> None:
        """Keep the test output clean."""

    def answer(self) -> None:
        """Find the route, apply a fault that is due, call the method."""
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.query = parse_qs(url.query)
        self.state.requests.append((self.command, url.path))
        self.fault = self.state.take_fault(self.command, url.path)
        if self.fault is not None and self.fault.drop:
            self.close_connection = True
            self.connection.close()
            return
        if self.fault is not None and self.fault.status is not None:
            self.send(self.fault.status, {"error": "fault"}, self.fault.headers)
            return
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, url.path)
            if method == self.command and match:
                arguments = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                getattr(self, name)(**arguments)
                return
        self.send(404, {"error": f"no route {self.command} {url.path}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        payload = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(payload)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut_body:
            self.wfile.write(payload[: len(payload) // 2])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(payload)

    def refuse(self, status: int, code: str, message: str, sha: str = "") -> None:
        """An error the client recognises by its code."""
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(status, {"error": message}, {**headers, **({"X-Repo-Commit": sha} if sha else {})})

    def logged_in(self) -> bool:
        """Whether the request carries the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, repo: str, rev: str = "main") -> tuple[Repo, str] | None:
        """The repo and the commit a revision names, or None after refusing."""
        found = self.state.repos.get(repo)
        if found is None or (found.private and not self.logged_in()):
            self.refuse(404 if self.logged_in() else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
            return None
        sha = found.branches.get(rev, rev if rev in found.commits else "")
        if not sha:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            return None
        return found, sha

    def whoami(self) -> None:
        if not self.logged_in():
            self.send(401, {"error": "Invalid credentials"})
            return
        token = {"displayName": "test", "role": self.state.role}
        self.send(200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": token}})

    def create_repo(self) -> None:
        fields = json.loads(self.body)
        name = f"{fields.get('organization') or 'me'}/{fields['name']}"
        if not self.logged_in():
            self.send(401, {"error": "Invalid credentials"})
        elif name in self.state.repos:
            self.send(409, {"url": f"{self.state.url}/{name}", "error": "exists"})
        else:
            private = bool(fields.get("private") or fields.get("visibility") == "private")
            self.state.repos[name] = Repo(private=private, dataset=fields.get("type") == "dataset")
            self.state.commit(name, "main", {})
            self.send(200, {"url": f"{self.state.url}/{name}"})

    def validate_yaml(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, rev: str) -> None:
        if (found := self.find(repo, rev)) is None:
            return
        present = found[0].commits[found[1]]
        files = []
        for entry in json.loads(self.body)["files"]:
            lfs = entry["size"] >= LFS_BYTES or entry["path"].endswith(".safetensors")
            oid = present.get(entry["path"])
            if oid is not None and not lfs:
                data = self.state.blobs[oid]
                oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            answer = {"path": entry["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append({**answer, **({"oid": oid} if oid else {})})
        self.send(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.state.blobs:
                upload = {"href": f"{self.state.url}/lfs/{entry['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.state.url}/lfs-verify"}}
            objects.append(answer)
        self.send(
            200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
        )

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid or (self.fault and self.fault.corrupt):
            self.send(400, {"error": "checksum mismatch"})
            return
        self.state.blobs[oid] = self.body
        self.state.uploaded.append(len(self.body))
        self.send(200, {})

    def lfs_verify(self) -> None:
        known = json.loads(self.body)["oid"] in self.state.blobs
        self.send(200 if known else 404, {})

    def make_commit(self, repo: str, rev: str) -> None:
        if not self.logged_in() or self.state.role == "read":
            self.send(403, {"error": "Forbidden: you must have write access"})
            return
        if (found := self.find(repo, rev)) is None:
            return
        files = dict(found[0].commits[found[1]])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(data).hexdigest()
                self.state.blobs[files[value["path"]]] = data
            elif kind == "lfsFile":
                assert value["oid"] in self.state.blobs, "a commit names a file that was never uploaded"
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        branch, answer = rev, {}
        if self.query.get("create_pr"):
            found[0].pull_requests += 1
            branch = f"refs/pr/{found[0].pull_requests}"
            answer = {"pullRequestUrl": f"{self.state.url}/{repo}/discussions/{found[0].pull_requests}"}
        sha = self.state.commit(repo, branch, files)
        self.send(200, {"commitOid": sha, "commitUrl": f"{self.state.url}/{repo}/commit/{sha}", **answer})

    def make_branch(self, repo: str, rev: str) -> None:
        if rev in self.state.repos[repo].branches:
            self.send(409, {"error": "Reference already exists"})
            return
        self.state.repos[repo].branches[rev] = self.state.repos[repo].branches["main"]
        self.send(200, {})

    def tree(self, repo: str, rev: str, path: str = "") -> None:
        if (found := self.find(repo, rev)) is None:
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        start = f"{path}/" if path else ""
        rows: dict[str, dict[str, Any]] = {}
        for name, oid in sorted(found[0].commits[found[1]].items()):
            if not name.startswith(start):
                continue
            parts = name.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                folder = start + "/".join(parts[:depth])
                if recursive or depth == 1:
                    rows[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                size = len(self.state.blobs[oid])
                rows[name] = {"type": "file", "path": name, "size": size, "oid": oid[:40]}
        self.send(200, list(rows.values()))

    def paths_info(self, repo: str, rev: str) -> None:
        if (found := self.find(repo, rev)) is None:
            return
        form = parse_qs(self.body.decode())
        paths = form.get("paths") or json.loads(self.body or b"{}").get("paths", [])
        files = found[0].commits[found[1]]
        rows: list[dict[str, Any]] = []
        for path in paths:
            if path in files:
                size = len(self.state.blobs[files[path]])
                rows.append({"type": "file", "path": path, "size": size, "oid": files[path][:40]})
            elif any(name.startswith(f"{path}/") for name in files):
                rows.append({"type": "directory", "path": path, "oid": "0" * 40})
        self.send(200, rows)

    def refs(self, repo: str) -> None:
        if (found := self.find(repo)) is None:
            return
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in found[0].branches.items()
        ]
        self.send(200, {"branches": branches, "converts": [], "tags": []})

    def info(self, repo: str, rev: str = "main") -> None:
        if (found := self.find(repo, rev)) is None:
            return
        files = found[0].commits[found[1]]
        siblings = [{"rfilename": n, "size": len(self.state.blobs[o])} for n, o in sorted(files.items())]
        fields = {
            "id": repo,
            "modelId": repo,
            "sha": found[1],
            "private": found[0].private,
            "siblings": siblings,
            "author": repo.partition("/")[0],
        }
        self.send(200, {**fields, "tags": [], "downloads": 0, "likes": 0})

    def list_collections(self) -> None:
        owner = self.query.get("owner", [""])[0]
        found = {slug: one for slug, one in self.state.collections.items() if one.owner == owner}
        self.send(200, [one.as_json(slug) for slug, one in found.items()])

    def create_collection(self) -> None:
        fields = json.loads(self.body)
        title, owner = fields["title"], fields["namespace"]
        slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{len(self.state.collections):024x}"
        self.state.collections[slug] = Collection(title, owner, bool(fields.get("private")))
        self.send(200, {**self.state.collections[slug].as_json(slug), "position": 0})

    def get_collection(self, slug: str) -> None:
        found = self.state.collections.get(slug)
        if found is None:
            self.send(404, {"error": "Collection not found"})
        else:
            self.send(200, {**found.as_json(slug), "position": 0})

    def add_item(self, slug: str) -> None:
        if slug not in self.state.collections:
            self.send(404, {"error": "Collection not found"})
            return
        item = json.loads(self.body)["item"]
        entry, found = (item["type"], item["id"]), self.state.collections[slug]
        if item["id"] not in self.state.repos:
            self.send(404, {"error": "no such repo"})
            return
        if entry in found.items:
            self.send(409, {"error": "already in the collection"})
            return
        found.items.append(entry)
        self.send(200, {**found.as_json(slug), "position": 0})

    def search(self) -> None:
        """Data sets whose cards have all tags asked for; private ones for the owner of the token."""
        wanted = set(self.query.get("filter", []))
        rows = []
        for name, repo in self.state.repos.items():
            card = self.state.files(name).get("README.md", b"").decode().split("---\n")
            fields = yaml.safe_load(card[1]) if len(card) > 2 else {}
            visible = not repo.private or self.logged_in()
            if repo.dataset and visible and wanted <= set(fields.get("tags", [])):
                row = {"id": name, "sha": repo.branches["main"], "private": repo.private, "cardData": fields}
                changed = datetime(2026, 1, 1) + timedelta(seconds=repo.changed)
                row["lastModified"] = changed.strftime("%Y-%m-%dT%H:%M:%S.000Z")
                rows.append({**row, "tags": fields.get("tags", [])})
        self.send(200, rows)

    def resolve(self, repo: str, rev: str, path: str) -> None:
        if (found := self.find(repo, rev)) is None:
            return
        oid = found[0].commits[found[1]].get(path)
        if oid is None:
            self.refuse(404, "EntryNotFound", f"{path} not found", found[1])
            return
        data = self.state.blobs[oid]
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        if self.command == "GET":
            with self.state.lock:
                self.state.bytes_out[path] = self.state.bytes_out.get(path, 0) + len(data)
        self.send(206 if wanted else 200, data, headers)
