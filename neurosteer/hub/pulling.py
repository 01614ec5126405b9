"""Fetching artifacts: only the files they need, looked at before they are downloaded, kept for use without the Hub."""

import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from tqdm.auto import tqdm

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.metadata import CARD_FILE
from neurosteer.artifacts.storage import CONFIG_FILE, FILE_LIMITS, WEIGHTS_FILE, is_artifact, load
from neurosteer.errors import ArtifactError, HubError, HubUnreachable, UsageError
from neurosteer.hub import repos
from neurosteer.hub.client import Hub, Token, check_time, connect, is_offline
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)

MAX_CARD_BYTES = 1 << 20
_LEAST_S, _BYTES_PER_S = 60.0, 50_000  # how slow a download may be


def pull(reference: str, *, token: Token = None, offline: bool | None = None, progress: Progress = silent) -> Artifact:
    """The artifact at `reference`: `user/repo`, or `user/repo/name` in a pack, with `@revision` where one is meant.

    Args:
        token: None for that of `HF_TOKEN` or the stored login, False for none.
        offline: True for what was pulled before, without asking the Hub; None as `HF_HUB_OFFLINE` says. When the Hub
                cannot be reached, what was pulled before is used with a warning, unless `token` is given.

    Raises:
        HubError: there is no such artifact, or it may not be read; a pack, without a name, lists its names.
        HubUnreachable: the Hub cannot be reached and it was not pulled before.
        ArtifactError: what lies there is damaged, too large or not valid.
        UsageError: `reference` names nothing on the Hub.
    """
    return _read(reference, pull_folder(reference, token=token, offline=offline, progress=progress))


def pull_into(
    reference: str,
    folder: str | Path,
    *,
    token: Token = None,
    offline: bool | None = None,
    progress: Progress = silent,
) -> Artifact:
    """As `pull`, and its files, the card as it is on the Hub among them, in the new folder `folder`.

    Raises also `UsageError` when `folder` exists or cannot be written.
    """
    target = Path(folder).expanduser()
    if target.exists():
        raise UsageError(f"{str(folder)[:200]!r} exists; choose a folder that does not, so that nothing is lost.")
    kept = pull_folder(reference, token=token, offline=offline, progress=progress)
    artifact = _read(reference, kept)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:80]}-") as temporary:
            copies = Path(temporary) / "new"
            copies.mkdir()
            for name in filter(lambda name: (kept / name).is_file(), FILE_LIMITS):
                shutil.copyfile(kept / name, copies / name)
            copies.rename(target)
    except OSError as error:
        raise UsageError(
            f"{str(folder)[:200]!r} could not be written ({error.strerror or error}); choose another folder."
        ) from error
    return artifact


def _read(reference: str, folder: Path) -> Artifact:
    """The artifact in the cache, what is wrong with it said without the cache's long paths."""
    try:
        return load(folder)
    except ArtifactError as error:
        reason = str(error).replace(f"{folder.resolve()}{os.sep}", "")
        raise ArtifactError(f"{repos.parse_reference(reference)} cannot be used: {reason}") from error


def pull_folder(
    reference: str, *, token: Token = None, offline: bool | None = None, progress: Progress = silent
) -> Path:
    """The folder in the cache that holds the artifact's files, not to be written to. As `pull`, without reading it."""
    wanted = repos.parse_reference(reference)
    # One process may pull for several people, each with a token: what one of them may read is not the others', and only
    # the Hub knows whose it is.
    kept = _kept_folder(wanted) if token is None else None
    if kept is not None and repos.is_commit(wanted.revision):
        return kept
    if is_offline() if offline is None else offline:
        if kept is not None:
            return kept
        if token is not None:
            raise HubUnreachable(f"Without the Hub nobody can say whether this token may read {wanted}; go online.")
        raise HubUnreachable(f"{wanted} was not pulled before, so it cannot be used offline; pull it once online.")
    hub = connect(token)
    try:
        return fetch(hub, wanted, progress)
    except HubUnreachable as error:
        if kept is None:
            raise
        logger.warning("%s Using %s as it was pulled before.", error, wanted)
        return kept


def list_artifacts(repo_reference: str, *, token: Token = None) -> list[str]:
    """The names of the artifacts in a pack; none for a repo that holds one artifact. Raises as `pull` does."""
    wanted, hub = repos.parse_reference(repo_reference), connect(token)
    to = f"list {wanted.repo}"
    commit = _commit(hub, wanted, to)
    files, folders = repos.top_entries(hub, wanted.repo, commit, to)
    if CONFIG_FILE in files and WEIGHTS_FILE in files:
        return []
    names = repos.pack_names(hub, wanted.repo, commit, folders, to)
    if not names:
        raise repos.no_artifact(wanted.repo, files)
    return names


def read_card(reference: str, *, token: Token = None) -> str:
    """The card at `reference` as its authors wrote it: Markdown that may hold anything, to be shown without its HTML.

    Empty where there is none. Raises as `pull` does, and `HubError` for a card above 1 MB.
    """
    wanted, hub = repos.parse_reference(reference), connect(token)
    to = f"read the card of {wanted}"
    commit, path = _commit(hub, wanted, to), wanted.path(CARD_FILE)
    card = repos.files_at(hub, wanted.repo, commit, [path], to).get(path)
    if card is None:
        return ""
    if card.size > MAX_CARD_BYTES:
        raise HubError(f"The card of {wanted} has {card.size / 1e6:.1f} MB; only cards up to 1 MB are shown.")
    return download(hub, wanted.repo, commit, card).read_text(encoding="utf-8", errors="replace")


