"""A Hub on 127.0.0.1 with repositories in memory, which the real `huggingface_hub` client uses unchanged.

    with HubServer({"hf_good": "someone"}) as hub:
        hub.faults.append(Fault("PUT", "/lfs/", times=2))
        subprocess.run(command, env=hub.environment(tmp_path, token="hf_good"), check=True)
        assert hub.repos["someone/name"].files("v1.0") == {".gitattributes": GITATTRIBUTES, "config.json": b"{}"}

A client in another process needs only `HubServer.environment`. It sets HF_HUB_DISABLE_XET=1, because a client with
hf_xet would upload large files to Xet storage, which is missing here. The client of the tests' own process has read its
environment already: set HF_HUB_OFFLINE to False and HF_HUB_DISABLE_XET to True in `huggingface_hub.constants` (the
fixture `online` does), leave its endpoint alone, and use `HfApi(endpoint=hub.url, token=...)`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(eq=False)
class Fault:
    """A fault in the next `times` requests whose method and path match, after `after` others have passed.

    The requests fail with `status`; with `cut`, the connection closes in the middle of their body, or of the response's
    if they have none; with `lost`, they are handled and the connection closes instead of a response.
    """

    method: str
    path: str
    times: float = 1
    status: int = 503
    cut: bool = False
    lost: bool = False
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """A file of a commit, stored in git or, with `lfs`, in Git LFS."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Hash of the blob in git."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """Hash by which the client compares files and names them in its cache."""
        return self.sha256 if self.lfs else self.oid

    def listed(self, digest: str) -> dict[str, Any]:
        """Sizes and hash, as listings show them; `digest` is the listing's key of the hash."""
        lfs = {"lfs": {digest: self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}}
        return {"size": len(self.content), **(lfs if self.lfs else {})}


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files."""

    sha: str
    parent: str | None
    title: str
    tree: dict[str, Blob]

    def entries(self) -> dict[str, dict[str, Any]]:
        """Files and folders by their paths, as listings show them."""
        folders = {str(parent) for path in self.tree for parent in PurePosixPath(path).parents} - {"."}
        entries = {path: {"type": "directory", "path": path, "oid": self.sha, "size": 0} for path in folders}
        for path, blob in self.tree.items():
            entries[path] = {"type": "file", "path": path, "oid": blob.oid, **blob.listed("oid")}
        return dict(sorted(entries.items()))


class Repo:
    """A repository: commits, branches, tags, pull requests, and uploaded large files (`objects`), committed or not."""

    def __init__(self, key: str, *, private: bool = False):
        self.key = key
        self.namespace, self.name = key.split("/")[-2:]
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.branches["main"] = self.add(None, "initial commit", {".gitattributes": Blob(GITATTRIBUTES)})

    def at(self, revision: str = "main") -> Commit:
        """Find a commit by branch, tag, pull request or hash, which may be abbreviated."""
        names = self.branches | self.tags | self.pulls
        exact = [names[revision]] if revision in names else []
        matches = exact or [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(matches) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[matches[0]]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.at(revision).tree.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """List the commits up to a revision, the last one first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add(self, parent: str | None, title: str, tree: dict[str, Blob]) -> str:
        content = [self.key, len(self.commits), parent, title, sorted((path, blob.oid) for path, blob in tree.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, tree)
        return sha

    def change(self, tree: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
        """Apply one change of a commit to a tree."""
        path = value["path"]
        match kind:
            case "file":
                tree[path] = Blob(base64.b64decode(value["content"]))
            case "lfsFile" if value["oid"] in self.objects:
                tree[path] = Blob(self.objects[value["oid"]], lfs=True)
            case "deletedFile" if path in tree:
                del tree[path]
            case "deletedFolder" if inside := [name for name in tree if name.startswith(path.rstrip("/") + "/")]:
                for name in inside:
                    del tree[name]
            case "deletedFile" | "deletedFolder":
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            case _:
                raise HubError(400, f"{kind} of {path}, whose content was not uploaded")


class Response(NamedTuple):
    """A response to a request."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}

    @classmethod
    def of(cls, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Self:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class HubError(Exception):
    """An error response; the client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        error_headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.response = Response.of({"error": message}, status, error_headers)


@dataclass
class Request:
    """A request, with its user and the namespaces that the user may write to (`owns`)."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: str | None = None
    owns: Iterable[str | None] = ()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def proposes(self) -> bool:
        """Whether it belongs to a new pull request."""
        return "create_pr" in self.query


def ignored(path: str, gitignore: str) -> bool:
    """Whether a .gitignore lists the file or one of its folders; negations and `**` are not supported."""
    rules = [line.strip("/") for line in gitignore.split() if not line.startswith("#")]
    names = {path, *path.split("/"), *map(str, PurePosixPath(path).parents)}
    return any(fnmatch(name, rule) for rule in rules for name in names)


class Connection(BaseHTTPRequestHandler):
    """A connection that reads requests and writes responses, with faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "HubServer"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: requests are in `HubServer.requests`."""

    def respond(self) -> None:
        url, size = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        fault = self.server.receive(self.command, unquote(url.path))
        if fault and fault.cut and (size or self.command == "HEAD"):
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, self.rfile.read(size))
        if fault and not (fault.cut or fault.lost):
            self.send(HubError(fault.status, "The test injected this fault", **fault.headers).response)
            return
        response = self.server.handle(request)
        self.close_connection |= fault is not None
        if not (fault and fault.lost):
            self.send(response, cut=fault is not None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def send(self, response: Response, *, cut: bool = False) -> None:
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if cut else response.body)


class HubServer(ThreadingHTTPServer):
    """The Hub: token -> user, user -> organizations, and the size in bytes above which files go to Git LFS."""

    def __init__(self, tokens: Mapping[str, str], orgs: Mapping[str, Iterable[str]] = {}, lfs_above: int = 1 << 20):
        super().__init__(("127.0.0.1", 0), Connection)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = dict(tokens)
        self.orgs = {user: list(names) for user, names in orgs.items()}
        self.lfs_above = lfs_above
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()
        # Clients keep connections open, which would still be served.
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def environment(self, home: str | os.PathLike[str], token: str | None = None) -> dict[str, str]:
        """Environment variables of a client: those of this process, with this Hub instead of the real one."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        disabled = {
            f"HF_HUB_DISABLE_{feature}": "1" for feature in ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")
        }
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": os.fspath(home), "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
        return inherited | disabled | hub | ({"HF_TOKEN": token} if token else {})

    def count(self, method: str, path: str) -> int:
        """Count the requests whose method and path match, failed ones included."""
        return sum(verb == method and re.search(path, url) is not None for verb, url in self.requests)

    def receive(self, method: str, path: str) -> Fault | None:
        """Record a request, and return the fault to inject."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.after -= 1
                    if fault.after < 0:
                        fault.times -= 1
                        if fault.times < 1:
                            self.faults.remove(fault)
                        return fault
            return None

    def handle(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        with self._lock:
            try:
                token = request.headers.get("Authorization", "").removeprefix("Bearer ")
                if token and token not in self.tokens:
                    raise HubError(401, "Invalid credentials in Authorization header")
                request.user = self.tokens.get(token)
                request.owns = {request.user, *self.orgs.get(request.user, ())}
                for routed, pattern, handler, write in ROUTES:
                    if routed == method and (match := re.fullmatch(pattern, request.path)):
                        return handler(self, request, **self._arguments(request, match.groupdict(), write))
                raise HubError(404, "Sorry, we can't find the page you are looking for.")
            except HubError as error:
                return error.response

    def _arguments(self, request: Request, groups: dict[str, str | None], write: bool) -> dict[str, Any]:
        arguments = {name: unquote(value) for name, value in groups.items() if value is not None}
        if "name" not in arguments:
            return arguments
        repo = self._find(request, f"{arguments.pop('kind', 'models')}/{arguments.pop('name')}".removeprefix("models/"))
        if write:
            # A pull request needs only read access.
            self._user(request, None if request.proposes else repo.namespace)
        return {**arguments, "repo": repo}

    def _find(self, request: Request, key: str) -> Repo:
        repo = self.repos.get(key)
        if repo is None or (repo.private and repo.namespace not in request.owns):
            # Like the real Hub: private repositories look missing.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _user(self, request: Request, writes_to: str | None = None) -> str:
        """Check that the user has a token, and write access to a namespace if one is given."""
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if writes_to and writes_to not in request.owns:
            raise HubError(403, f"You don't have the rights to write to the namespace {writes_to}")
        return request.user

    def whoami(self, request: Request) -> Response:
        user = self._user(request)
        orgs = [{"type": "org", "name": name} for name in self.orgs.get(user, ())]
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return Response.of({"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": token})

    def validate_yaml(self, request: Request) -> Response:
        missing = [] if request.json["content"].startswith("---") else [{"message": "empty or missing yaml metadata"}]
        return Response.of({"errors": [], "warnings": missing})

    def create_repo(self, request: Request) -> Response:
        fields = request.json
        namespace = fields.get("organization") or self._user(request)
        self._user(request, writes_to=namespace)
        key = f"{fields.get('type', 'model')}s/{namespace}/{fields['name']}".removeprefix("models/")
        url = f"{self.url}/{key}"
        if key in self.repos:
            return Response.of({"error": "You already created this repo", "url": url}, 409)
        self.repos[key] = Repo(key, private=fields.get("visibility") == "private")
        return Response.of({"url": url})

    def repo_info(self, request: Request, repo: Repo, revision: str = "main") -> Response:
        commit = repo.at(revision)
        siblings = [
            {"rfilename": path} | ({"blobId": blob.oid, **blob.listed("sha256")} if "blobs" in request.query else {})
            for path, blob in sorted(commit.tree.items())
        ]
        about = {"author": repo.namespace, "private": repo.private, "gated": False, "lastModified": DATE, "tags": []}
        return Response.of({"id": f"{repo.namespace}/{repo.name}", "sha": commit.sha, "siblings": siblings, **about})

    def list_refs(self, request: Request, repo: Repo) -> Response:
        def listed(prefix: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in names.items()]

        own = {"branches": listed("refs/heads/", repo.branches), "tags": listed("refs/tags/", repo.tags)}
        return Response.of({**own, "converts": [], "pullRequests": listed("", repo.pulls)})

    def list_tree(self, request: Request, repo: Repo, revision: str, folder: str = "") -> Response:
        entries = repo.at(revision).entries()
        if folder and folder not in entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        start = f"{folder}/" if folder else ""
        deep = request.query.get("recursive") == ["true"]
        inside = [path for path in entries if path.startswith(start) and (deep or "/" not in path[len(start) :])]
        return Response.of([entries[path] for path in inside])

    def paths_info(self, request: Request, repo: Repo, revision: str) -> Response:
        entries = repo.at(revision).entries()
        paths = [path.rstrip("/") for path in parse_qs(request.body.decode()).get("paths", [])]
        return Response.of([entries[path] for path in paths if path in entries])

    def create_branch(self, request: Request, repo: Repo, branch: str) -> Response:
        return self._name(repo.branches, branch, repo.at(request.json.get("startingPoint", "main")))

    def create_tag(self, request: Request, repo: Repo, revision: str) -> Response:
        return self._name(repo.tags, request.json["tag"], repo.at(revision))

    def _name(self, names: dict[str, str], name: str, commit: Commit) -> Response:
        if name in names:
            raise HubError(409, f"{name} already exists")
        names[name] = commit.sha
        return Response.of({})

    def preupload(self, request: Request, repo: Repo, revision: str) -> Response:
        tree = repo.at(revision).tree
        rules = request.json.get("gitIgnore", tree.get(".gitignore", Blob(b"")).content.decode())

        def plan(path: str, size: int) -> dict[str, Any]:
            mode = "lfs" if path.endswith(".safetensors") or size > self.lfs_above else "regular"
            known = {"oid": tree[path].etag} if path in tree else {}
            return {"path": path, "uploadMode": mode, "shouldIgnore": ignored(path, rules), **known}

        return Response.of({"files": [plan(file["path"], file["size"]) for file in request.json["files"]]})

    def lfs_batch(self, request: Request, repo: Repo) -> Response:
        # The client sends no ref when it opens a pull request.
        self._user(request, repo.namespace if "ref" in request.json else None)

        def plan(oid: str, size: int) -> dict[str, Any]:
            url = f"{self.url}/lfs/{repo.key}/{oid}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            return {"oid": oid, "size": size, **({} if oid in repo.objects else {"actions": actions})}

        objects = [plan(item["oid"], item["size"]) for item in request.json["objects"]]
        return Response.of({"transfer": "basic", "objects": objects})

    # Like for the signed URLs of the real Hub, the client sends no token.
    def put_object(self, request: Request, key: str, oid: str) -> Response:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not match its digest")
        self.repos[key].objects[oid] = request.body
        return Response(200)

    def verify(self, request: Request, key: str, oid: str) -> Response:
        if len(self._find(request, key).objects.get(oid, b"")) != request.json["size"]:
            raise HubError(404, "There is no such object")
        return Response.of({})

    def commit(self, request: Request, repo: Repo, revision: str) -> Response:
        head, changes = repo.at(revision), [json.loads(line) for line in request.body.splitlines()]
        header = changes.pop(0)["value"]
        if not head.sha.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        names = repo.pulls if request.proposes or revision in repo.pulls else repo.branches
        name = f"refs/pr/{len(repo.pulls) + 1}" if request.proposes else revision
        if not request.proposes and name not in names:
            raise HubError(400, f"{revision} is not a branch")
        tree = dict(head.tree)
        for change in changes:
            repo.change(tree, change["key"], change["value"])
        names[name] = sha = repo.add(head.sha, header["summary"], tree)
        page = f"{self.url}/{repo.key}"
        pull = {"pullRequestUrl": f"{page}/discussions/{len(repo.pulls)}"} if request.proposes else {}
        return Response.of({"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", **pull})

    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        blob, size = commit.tree[path], len(commit.tree[path].content)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)} if blob.lfs else {}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not byte_range:
            return Response(200, blob.content, headers)
        start, stop = int(byte_range[1]), min(int(byte_range[2] or size) + 1, size)
        if start >= stop:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return Response(206, blob.content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?P<name>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)"
LARGE = r"/lfs/(?P<key>.+)/(?P<oid>[0-9a-f]{64})"
AT = r"/(?P<revision>[^/]+)"

# Method, path, handler, and whether the request needs write access to the repository.
ROUTES: list[tuple[str, str, Callable[..., Response], bool]] = [
    ("GET", "/api/whoami-v2", HubServer.whoami, False),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml, False),
    ("POST", "/api/repos/create", HubServer.create_repo, False),
    ("GET", f"{REPO}(?:/revision{AT})?", HubServer.repo_info, False),
    ("GET", f"{REPO}/refs", HubServer.list_refs, False),
    ("GET", f"{REPO}/tree{AT}(?:/(?P<folder>.+))?", HubServer.list_tree, False),
    ("POST", f"{REPO}/paths-info{AT}", HubServer.paths_info, False),
    ("POST", f"{REPO}/branch/(?P<branch>[^/]+)", HubServer.create_branch, True),
    ("POST", f"{REPO}/tag{AT}", HubServer.create_tag, True),
    ("POST", f"{REPO}/preupload{AT}", HubServer.preupload, True),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", HubServer.lfs_batch, False),
    ("PUT", LARGE, HubServer.put_object, False),
    ("POST", f"{LARGE}/verify", HubServer.verify, False),
    ("POST", f"{REPO}/commit{AT}", HubServer.commit, True),
    ("GET", f"{PAGE}/resolve{AT}/(?P<path>.+)", HubServer.resolve, False),
]
