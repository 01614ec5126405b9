"""Data sets on the Hub as examples: one file of one, looked at before it is downloaded. No code of theirs is run."""

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from huggingface_hub import parse_hf_uri
from huggingface_hub.file_download import repo_folder_name

from neurosteer.errors import HubError, HubUnreachable, UsageError
from neurosteer.examples.columns import USUAL, Columns
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import parse_examples
from neurosteer.examples.refusing import MAX_BYTES
from neurosteer.hub.client import Hub, Token, connect, is_offline
from neurosteer.hub.pulling import cache_folder, download, note, remember
from neurosteer.hub.repos import MAIN, RemoteFile, is_commit, remote_files
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)

DATASET = "dataset"
SPLIT = "train"

_FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_ABOUT = ("dataset_infos.json", "dataset_info.json")
_OTHER_NAMES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train", "training")}
_MOST_FILES = 2_000
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?::([A-Za-z0-9_-]{{1,60}}))?")
_PATH = re.compile(r"[\w.+=, -]+(/[\w.+=, -]+)*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_FILES_HERE = (*_FORMATS, ".txt", ".xlsx", ".xls")


@dataclass(frozen=True)
class DatasetReference:
    """A file of a data set: `path`, or the one that holds `split` (None: the training split, or the only file)."""

    repo: str
    split: str | None = None
    path: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}:{self.split}" if self.split else f"hf://datasets/{self.repo}{path}{revision}"


def is_dataset(text: str) -> bool:
    """Whether a text is meant as a data set on the Hub: an address of one, or `user/name[:split]` where no file or
    folder here is called so."""
    if "://" in text:
        return text.startswith(("hf://", "https://", "http://"))
    found = _NAME.fullmatch(text)
    if not found or PurePosixPath(found[1]).suffix.lower() in _FILES_HERE:
        return False
    return not Path(text).exists() and not Path(found[1].partition("/")[0]).is_dir()


def parse_dataset(text: str) -> DatasetReference:
    """`user/name[:split]`, `hf://datasets/user/name/path/file.csv[@revision]`, or a file's address on the Hub's pages.
    Raises `UsageError` for anything else."""
    plain = text.strip()
    found = _NAME.fullmatch(plain)
    reference = DatasetReference(found[1], found[2]) if found else _of_address(plain)
    if reference is None or not _is_safe(reference):
        raise UsageError(
            f"{text[:200]!r} names no data set on the Hub; write user/name, user/name:split or "
            "hf://datasets/user/name/path/file.csv."
        )
    return reference


def _of_address(text: str) -> DatasetReference | None:
    try:
        found = parse_hf_uri(text, endpoint=os.environ.get("HF_ENDPOINT") or None)
    except ValueError:
        return None
    path, revision = found.path_in_repo or "", found.revision
    if "@" in path:
        path, _, revision = path.partition("@")
    if found.type != DATASET or revision == "":
        return None
    return DatasetReference(found.id, path=path or None, revision=revision if revision != MAIN else None)


def _is_safe(reference: DatasetReference) -> bool:
    """Names become paths in the cache, so they must not lead out of it."""
    path, revision = reference.path or "x", reference.revision or "x"
    parts = (*path.split("/"), *revision.split("/"), *reference.repo.split("/"))
    fits = _NAME.fullmatch(reference.repo) and _PATH.fullmatch(path) and _REVISION.fullmatch(revision)
    return bool(fits) and "--" not in reference.repo and not {"", ".", ".."} & set(parts)


def read_dataset(
    reference: str,
    *,
    name: str | None = None,
    columns: Columns = USUAL,
    drop_conflicts: bool = False,
    token: Token = None,
    offline: bool | None = None,
    progress: Progress = silent,
) -> ContrastSet:
    """The examples of a data set on the Hub, read as `read_examples` reads a file.

    Args:
        reference: `user/name`, for the one file of its training split (Parquet, CSV or JSON), `user/name:split`, or a
            file: `hf://datasets/user/name/path/file.csv@revision` (the revision may be left out).
        name: the set's name; the data set's when left out.
        columns, drop_conflicts: as for `read_examples`.
        token, offline: as for `pull`. What was read before is found again without the Hub.

    Raises:
        HubError: there is no such data set or file, it may not be read, a split has several files (they are listed),
            or the file has more than 20 MB.
        HubUnreachable: the Hub cannot be reached and the file was not read before.
        ExamplesError: what lies there cannot be read as examples.
        UsageError: `reference` names no data set.
    """
    wanted = parse_dataset(reference)
    found = _local(wanted, token, is_offline() if offline is None else offline, progress)
    if found.stat().st_size > MAX_BYTES:
        raise _too_large(wanted, found.name, found.stat().st_size)
    named = name or wanted.repo.partition("/")[2]
    examples = parse_examples(
        found.read_bytes(), filename=found.name, name=named, columns=columns, drop_conflicts=drop_conflicts
    )
    return replace(examples, source=f"{wanted}, {examples.source}")