def _commit(hub: Hub, wanted: repos.Reference, to: str) -> str:
    """The commit that is meant, and that its files may be read."""
    info = repos.repo_info(hub, wanted.repo, wanted.revision, to)
    if info.gated:  # everybody sees that it is there; files in the cache may be another one's who got access
        hub.ask(to, lambda api: api.auth_check(wanted.repo), repo=wanted.repo)
    if info.sha is None:
        raise HubError(f"{wanted.repo} is empty: it has no commit yet.")
    return info.sha


# --- fetching --------------------------------------------------------------------------------------------------------


def fetch(hub: Hub, wanted: repos.Reference, progress: Progress) -> Path:
    """The folder of the cache with the files of `wanted`, downloaded where they are not there. Raises as `pull`."""
    to = f"pull {wanted}"
    progress(f"Looking at {wanted}")
    commit = _commit(hub, wanted, to)
    paths = {file: wanted.path(file) for file in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)}
    files = repos.files_at(hub, wanted.repo, commit, [*paths.values(), *([CONFIG_FILE] if wanted.name else [])], to)
    index = files.pop(CONFIG_FILE, None) if wanted.name else None
    if paths[CONFIG_FILE] not in files or paths[WEIGHTS_FILE] not in files:
        raise _nothing_there(hub, wanted, commit, to)
    _check_sizes(wanted, files)
    fetched: dict[str, Path] = {}
    for done, file in enumerate(files.values()):
        progress(f"Fetching {wanted}", done / len(files))
        fetched[file.path] = download(hub, wanted.repo, commit, file)
    if index is not None and index.size <= repos.MAX_INDEX_BYTES:
        _count(hub, wanted, commit, index)
    progress(f"Fetched {wanted}", 1.0)
    remember(wanted.repo, wanted.revision, commit)
    return fetched[paths[CONFIG_FILE]].parent


def _count(hub: Hub, wanted: repos.Reference, commit: str, index: repos.RemoteFile) -> None:
    """Fetch a pack's index, by which the Hub counts downloads; nothing else needs it."""
    try:
        download(hub, wanted.repo, commit, index)
    except HubError as error:
        logger.info("The download of %s was not counted: %s", wanted, error)


def _nothing_there(hub: Hub, wanted: repos.Reference, commit: str, to: str) -> HubError:
    """What there is instead."""
    files, folders = repos.top_entries(hub, wanted.repo, commit, to)
    names = repos.pack_names(hub, wanted.repo, commit, folders, to)
    if not names and CONFIG_FILE in files and WEIGHTS_FILE in files:
        return HubError(f"{wanted.repo} holds one artifact, at its top; leave the name {wanted.name!r} out.")
    if not names:
        return repos.no_artifact(wanted.repo, files)
    known = f"{wanted.repo} is a pack of {len(names)}: {', '.join(names)}"
    if wanted.name is None:
        return HubError(f"{known}; name one, like {wanted.repo}/{names[0]}.")
    return HubError(f"{known}; there is no {wanted.name!r} in it.")


def _check_sizes(wanted: repos.Reference, files: Mapping[str, repos.RemoteFile]) -> None:
    for path, file in files.items():
        limit = FILE_LIMITS[path.rpartition("/")[2]]
        if file.size > limit:
            raise ArtifactError(
                f"{path} of {wanted.repo} has {file.size / 1e6:.0f} MB, and at most {limit / 1e6:.0f} MB are read; it "
                "was not downloaded."
            )


def download(hub: Hub, repo: str, commit: str, file: repos.RemoteFile, *, repo_type: str = "model") -> Path:
    """The file in the cache, its content compared with what the Hub says it is; what came wrong is fetched again."""
    for _ in range(2):
        path = Path(
            hub.ask(
                f"fetch {file.path} of {repo}",
                lambda _: hf_hub_download(
                    repo,
                    file.path,
                    repo_type=repo_type,
                    revision=commit,
                    endpoint=hub.endpoint,
                    token=hub.token or False,
                    cache_dir=cache_folder(),
                    tqdm_class=_Bar,
                ),
                repo=repo if repo_type == "model" else f"{repo_type}s/{repo}",
                seconds=_LEAST_S + file.size / _BYTES_PER_S,
            )
        )
        if path.stat().st_size == file.size and file.is_same(path.read_bytes()):
            return path
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise HubError(f"{file.path} of {repo} arrived damaged twice (its hash is not the Hub's); try again later.")


class _Bar(tqdm):
    """In place of the client's progress bar, which is told of every piece that arrives: progress is reported by file,
    and here a download that takes too long ends."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.pop("name", None)
        kwargs["disable"] = True
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def update(self, n: float | None = 1) -> bool | None:
        check_time()
        return super().update(n)


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The cache that every program of this user shares for the Hub."""
    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def _kept_folder(wanted: repos.Reference) -> Path | None:
    """Where the artifact lies in the cache, whole, if it was pulled before."""
    try:
        config = try_to_load_from_cache(wanted.repo, wanted.path(CONFIG_FILE), cache_folder(), wanted.revision)
    except (OSError, ValueError):
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and is_artifact(folder) else None


def remember(repo: str, revision: str | None, commit: str, *, repo_type: str = "model") -> None:
    """Note which commit a branch or tag was, as the client does, so that it is found again offline."""
    if revision != commit:
        note(repo, f"refs/{revision or repos.MAIN}", commit, repo_type=repo_type)


def note(repo: str, name: str, text: str, *, repo_type: str = "model") -> None:
    """Keep a line of text as the file `name` beside what the cache holds of `repo`."""
    file = cache_folder() / repo_folder_name(repo_id=repo, repo_type=repo_type) / name
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        logger.warning("%s was fetched, but is not found offline: its revision could not be noted (%s).", repo, error)
