"""A small lakeFS server for the tests: it keeps what it is given, and is driven by lakeFS' own clients.

The server of lakeFS is no Python package. This one serves the operations that its clients call for repositories,
branches, objects, commits, merges, tags, logs and differences, with contents on a disk and commits in memory.
`python tests/lakefs_stand_in.py FOLDER` prints the environment that its clients need, as JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

KEY, SECRET = "key-of-tests", "secret-of-tests"
Tree = dict[str, dict[str, Any]]  # path -> statistics of an object


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Commit:
    """A commit with all of its objects."""

    facts: dict[str, Any]  # id, parents, committer, message, creation_date, meta_range_id, metadata
    tree: Tree


@dataclass
class Branch:
    """A branch: its last commit, and what is not committed; None stands for a deletion."""

    head: str
    staged: dict[str, dict[str, Any] | None] = field(default_factory=dict)


@dataclass
class Repository:
    """A repository in memory."""

    facts: dict[str, Any]
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Branch] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, ref: str) -> str:
        """Identifier of the commit that a reference means."""
        name, back = re.fullmatch(r"([^@~]+)@?(?:~(\d+))?", ref).groups() if re.match(r"[^@~]", ref) else ("", None)
        found = self.branches[name].head if name in self.branches else self.tags.get(name, name)
        for _ in range(int(back or 0)):
            found = self.commits[found].facts["parents"][0]
        if found not in self.commits:
            raise Refused(404, f"reference {ref} not found")
        return found

    def tree_of(self, ref: str) -> Tree:
        """Objects of a reference; those of a branch with what is not committed."""
        tree = dict(self.commits[self.commit_of(ref)].tree)
        for path, entry in self.branches[ref].staged.items() if ref in self.branches else ():
            tree.pop(path, None)
            if entry is not None:
                tree[path] = entry
        return tree

    def branch(self, name: str) -> Branch:
        if name not in self.branches:
            raise Refused(404, f"branch {name} not found")
        return self.branches[name]

    def add(self, tree: Tree, parents: list[str], message: str, metadata: dict[str, str] | None) -> str:
        """Make a commit."""
        facts = {"parents": parents, "committer": KEY, "message": message, "metadata": metadata or {}}
        facts |= {"creation_date": int(time.time()), "meta_range_id": "", "nonce": uuid4().hex}
        name = hashlib.sha256(json.dumps([facts, tree], sort_keys=True).encode()).hexdigest()
        del facts["nonce"]
        self.commits[name] = Commit({"id": name, **facts}, tree)
        return name

    def ancestors(self, name: str) -> list[str]:
        """A commit and all before it, the nearest first."""
        found, waiting = [], [name]
        while waiting:
            current = waiting.pop(0)
            if current not in found:
                found.append(current)
                waiting += self.commits[current].facts["parents"]
        return found


def changes(old: Tree, new: Tree) -> dict[str, str]:
    """Path -> added, removed or changed."""
    kinds = {path: "changed" if path in old else "added" for path in new if old.get(path) != new[path]}
    return kinds | {path: "removed" for path in old if path not in new}


class StandIn(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.lock = Path(folder), threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refused(404, f"repository {name} not found")
        return self.repositories[name]


Answer = tuple[int, Any]
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(method: str, path: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register a function for a path with {names}."""
    pattern = re.compile("/api/v1" + re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, pattern, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1
    server: StandIn

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def parse(self) -> None:
        """Query and authorisation of a request."""
        self.query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        wanted = "Basic " + base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            raise Refused(401, "error authenticating request")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body.read_bytes() or b"{}")

    def receive(self) -> None:
        """Write the body to a file, whole or not at all."""
        self.body = self.server.folder / f"incoming-{uuid4().hex}"
        left = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        with self.body.open("wb") as file:
            while left or chunked:
                size = int(self.rfile.readline(), 16) if chunked else min(left, 1 << 20)
                data = self.rfile.read(size)
                if chunked:
                    self.rfile.readline()
                elif not data:
                    raise ConnectionError("the upload broke off")
                file.write(data)
                left -= 0 if chunked else len(data)
                chunked = chunked and size > 0

    def handle_any(self) -> None:
        """Find the operation and answer."""
        self.receive()
        try:
            self.parse()
            path = urlsplit(self.path).path
            for method, pattern, function in ROUTES:
                found = pattern.fullmatch(path)
                if found and method == self.command:
                    names = {name: unquote(value) for name, value in found.groupdict().items()}
                    status, answer = function(self, **names)
                    break
            else:
                raise Refused(501, f"{self.command} {path} is not served here")
        except Refused as error:
            status, answer = error.status, {"message": str(error)}
        finally:
            self.body.unlink(missing_ok=True)
        if isinstance(answer, Path):
            self.send_object(answer)
        elif answer is not None or status != 204:
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send(status, text.encode(), "text/html" if isinstance(answer, str) else "application/json")
        else:
            self.send(status, b"", "application/json")

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def send(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_object(self, path: Path) -> None:
        """Send a file, or the range that was asked for."""
        size, kind = path.stat().st_size, "application/octet-stream"
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            self.send(200, path.read_bytes(), kind)
            return
        first, last = int(found[1]), min(int(found[2] or size), size - 1)
        if first >= size:
            self.send(416, b"{}", "application/json", {"Content-Range": f"bytes */{size}"})
            return
        with path.open("rb") as file:
            file.seek(first)
            self.send(206, file.read(last - first + 1), kind, {"Content-Range": f"bytes {first}-{last}/{size}"})


def page(handler: Handler, items: Iterable[tuple[str, dict[str, Any]]]) -> Answer:
    """A page of a list: names and items in order."""
    after, prefix = handler.query.get("after", ""), handler.query.get("prefix", "")
    amount = min(int(handler.query.get("amount", 100)), 1000)
    rest = [(name, item) for name, item in items if name > after and name.startswith(prefix)]
    shown, more = rest[:amount], len(rest) > amount
    pagination = {"has_more": more, "next_offset": shown[-1][0] if more else "", "results": len(shown)}
    return 200, {"pagination": {**pagination, "max_per_page": 1000}, "results": [item for _, item in shown]}


@route("GET", "/config")
def config(handler: Handler) -> Answer:
    storage = {"blockstore_type": "local", "blockstore_namespace_example": "local://", "import_validity_regex": ""}
    storage |= {"blockstore_namespace_ValidityRegex": "", "pre_sign_support": False, "pre_sign_support_ui": False}
    return 200, {"version_config": {"version": "stand-in"}, "storage_config": {**storage, "import_support": False}}


@route("POST", "/repositories")
def create_repository(handler: Handler) -> Answer:
    asked = handler.json()
    name, branch = asked["name"], asked.get("default_branch") or "main"
    with handler.server.lock:
        if name in handler.server.repositories:
            raise Refused(409, f"repository {name} already exists")
        facts = {"id": name, "creation_date": int(time.time()), "default_branch": branch}
        made = Repository({**facts, "storage_namespace": asked["storage_namespace"]})
        made.branches[branch] = Branch(made.add({}, [], "Repository created", None))
        handler.server.repositories[name] = made
    return 201, made.facts


@route("GET", "/repositories/{repository}")
def get_repository(handler: Handler, repository: str) -> Answer:
    return 200, handler.server.repository(repository).facts


@route("POST", "/repositories/{repository}/branches")
def create_branch(handler: Handler, repository: str) -> Answer:
    asked = handler.json()
    with handler.server.lock:
        found = handler.server.repository(repository)
        if asked["name"] in found.branches:
            raise Refused(409, f"branch {asked['name']} already exists")
        found.branches[asked["name"]] = Branch(found.commit_of(asked["source"]))
        return 201, found.branches[asked["name"]].head


@route("GET", "/repositories/{repository}/branches")
def list_branches(handler: Handler, repository: str) -> Answer:
    branches = handler.server.repository(repository).branches
    return page(handler, [(name, {"id": name, "commit_id": branches[name].head}) for name in sorted(branches)])


@route("GET", "/repositories/{repository}/branches/{branch}")
def get_branch(handler: Handler, repository: str, branch: str) -> Answer:
    return 200, {"id": branch, "commit_id": handler.server.repository(repository).branch(branch).head}


@route("DELETE", "/repositories/{repository}/branches/{branch}")
def delete_branch(handler: Handler, repository: str, branch: str) -> Answer:
    with handler.server.lock:
        handler.server.repository(repository).branch(branch)
        del handler.server.repository(repository).branches[branch]
    return 204, None


@route("POST", "/repositories/{repository}/branches/{branch}/objects")
def upload_object(handler: Handler, repository: str, branch: str) -> Answer:
    path, stored = handler.query["path"], handler.server.folder / uuid4().hex
    data = handler.body
    with data.open("rb") as file:
        checksum = hashlib.file_digest(file, "md5").hexdigest()
    entry = {"path": path, "path_type": "object", "physical_address": str(stored), "checksum": checksum}
    entry |= {"size_bytes": data.stat().st_size, "mtime": int(time.time())}
    with handler.server.lock:
        found = handler.server.repository(repository)
        if handler.headers.get("If-None-Match") == "*" and path in found.tree_of(branch):
            raise Refused(412, "path already exists")
        data.rename(stored)
        found.branch(branch).staged[path] = entry
    return 201, entry


@route("DELETE", "/repositories/{repository}/branches/{branch}/objects")
def delete_object(handler: Handler, repository: str, branch: str) -> Answer:
    with handler.server.lock:
        handler.server.repository(repository).branch(branch).staged[handler.query["path"]] = None
    return 204, None


@route("POST", "/repositories/{repository}/branches/{branch}/objects/delete")
def delete_objects(handler: Handler, repository: str, branch: str) -> Answer:
    with handler.server.lock:
        for path in handler.json()["paths"]:
            handler.server.repository(repository).branch(branch).staged[path] = None
    return 200, {"errors": []}


@route("POST", "/repositories/{repository}/branches/{branch}/commits")
def make_commit(handler: Handler, repository: str, branch: str) -> Answer:
    asked = handler.json()
    with handler.server.lock:
        found = handler.server.repository(repository)
        own, tree = found.branch(branch), found.tree_of(branch)
        if tree == found.commits[own.head].tree:
            raise Refused(400, "commit: no changes")
        own.head = found.add(tree, [own.head], asked["message"], asked.get("metadata"))
        own.staged.clear()
        return 201, found.commits[own.head].facts


@route("GET", "/repositories/{repository}/commits/{ref}")
def get_commit(handler: Handler, repository: str, ref: str) -> Answer:
    found = handler.server.repository(repository)
    return 200, found.commits[found.commit_of(ref)].facts


@route("GET", "/repositories/{repository}/refs/{ref}/commits")
def log_commits(handler: Handler, repository: str, ref: str) -> Answer:
    found = handler.server.repository(repository)
    names = found.ancestors(found.commit_of(ref))
    start = names.index(handler.query["after"]) + 1 if handler.query.get("after") else 0
    shown = names[start : start + int(handler.query.get("amount", 100))]
    more = start + len(shown) < len(names)
    pagination = {"has_more": more, "next_offset": shown[-1] if more else "", "results": len(shown)}
    results = [found.commits[name].facts for name in shown]
    return 200, {"pagination": {**pagination, "max_per_page": 1000}, "results": results}


@route("GET", "/repositories/{repository}/refs/{left}/diff/{right}")
def diff_refs(handler: Handler, repository: str, left: str, right: str) -> Answer:
    found = handler.server.repository(repository)
    kinds = changes(found.tree_of(left), found.tree_of(right))
    return page(handler, [(path, {"type": kinds[path], "path": path, "path_type": "object"}) for path in sorted(kinds)])


@route("POST", "/repositories/{repository}/refs/{source}/merge/{branch}")
def merge(handler: Handler, repository: str, source: str, branch: str) -> Answer:
    asked = handler.json()
    with handler.server.lock:
        found = handler.server.repository(repository)
        own, other = found.branch(branch), found.commit_of(source)
        if own.staged:
            raise Refused(400, f"branch {branch} is dirty: it has uncommitted changes")
        known = set(found.ancestors(other))
        base = found.commits[next(name for name in found.ancestors(own.head) if name in known)].tree
        here, there = found.commits[own.head].tree, found.commits[other].tree
        theirs, ours = changes(base, there), changes(base, here)
        if any(here.get(path) != there.get(path) for path in set(theirs) & set(ours)):
            raise Refused(409, "conflict found")
        if not theirs:
            raise Refused(400, "no changes")
        tree = {path: entry for path, entry in here.items() if theirs.get(path) != "removed"}
        tree |= {path: there[path] for path, kind in theirs.items() if kind != "removed"}
        own.head = found.add(tree, [own.head, other], asked.get("message") or "merge", asked.get("metadata"))
        return 200, {"reference": own.head}


@route("POST", "/repositories/{repository}/tags")
def create_tag(handler: Handler, repository: str) -> Answer:
    asked = handler.json()
    with handler.server.lock:
        found = handler.server.repository(repository)
        if asked["id"] in found.tags:
            raise Refused(409, f"tag {asked['id']} already exists")
        found.tags[asked["id"]] = found.commit_of(asked["ref"])
        return 201, {"id": asked["id"], "commit_id": found.tags[asked["id"]]}


@route("GET", "/repositories/{repository}/tags")
def list_tags(handler: Handler, repository: str) -> Answer:
    tags = dict(handler.server.repository(repository).tags)
    return page(handler, [(name, {"id": name, "commit_id": tags[name]}) for name in sorted(tags)])


@route("GET", "/repositories/{repository}/refs/{ref}/objects")
def get_object(handler: Handler, repository: str, ref: str) -> Answer:
    entry = handler.server.repository(repository).tree_of(ref).get(handler.query["path"])
    if entry is None:
        raise Refused(404, "object not found")
    return 200, Path(entry["physical_address"])


@route("GET", "/repositories/{repository}/refs/{ref}/objects/stat")
def stat_object(handler: Handler, repository: str, ref: str) -> Answer:
    entry = handler.server.repository(repository).tree_of(ref).get(handler.query["path"])
    if entry is None:
        raise Refused(404, "object not found")
    return 200, entry


@route("GET", "/repositories/{repository}/refs/{ref}/objects/ls")
def list_objects(handler: Handler, repository: str, ref: str) -> Answer:
    tree, prefix = handler.server.repository(repository).tree_of(ref), handler.query.get("prefix", "")
    delimiter, found = handler.query.get("delimiter", ""), {}
    for path in sorted(tree):
        rest = path[len(prefix) :] if path.startswith(prefix) else ""
        if delimiter and delimiter in rest:
            name = prefix + rest.partition(delimiter)[0] + delimiter
            empty = {"physical_address": "", "checksum": "", "mtime": 0}
            found[name] = {"path": name, "path_type": "common_prefix", **empty}
        elif rest:
            found[path] = tree[path]
    return page(handler, sorted(found.items()))


if __name__ == "__main__":
    server = StandIn(Path(sys.argv[1]))
    keys = {"LAKECTL_CREDENTIALS_ACCESS_KEY_ID": KEY, "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": SECRET}
    print(json.dumps({"LAKECTL_SERVER_ENDPOINT_URL": server.endpoint, **keys}), flush=True)
    server.serve_forever()