def _local(wanted: DatasetReference, token: Token, offline: bool, progress: Progress) -> Path:
    """The file in the cache, downloaded where it is not there."""
    if offline or (token is None and is_commit(wanted.revision)):
        kept = _kept(wanted) if token is None else None
        if kept is not None:
            return kept
        if offline:
            raise HubUnreachable(f"{wanted} was not read before, so it cannot be read offline; read it once online.")
    try:
        return _fetch(connect(token), wanted, progress)
    except HubUnreachable as error:
        kept = _kept(wanted) if token is None else None
        if kept is None:
            raise
        logger.warning("%s Using %s as it was read before.", error, wanted)
        return kept


def _fetch(hub: Hub, wanted: DatasetReference, progress: Progress) -> Path:
    to, repo = f"read {wanted}", f"datasets/{wanted.repo}"
    progress(f"Looking at {wanted}")
    info = hub.ask(to, lambda api: api.dataset_info(wanted.repo, revision=wanted.revision), repo=repo)
    commit = info.sha
    if commit is None:
        raise HubError(f"{wanted.repo} is empty: it has no commit yet.")
    files = _files(hub, wanted, commit, to)
    file = files[_chosen(wanted, files)]
    if file.size > MAX_BYTES:
        raise _too_large(wanted, file.path, file.size)
    progress(f"Fetching {file.path} of {wanted.repo}", 0.0)
    path = download(hub, wanted.repo, commit, file, repo_type=DATASET)
    remember(wanted.repo, wanted.revision, commit, repo_type=DATASET)
    if wanted.path is None:
        note(wanted.repo, _choice(wanted), f"{commit}/{file.path}", repo_type=DATASET)
    return path


def _files(hub: Hub, wanted: DatasetReference, commit: str, to: str) -> dict[str, RemoteFile]:
    """The file that was named, or all there are, `_MOST_FILES` at most."""
    repo = f"datasets/{wanted.repo}"
    if wanted.path is not None:
        paths = [wanted.path]
        found = hub.ask(
            to, lambda api: api.get_paths_info(wanted.repo, paths, revision=commit, repo_type=DATASET), repo=repo
        )
        return remote_files(found)
    listed = hub.ask(
        to,
        lambda api: list(
            islice(api.list_repo_tree(wanted.repo, recursive=True, revision=commit, repo_type=DATASET), _MOST_FILES)
        ),
        repo=repo,
    )
    return remote_files(listed)


def _too_large(wanted: DatasetReference, path: str, size: int) -> HubError:
    return HubError(
        f"{path} of {wanted.repo} has {size / 1024**2:.0f} MB, and at most {MAX_BYTES // 1024**2} MB are read; it was "
        f"not downloaded. Name a smaller split ({wanted.repo}:validation) or file."
    )


# --- which file ------------------------------------------------------------------------------------------------------


def _chosen(wanted: DatasetReference, paths: Collection[str]) -> str:
    """The path that is meant. Raises `HubError`, with what there is, where it is none or several."""
    if wanted.path is not None:
        if wanted.path not in paths:
            raise HubError(f"{wanted.repo} has no file {wanted.path[:200]!r}; see its files on the Hub.")
        return wanted.path
    data = sorted(path for path in paths if _format(path) < len(_FORMATS) and PurePosixPath(path).name not in _ABOUT)
    split = wanted.split or SPLIT
    names = _OTHER_NAMES.get(split, (split,))
    found = [path for path in data if set(names) & set(re.split(r"[^a-z0-9]+", path.lower()))]
    if not found and wanted.split is None and len(data) == 1:
        return data[0]
    best = [path for path in found if _format(path) == min(map(_format, found))]
    if len(best) == 1:
        return best[0]
    how = f"name one, like hf://datasets/{wanted.repo}/{(best or data or ['file.csv'])[0]}"
    if best:
        raise HubError(f"The split {split!r} of {wanted.repo} has {len(best)} files: {_shown(best)}; {how}.")
    raise HubError(f"{wanted.repo} has no file of a split {split!r} that can be read; it has {_shown(data)}; {how}.")


def _format(path: str) -> int:
    suffix = PurePosixPath(path).suffix.lower()
    return _FORMATS.index(suffix) if suffix in _FORMATS else len(_FORMATS)


def _shown(paths: Collection[str]) -> str:
    shown = ", ".join(path[:100] for path in list(paths)[:8])
    return (shown or "no Parquet, CSV or JSON") + (", …" if len(paths) > 8 else "")


# --- the cache -------------------------------------------------------------------------------------------------------


def _choice(wanted: DatasetReference) -> str:
    """Where it is noted which file a reference without a path was: what happens to lie in the cache does not tell, for
    it may be another split."""
    return f".neurosteer/{wanted.revision or MAIN}/{wanted.split or ''}.file"


def _kept(wanted: DatasetReference) -> Path | None:
    """The file in the cache, if it was read before by this reference or, where it has a path, by another."""
    folder = cache_folder() / repo_folder_name(repo_id=wanted.repo, repo_type=DATASET)
    try:
        if wanted.path is None:
            found = (folder / _choice(wanted)).read_text(encoding="utf-8")
        else:
            known = wanted.revision if is_commit(wanted.revision) else None
            commit = known or (folder / "refs" / (wanted.revision or MAIN)).read_text(encoding="utf-8").strip()
            found = f"{commit}/{wanted.path}"
        file = folder / "snapshots" / found
        return file if file.is_file() else None
    except (OSError, ValueError):
        return None
