"""A Hub of our own: a server that speaks what the real `huggingface_hub` client needs, with faults to switch on.

In a test: `with running() as hub: ...` (fixture `hub`). In a process of its own: `python tests/hub_server.py --port N`,
then `HF_ENDPOINT=http://127.0.0.1:N HF_HUB_DISABLE_XET=1` and one of the tokens that it prints. There, faults are
switched on with `POST /_test/faults` and the JSON of a `Fault`.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml

Headers = dict[str, str]
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".ckpt")
LARGE_BYTES = 10 << 20
PAGE = 50
DATASETS = "datasets/"  # how the names of data sets begin among `FakeHub.repos`

ROUTES: tuple[tuple[str, str, str], ...] = (
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate-yaml", "POST", r"/api/validate-yaml"),
    ("models", "GET", r"/api/models"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    ("paths-info", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    ("auth-check", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"),
    ("collections", "POST", r"/api/collections"),
    ("collection", "GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)"),
    ("collection-item", "POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items"),
    ("lfs-batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("lfs-put", "PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})"),
    ("head", "HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("resolve", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("test-faults", "POST", r"/_test/faults"),
)


# --- what it holds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    name: str
    role: str = "write"  # of its token: "write" or "read"
    organisations: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    data: bytes
    large: bool = False
    claimed_size: int | None = None  # what listings say of its size, where that is a lie

    @property
    def size(self) -> int:
        return len(self.data) if self.claimed_size is None else self.claimed_size

    @property
    def blob(self) -> str:
        data = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = b"version https://git-lfs.github.com/spec/v1\n"
        return head + f"oid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, File]
    title: str
    author: str
    date: datetime


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: str | bool = False
    readers: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    likes: int = 0
    downloads: int = 0

    @property
    def owner(self) -> str:
        return self.id.removeprefix(DATASETS).partition("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str | None) -> Commit | None:
        wanted = self.tags.get(revision or "main", revision or "main")
        if wanted == "main":
            return self.head
        return next((one for one in self.commits if one.oid == wanted), None)

    def add(self, files: dict[str, File], title: str, author: str) -> Commit:
        number = len(self.commits)
        seed = f"{self.id}{number}{sorted((path, file.blob) for path, file in files.items())}{title}"
        date = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
        self.commits.append(Commit(hashlib.sha1(seed.encode()).hexdigest(), files, title, author, date))
        return self.head


@dataclass
class Fault:
    """What goes wrong on `route`, `times` times after `skip` requests that go well.

    `what`: "status" answers with `status`, `headers` and `body`; "cut" closes the connection without an answer; "cut
    after" does so after the request was carried out; "half" closes it in the middle of the answer; "hang" answers
    after `seconds`; "drip" lets the answer trickle for about that long; "other bytes" changes a bit of the answer's;
    "other hash" makes `tree` and `paths-info` tell other hashes; "not json" answers with a web page; "race" lets
    somebody else commit first.
    """

    route: str
    what: str = "status"
    status: int = 500
    times: int = 1
    skip: int = 0
    headers: Headers = field(default_factory=dict)
    body: str = ""
    seconds: float = 60.0


@dataclass
class Request:
    route: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Headers
    body: bytes
    matched: dict[str, str]
    account: Account | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Headers = field(default_factory=dict)


class Refusal(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message}, status, headers)


def as_json(data: Any, status: int = 200, headers: Headers | None = None) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


# --- the server ------------------------------------------------------------------------------------------------------


class FakeHub:
    """Repos, accounts and faults of one server. Tests look into it and change it as they like, at any time."""

    def __init__(self) -> None:
        self.url = ""
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.reset()

    def reset(self) -> None:
        """As it began: alice and bob may write, carol's token may only read, nothing is there."""
        self.accounts = {
            "hf_alice": Account("alice", organisations=("lab",)),
            "hf_bob": Account("bob"),
            "hf_carol": Account("carol", role="read"),
        }
        for container in (self.repos, self.collections, self.large, self.faults, self.requests):
            container.clear()

    def fail(self, route: str, what: str = "status", **options: Any) -> Fault:
        """Switch a fault on (see `Fault`)."""
        fault = Fault(route, what, **options)
        self.faults.append(fault)
        return fault

    def put(self, repo: str, files: Mapping[str, bytes | File], **options: Any) -> Repo:
        """A repo with `files`, as if somebody had pushed them with git."""
        made = self.repos.get(repo) or Repo(repo, **options)
        self.repos[repo] = made
        before = made.head.files if made.commits else {}
        new = {
            path: given if isinstance(given, File) else File(given, path.endswith(LARGE_SUFFIXES))
            for path, given in files.items()
        }
        made.add({**before, **new}, "by hand", made.owner)
        return made

    def routes(self) -> list[str]:
        """What was asked so far."""
        return [request.route for request in self.requests]

    # --- one request ------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        try:
            token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if token and token not in self.accounts:
                raise Refusal(401, "Invalid credentials in Authorization header")
            request.account = self.accounts.get(token)
            return getattr(self, "_" + request.route.replace("-", "_"))(request)
        except Refusal as refusal:
            return refusal.answer

    def _test_faults(self, request: Request) -> Answer:
        self.fail(**request.json)
        return as_json({"faults": len(self.faults)})

    def _whoami(self, request: Request) -> Answer:
        account = self._logged_in(request)
        orgs = [{"name": name, "type": "org", "roleInOrg": "write"} for name in account.organisations]
        login = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        return as_json({"type": "user", "name": account.name, "orgs": orgs, "auth": login})

    def _create(self, request: Request) -> Answer:
        account, asked = self._logged_in(request), request.json
        repo = f"{asked.get('organization') or account.name}/{asked['name']}"
        if repo in self.repos and self._may_read(self.repos[repo], account):
            data = {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
            return as_json(data, 409)
        self._check_writer(repo, account)
        made = Repo(repo, private=asked.get("visibility") == "private")
        made.add({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit", "")
        self.repos[repo] = made
        return as_json({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def _collections(self, request: Request) -> Answer:
        account, asked = self._logged_in(request), request.json
        self._check_writer(f"{asked['namespace']}/", account)
        words = "-".join(re.findall(r"[a-z0-9]+", asked["title"].lower()))
        slug = f"{asked['namespace']}/{words}-{hashlib.sha1(asked['title'].encode()).hexdigest()[:24]}"
        if slug in self.collections:
            return as_json({"error": "This collection already exists", "slug": slug}, 409)
        self.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "items": [], "position": 0,
            "lastUpdated": "2026-01-01T00:00:00.000Z", "private": asked["private"], "theme": "green", "upvotes": 0,
        }  # fmt: skip
        return as_json(self.collections[slug])

    def _collection(self, request: Request) -> Answer:
        return as_json(self.collections[request.matched["slug"]])

    def _collection_item(self, request: Request) -> Answer:
        slug, item = request.matched["slug"], request.json["item"]
        self._check_writer(slug, self._logged_in(request))
        items = self.collections[slug]["items"]
        if item["id"] not in self.repos:
            raise Refusal(404, "Item not found")
        if any(one["id"] == item["id"] for one in items):
            raise Refusal(409, "This item already exists in the collection")
        items.append({"_id": f"{len(items):024x}", "id": item["id"], "type": item["type"], "position": len(items)})
        return as_json(self.collections[slug])

    def _validate_yaml(self, request: Request) -> Answer:
        errors, warnings = check_metadata(request.json["content"])
        found = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
        return as_json(found, 400 if errors else 200)

    def _models(self, request: Request) -> Answer:
        asked = {key: values[0] for key, values in request.query.items()}
        expand = request.query.get("expand", [])
        wanted = set(request.query.get("filter", []))
        found = [repo for repo in self.repos.values() if self._may_read(repo, request.account)]
        found = [repo for repo in found if wanted <= set(tags_of(repo))]
        if "author" in asked:
            found = [repo for repo in found if repo.owner == asked["author"]]
        if "search" in asked:
            found = [repo for repo in found if asked["search"].lower() in repo.id.lower()]
        found.sort(key=lambda repo: (-getattr(repo, asked.get("sort", "likes"), 0), repo.id))
        return as_json([listing(repo, expand) for repo in found[: int(asked.get("limit", 1000))]])

    def _info(self, request: Request) -> Answer:
        repo = self._readable(request)
        commit = self._commit_of(repo, request)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return as_json({**listing(repo, ["cardData", "siblings"], commit), "sha": commit.oid, "siblings": siblings})

    def _auth_check(self, request: Request) -> Answer:
        self._check_access(self._readable(request), request.account)
        return as_json({})

    def _tree(self, request: Request) -> Answer:
        commit = self._commit_of(self._readable(request), request)
        top = unquote(request.matched.get("path") or "")
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = tree_entries(commit, f"{top}/" if top else "", recursive)
        first = int(request.query.get("cursor", ["0"])[0])
        headers = {}
        if first + PAGE < len(entries):
            link = f"{self.url}{request.path}?recursive={recursive}&cursor={first + PAGE}"
            headers["Link"] = f'<{link}>; rel="next"'
        return as_json(entries[first : first + PAGE], headers=headers)

    def _paths_info(self, request: Request) -> Answer:
        commit = self._commit_of(self._readable(request), request)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        known = {entry["path"]: entry for entry in tree_entries(commit, "", True)}
        return as_json([known[path] for path in wanted if path in known])

    def _preupload(self, request: Request) -> Answer:
        repo = self._writable(request)
        files = []
        for one in request.json["files"]:
            mode = "lfs" if one["path"].endswith(LARGE_SUFFIXES) or one["size"] > LARGE_BYTES else "regular"
            present = repo.head.files.get(one["path"])
            oid = None if present is None else present.etag
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files, "commitOid": repo.head.oid})

    def _lfs_batch(self, request: Request) -> Answer:
        self._writable(request)
        objects = []
        for one in request.json["objects"]:
            missing = one["oid"] not in self.large
            actions = {"upload": {"href": f"{self.url}/_lfs/{one['oid']}", "header": {}}}
            objects.append({**one, "authenticated": True, **({"actions": actions} if missing else {})})
        return as_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request) -> Answer:
        oid = request.matched["oid"]
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The content is not what the address says")
        self.large[oid] = request.body
        return Answer(headers={"ETag": oid})

    def _commit(self, request: Request) -> Answer:
        repo = self._writable(request)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.head.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.head.files)
        for line in lines:
            if line["key"] != "header":
                self._apply(line["key"], line["value"], files)
        account = self._logged_in(request)
        made = repo.add(files, header["summary"], account.name)
        return as_json({"success": True, "commitOid": made.oid, "commitUrl": f"{self.url}/{repo.id}/commit/{made.oid}"})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.large:
                raise Refusal(400, f"Large file {value['path']} was never uploaded")
            files[value["path"]] = File(self.large[value["oid"]], large=True)
        elif files.pop(value["path"], None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")

    def _head(self, request: Request) -> Answer:
        answer = self._resolve(request)
        answer.body = b""
        return answer

    def _resolve(self, request: Request) -> Answer:
        repo = self._readable(request)
        self._check_access(repo, request.account)
        commit = self._commit_of(repo, request)
        file = commit.files.get(unquote(request.matched["path"]))
        if file is None:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.answer.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        if request.method == "GET" and request.matched["path"] == "config.json":
            repo.downloads += 1  # as the Hub counts them, by requests for this file at the top
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        size = len(file.data)
        headers |= {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        begin = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        if begin is None:
            return Answer(200, file.data, headers)
        rest = file.data[int(begin[1]) :]
        span = {"Content-Length": str(len(rest)), "Content-Range": f"bytes {begin[1]}-{size - 1}/{size}"}
        return Answer(206, rest, headers | span)

    # --- who may do what --------------------------------------------------------------------------------------------

    def _logged_in(self, request: Request) -> Account:
        if request.account is None:
            raise Refusal(401, "Invalid username or password.")
        return request.account

    def _may_read(self, repo: Repo, account: Account | None) -> bool:
        return not repo.private or (account is not None and self._is_owner(repo.id, account))

    def _is_owner(self, repo: str, account: Account) -> bool:
        return repo.removeprefix(DATASETS).partition("/")[0] in (account.name, *account.organisations)

    def _readable(self, request: Request) -> Repo:
        repo = self.repos.get(request.matched["repo"])
        if repo is None or not self._may_read(repo, request.account):
            raise Refusal(404 if request.account else 401, "Repository not found", "RepoNotFound")
        return repo

    def _check_access(self, repo: Repo, account: Account | None) -> None:
        if not repo.gated or (account and (self._is_owner(repo.id, account) or account.name in repo.readers)):
            return
        raise Refusal(403 if account else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")

    def _writable(self, request: Request) -> Repo:
        repo = self._readable(request)
        self._check_writer(repo.id, self._logged_in(request))
        return repo

    def _check_writer(self, repo: str, account: Account) -> None:
        if account.role != "write" or not self._is_owner(repo, account):
            raise Refusal(403, "You don't have the rights to write to this namespace")

    def _commit_of(self, repo: Repo, request: Request) -> Commit:
        commit = repo.at(unquote(request.matched.get("revision") or "main"))
        if commit is None:
            raise Refusal(404, "Revision not found", "RevisionNotFound")
        return commit

    # --- faults -----------------------------------------------------------------------------------------------------

    def next_fault(self, route: str) -> Fault | None:
        for fault in self.faults:
            if fault.route != route:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                return None
            if fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def race(self, repo: str) -> None:
        """Somebody else commits."""
        self.put(repo, {"NOTES.md": f"note {time.time_ns()}".encode()})


def front_matter(repo: Repo, commit: Commit | None = None) -> dict[str, Any]:
    card = (commit or repo.head).files.get("README.md")
    found = re.match(rb"\A---\r?\n(.*?)\r?\n---", card.data, re.DOTALL) if card else None
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def tags_of(repo: Repo) -> list[str]:
    """What the Hub makes of a card's metadata."""
    data = front_matter(repo)
    tags = [tag for tag in data.get("tags") or [] if isinstance(tag, str)]
    tags += [data["library_name"]] if isinstance(data.get("library_name"), str) else []
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        tags += [f"base_model:{base}", f"base_model:{data.get('base_model_relation', 'finetune')}:{base}"]
    tags += [f"license:{data['license']}"] if data.get("license") else []
    return list(dict.fromkeys(tags))


def listing(repo: Repo, expand: list[str], commit: Commit | None = None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "id": repo.id,
        "author": repo.owner,
        "private": repo.private,
        "gated": repo.gated,
        "likes": repo.likes,
        "downloads": repo.downloads,
        "tags": tags_of(repo),
        "lastModified": repo.head.date.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
    }
    if "cardData" in expand:
        data["cardData"] = json.loads(json.dumps(front_matter(repo, commit), default=str))
    return data


def tree_entries(commit: Commit, top: str, recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(top):
            continue
        parts = path.removeprefix(top).split("/")
        for depth in range(1, len(parts)):
            folder = top + "/".join(parts[:depth])
            entries.setdefault(folder, {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
        if recursive or len(parts) == 1:
            entry = {"type": "file", "oid": file.blob, "size": file.size, "path": path}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            entries[path] = entry
    shown = entries.values() if recursive else [one for one in entries.values() if "/" not in one["path"][len(top) :]]
    return list(shown)


def check_metadata(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings, as far as the Hub's own check matters here."""
    found = re.match(r"\A---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata is no mapping"], []
    errors = []
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(data.get("license", "other"))):
        errors.append('"license" must be one of the known ones')
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid')
    for entry in data.get("model-index") or []:
        if not entry.get("name") or not isinstance(entry.get("results"), list):
            errors.append('"model-index" needs a name and results')
    return errors, []


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Application:
    """The server as an ASGI application, with the faults around it."""

    def __init__(self, hub: FakeHub) -> None:
        self.hub = hub

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            return
        request = await _read(scope, receive)
        self.hub.requests.append(request)
        fault = self.hub.next_fault(request.route)
        if request.route == "unknown":
            await _write(send, request, as_json({"error": "no such address"}, 404))
        elif fault is None:
            await _write(send, request, self.hub.answer(request))
        else:
            await self._fail(fault, request, send)

    async def _fail(self, fault: Fault, request: Request, send: Callable[[Any], Any]) -> None:
        if fault.what == "status":
            body = fault.body or json.dumps({"error": f"Fault {fault.status}"})
            await _write(send, request, Answer(fault.status, body.encode(), fault.headers))
            return
        if fault.what == "not json":
            page = b"<html><body>Please log in to the hotel's network</body></html>"
            await _write(send, request, Answer(200, page, {"Content-Type": "text/html"}))
            return
        if fault.what == "cut":
            _transport(send).abort()
            return
        if fault.what == "hang":
            await asyncio.sleep(fault.seconds)
        if fault.what == "race":
            self.hub.race(request.matched["repo"])
        answer = self.hub.answer(request)
        if fault.what == "cut after":
            _transport(send).abort()
            return
        if fault.what == "other bytes":
            answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
        if fault.what == "other hash":
            data = json.loads(answer.body)
            for entry in data:
                entry["oid"] = "f" * 40
                entry |= {"lfs": {**entry["lfs"], "oid": "f" * 64}} if "lfs" in entry else {}
            answer.body = json.dumps(data).encode()
        if fault.what == "drip":
            await _drip(send, answer, fault.seconds)
            return
        await _write(send, request, answer, half=fault.what == "half")


async def _read(scope: Any, receive: Callable[[], Any]) -> Request:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    path, method = scope["raw_path"].decode(), scope["method"]
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
    query = parse_qs(scope["query_string"].decode())
    plain = re.sub(r"\A/api/datasets/", "/api/models/", path)
    plain = plain.removeprefix("/" + DATASETS[:-1]) if plain.startswith(f"/{DATASETS}") else plain
    for name, wanted, pattern in ROUTES:
        found = re.fullmatch(pattern, plain)
        if found and method == wanted:
            matched = {key: value for key, value in found.groupdict().items() if value is not None}
            if _of_dataset(path):
                matched["repo"] = f"{DATASETS}{matched['repo']}"
            return Request(name, method, path, query, headers, body, matched)
    return Request("unknown", method, path, query, headers, body, {})


def _of_dataset(path: str) -> bool:
    return path.startswith((f"/{DATASETS}", f"/api/{DATASETS}"))


async def _write(send: Callable[[Any], Any], request: Request, answer: Answer, *, half: bool = False) -> None:
    headers = {"Content-Length": str(len(answer.body)), **answer.headers}
    encoded = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    if half:
        await send({"type": "http.response.body", "body": answer.body[: len(answer.body) // 2], "more_body": True})
        await asyncio.sleep(0.05)
        _transport(send).abort()
        return
    body = b"" if request.method == "HEAD" else answer.body
    await send({"type": "http.response.body", "body": body})


async def _drip(send: Callable[[Any], Any], answer: Answer, seconds: float) -> None:
    headers = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in answer.headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    for place in range(int(seconds / 0.1)):
        await send({"type": "http.response.body", "body": answer.body[place : place + 1], "more_body": True})
        await asyncio.sleep(0.1)
    _transport(send).abort()


def _transport(send: Any) -> asyncio.Transport:
    return send.__self__.transport  # uvicorn's: there is no other way to close a connection without an answer


def make_server(hub: FakeHub, listening: socket.socket) -> uvicorn.Server:
    hub.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(
        Application(hub), log_level="error", http="h11", ws="none", lifespan="off", proxy_headers=False
    )
    return uvicorn.Server(config)


def listen(port: int = 0) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # without, 40 ms a request
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    return listening


@contextmanager
def running() -> Iterator[FakeHub]:
    """A server in a thread of this process; `hub.url` is where."""
    hub, listening = FakeHub(), listen()
    server = make_server(hub, listening)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield hub
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)
        listening.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub of our own, for tests.")
    parser.add_argument("--port", type=int, default=0)
    hub, listening = FakeHub(), listen(parser.parse_args().port)
    server = make_server(hub, listening)
    tokens = ", ".join(f"{token} ({account.name}, {account.role})" for token, account in hub.accounts.items())
    print(f"{hub.url}  tokens: {tokens}", flush=True)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
