"""What a reference to the Hub names, and what lies in a repo: looked at, with nothing downloaded."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from huggingface_hub import parse_hf_uri
from huggingface_hub.constants import HF_PROTOCOL, HF_URI_TYPE_PREFIXES, HF_URL_HOSTS
from huggingface_hub.hf_api import ModelInfo, RepoFile, RepoFolder

from neurosteer.artifacts.metadata import LIBRARY
from neurosteer.artifacts.storage import CONFIG_FILE, FILE_LIMITS, WEIGHTS_FILE
from neurosteer.errors import HubError, UsageError
from neurosteer.hub.client import Hub

MOST_ARTIFACTS = 100
MAX_INDEX_BYTES = 1 << 16
MAIN = "main"

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})(?:/(?P<name>{_NAME}))?(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?"
)
_PACK = "neurosteer-pack"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_ENTRIES, _MOST_FOLDERS = 1000, 300
_RUNS_CODE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".py")


@dataclass(frozen=True)
class Reference:
    """An artifact on the Hub: `name` is its folder in a pack, `revision` a branch, a tag or a commit (None: main)."""

    repo: str
    name: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repo, self.name))) + (f"@{self.revision}" if self.revision else "")

    def path(self, file: str) -> str:
        """Where `file` of the artifact lies in the repo."""
        return f"{self.name}/{file}" if self.name else file


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it, its content known by `sha256` (large files) or git's `blob` hash."""

    path: str
    size: int
    blob: str
    sha256: str | None

    def is_same(self, data: bytes) -> bool:
        """Whether the file holds `data`."""
        if self.sha256 is not None:
            return hashlib.sha256(data).hexdigest() == self.sha256
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == self.blob


def parse_reference(text: str) -> Reference:
    """`user/repo[/name][@revision]`, or as the Hub writes it: `https://huggingface.co/user/repo[/tree/revision[/name]]`,
    `hf://user/repo[@revision][/name]`. Raises `UsageError` for anything else."""
    plain = _plain_reference(text.strip())
    found = _REFERENCE.fullmatch(plain) if plain is not None else None
    repo, revision = (found["repo"], found["revision"]) if found else ("", None)
    # A revision becomes a path in the cache, so it must not lead out of it.
    odd = any(bad in repo for bad in ("..", "--")) or any(bad in f"{revision or ''}/" for bad in ("..", "//", "./"))
    if not found or odd:
        raise UsageError(
            f"{text[:200]!r} names nothing on the Hub; write user/repo, user/repo/name or user/repo@revision."
        )
    return Reference(repo, found["name"], revision)


def _plain_reference(text: str) -> str | None:
    """An address of the Hub's as `user/repo[/name][@revision]`, other text as it is; None for an address that is not
    of a model's repo."""
    first = text.partition("/")[0].lower()
    if first in HF_URL_HOSTS:
        text = f"https://{text}"
    elif first in HF_URI_TYPE_PREFIXES:  # models/user/repo: no user has such a name
        text = f"{HF_PROTOCOL}{text}"
    if "://" not in text:
        return text
    try:
        found = parse_hf_uri(text, endpoint=os.environ.get("HF_ENDPOINT") or None)
    except ValueError:  # also what is no address at all
        return None
    if found.type != "model":
        return None
    folder, _, last = found.path_in_repo.rpartition("/")
    name = folder if last in FILE_LIMITS else found.path_in_repo  # the page of one of its files means the artifact
    revision = found.revision if found.revision != MAIN else None
    return "/".join(filter(None, (found.id, name))) + (f"@{revision}" if revision else "")


def is_commit(revision: str | None) -> bool:
    """Whether `revision` is a whole commit hash, whose files never change."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def repo_info(hub: Hub, repo: str, revision: str | None, to: str) -> ModelInfo:
    """What the Hub says of `repo` at `revision`, its commit (`sha`) above all. Raises as `Hub.ask` does."""
    return hub.ask(to, lambda api: api.model_info(repo, revision=revision), repo=repo)


def files_at(hub: Hub, repo: str, commit: str, paths: Sequence[str], to: str) -> dict[str, RemoteFile]:
    """Those of `paths` that are files of `repo` at `commit`."""
    found = hub.ask(to, lambda api: api.get_paths_info(repo, list(paths), revision=commit), repo=repo)
    return remote_files(found)


def top_entries(hub: Hub, repo: str, commit: str, to: str) -> tuple[dict[str, RemoteFile], list[str]]:
    """The files and the folders at the top of `repo`, `_MOST_ENTRIES` of them at most: a repo may hold any number."""
    entries = hub.ask(to, lambda api: list(islice(api.list_repo_tree(repo, revision=commit), _MOST_ENTRIES)), repo=repo)
    return remote_files(entries), sorted(entry.path for entry in entries if isinstance(entry, RepoFolder))


def pack_names(hub: Hub, repo: str, commit: str, folders: Iterable[str], to: str) -> list[str]:
    """Those of `folders` that hold an artifact, `MOST_ARTIFACTS` at most."""
    named = [folder for folder in folders if re.fullmatch(_NAME, folder)][:_MOST_FOLDERS]
    if not named:
        return []
    wanted = [f"{folder}/{file}" for folder in named for file in (CONFIG_FILE, WEIGHTS_FILE)]
    there = files_at(hub, repo, commit, wanted, to)
    whole = [one for one in named if f"{one}/{CONFIG_FILE}" in there and f"{one}/{WEIGHTS_FILE}" in there]
    return whole[:MOST_ARTIFACTS]


def pack_index(names: Sequence[str]) -> bytes:
    """The `config.json` at a pack's top. The Hub counts as downloads of a repo how often that file is asked for, so
    `pull` asks for it too. It has no `model_type`: nobody takes it for a model of transformers."""
    index = {"schema_version": 1, "kind": _PACK, "library_name": LIBRARY, "artifacts": sorted(names)}
    return (json.dumps(index, indent=2) + "\n").encode()


def is_index(data: bytes) -> bool:
    """Whether `data` is what `pack_index` writes."""
    try:
        index = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(index, dict) and index.get("kind") == _PACK


def no_artifact(repo: str, files: Mapping[str, RemoteFile]) -> HubError:
    """The error for a repo without an artifact; says so where it holds what NeuroSteer never reads."""
    risky = next((path for path in sorted(files) if path.lower().endswith(_RUNS_CODE)), None)
    more = f"; its {risky[:60]!r} is never read, since loading such a file can run code" if risky else ""
    return HubError(f"{repo} holds no artifact of NeuroSteer (no {CONFIG_FILE} and {WEIGHTS_FILE}){more}.")


def remote_files(entries: Iterable[RepoFile | RepoFolder]) -> dict[str, RemoteFile]:
    """The files among what the Hub lists, by path."""
    return {
        entry.path: RemoteFile(
            entry.path,
            entry.lfs.size if entry.lfs else entry.size,
            entry.blob_id,
            entry.lfs.sha256 if entry.lfs else None,
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    }
