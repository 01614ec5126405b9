"""Publishing artifacts: everything is written here first, goes up in one commit, and is then compared by hash."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import (
    EVALUATION_PLOT,
    LIBRARY,
    PLOTS,
    SEPARATION_PLOT,
    is_generated,
    render_card,
    render_pack_card,
)
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.plots import separation_plot
from neurosteer.artifacts.storage import CARD_FILE, CONFIG_FILE, FILE_LIMITS, WEIGHTS_FILE, load, save
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, HubError, NeuroSteerError, UsageError
from neurosteer.hub.client import Hub, Token, connect
from neurosteer.hub.pulling import download, fetch
from neurosteer.hub.repos import (
    MOST_ARTIFACTS,
    Reference,
    files_at,
    pack_names,
    parse_reference,
    repo_info,
    top_entries,
)
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,49}")
_FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_RACES = 3
_ONE = (SteeringVector, NeuronCircuit, str, Path)
_LEAST_S, _BYTES_PER_S = 60.0, 50_000  # how slow an upload may be


@dataclass(frozen=True)
class Pushed:
    """What was published: `files` are the paths in the repo, `commit` the one that holds them.

    `card_kept` says that a card on the Hub held somebody's own words and was left as it is; `note` says so, and what
    follows from it, as a sentence.
    """

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    card_kept: bool
    note: str = ""


def push(
    artifacts: Artifact | str | Path | Sequence[Artifact | str | Path],
    repo: str,
    *,
    private: bool = False,
    licence: str = "apache-2.0",
    token: Token = None,
    progress: Progress = silent,
) -> Pushed:
    """Publish one artifact, or a sequence of them as a pack, in one commit.

    One artifact lies at the repo's top; those of a pack in folders of their names, beside a card of the pack. A repo
    that is a pack already takes one artifact into a folder of its own. What else lies in the repo stays.

    Args:
        artifacts: artifacts, or folders that hold one; a card that was edited in a folder goes along.
        repo: `user/repo`, or `repo` for one of your own. It is made when it is not there.
        private: make a new repo private; an existing public one is refused.
        licence: the Hub's name of a licence, for the card.
        token: None for that of `HF_TOKEN` or the stored login.

    Raises:
        HubError: not logged in, not allowed, the repo holds something else, or files arrived changed.
        HubUnreachable: the Hub cannot be reached or fails. Either way nothing here is changed, and a repo that was made
            for nothing is named.
        ArtifactError: a folder holds no artifact. UsageError: an argument that makes no sense.
    """
    items = _items(artifacts)
    if not _LICENCE.fullmatch(licence):
        raise UsageError(
            f"The licence is {licence[:60]!r}; give its name on the Hub, like apache-2.0, mit or cc-by-4.0."
        )
    hub = connect(token)
    progress("Checking your login")
    target = _full_name(repo, _writer(hub))
    single = isinstance(artifacts, _ONE)
    work = _Publication(hub, target, items, single, licence)
    created = _make_repo(hub, target, private)
    try:
        upload, commit = _upload(work, progress)
    except NeuroSteerError as error:
        if not created:
            raise
        left = f"The repo {hub.url(target)} was made for it and is still empty; push again, or delete it there."
        if not isinstance(error, HubError):
            raise HubError(f"{error} {left}") from error
        raise type(error)(f"{error} {left}", error.status) from error
    progress("Comparing what arrived")
    _compare(hub, target, commit, upload.files)
    return Pushed(target, hub.url(target), commit, tuple(sorted(upload.files)), upload.card_kept, upload.note)


# --- before anything is sent -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """An artifact, its files but for the card, and its card where somebody edited it here."""

    artifact: Artifact
    files: Mapping[str, bytes]
    card: str | None = None


@dataclass(frozen=True)
class _Publication:
    hub: Hub
    repo: str
    items: Sequence[_Item]
    single: bool
    licence: str


def _items(artifacts: Artifact | str | Path | Sequence[Artifact | str | Path]) -> list[_Item]:
    given = [artifacts] if isinstance(artifacts, _ONE) else list(artifacts)
    if not 1 <= len(given) <= MOST_ARTIFACTS:
        raise UsageError(f"There are {len(given)} artifacts to publish; a repo takes 1 to {MOST_ARTIFACTS}.")
    items = [_item(one) for one in given]
    names = [item.artifact.name for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"Two of the artifacts are named {twice!r}; in a pack every name may stand once.")
    return items


def _item(given: Artifact | str | Path) -> _Item:
    if not isinstance(given, (str, Path)):
        return _Item(given, _files_of(given))
    artifact = load(given)
    files = _files_of(artifact)
    try:
        card = (Path(given).expanduser() / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return _Item(artifact, files)
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"The card {CARD_FILE} in {str(given)[:200]!r} cannot be read as UTF-8 text.") from error
    return _Item(artifact, files, None if is_generated(card) else card)


def _files_of(artifact: Artifact) -> dict[str, bytes]:
    """What `save` writes, the plot of a receipt with it, and that of how well the layers separate where several were
    compared."""
    try:
        with TemporaryDirectory() as temporary:
            folder = save(artifact, Path(temporary) / artifact.name)
            names = (CONFIG_FILE, WEIGHTS_FILE, EVALUATION_PLOT)
            files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    except OSError as error:
        raise ArtifactError(
            f"{artifact.name} could not be prepared ({error.strerror or error}); make room in the temporary folder."
        ) from error
    if len(artifact.provenance.separation) > 1:
        files[SEPARATION_PLOT] = separation_plot(artifact.provenance.separation, artifact.provenance.candidates)
    return files


def _writer(hub: Hub) -> str:
    """The name of the user who may publish. Raises `HubError` without a token, or with one that may only read."""
    user = hub.user()
    login = user.get("auth") or {}
    if (login.get("accessToken") or {}).get("role") == "read":
        raise HubError(f"Your token may only read; make one with write access at {hub.endpoint}/settings/tokens.")
    return str(user.get("name"))


def _full_name(repo: str, user: str) -> str:
    reference = parse_reference(repo if "/" in repo else f"{user}/{repo}")
    if reference.name or reference.revision:
        raise UsageError(f"{repo[:200]!r} is no repo; write user/repo, without a name or a revision behind it.")
    return reference.repo


def _make_repo(hub: Hub, repo: str, private: bool) -> bool:
    """Make the repo unless it is there; whether it was made. Raises `HubError` where a public one was to be private."""
    try:
        info = repo_info(hub, repo, None, f"push to {repo}")
    except HubError as error:
        if error.status != 404:
            raise
        hub.ask(f"create {repo}", lambda api: api.create_repo(repo, private=private, exist_ok=True), repo=repo)
        return True
    if private and not info.private:
        raise HubError(
            f"{repo} is public already; make it private at {hub.url(repo)}/settings first, or push to another repo."
        )
    return False


# --- the commit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Upload:
    files: Mapping[str, bytes]
    removed: Sequence[str]
    card_kept: bool
    note: str


def _upload(work: _Publication, progress: Progress) -> tuple[_Upload, str]:
    """What went up, and its commit. When somebody else commits at the same time, it is prepared anew on top of that."""
    for race in range(1, _RACES + 1):
        progress(f"Preparing the files for {work.repo}")
        head = repo_info(work.hub, work.repo, None, f"push to {work.repo}").sha
        upload = _prepare(work, head)
        progress(f"Uploading to {work.repo}")
        try:
            return upload, _send(work, upload, head)
        except HubError as error:
            if error.status not in (409, 412) or race == _RACES:
                raise
            logger.info("%s changed meanwhile; preparing the commit anew.", work.repo)
    raise AssertionError("unreachable")


def _send(work: _Publication, upload: _Upload, head: str | None) -> str:
    names = ", ".join(item.artifact.name for item in work.items)[:200]
    size = sum(map(len, upload.files.values()))

    def commit(api: Any) -> str:
        add = [CommitOperationAdd(path, data) for path, data in sorted(upload.files.items())]
        remove = [CommitOperationDelete(path) for path in upload.removed]
        message = f"Upload {names} with NeuroSteer"
        with _without_bars():
            return api.create_commit(work.repo, [*add, *remove], commit_message=message, parent_commit=head).oid

    return work.hub.ask(f"push to {work.repo}", commit, repo=work.repo, seconds=_LEAST_S + size / _BYTES_PER_S)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The client's progress bars off, where it can only be told so for the whole process."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _prepare(work: _Publication, head: str | None) -> _Upload:
    """The files to send, given what the repo holds at the commit `head`."""
    others = _layout(work, head)
    files: dict[str, bytes] = {}
    own_cards: dict[str, str] = {}
    for item in work.items:
        folder = "" if others is None else f"{item.artifact.name}/"
        place = work.repo if others is None else f"{work.repo}/{item.artifact.name}"
        plots = tuple(name for name in item.files if name in PLOTS)
        card = render_card(item.artifact, repo=place, licence=work.licence, plots=plots)
        files |= {folder + name: data for name, data in {**item.files, CARD_FILE: card.encode()}.items()}
        if item.card is not None:
            own_cards[folder + CARD_FILE] = item.card
    if others is not None:
        everything = sorted([*(item.artifact for item in work.items), *others], key=lambda one: one.name)
        files[CARD_FILE] = render_pack_card(everything, repo=work.repo, licence=work.licence).encode()
    return _with_cards(work, head, files, own_cards)


def _layout(work: _Publication, head: str | None) -> list[Artifact] | None:
    """None where one artifact goes to the top; else the artifacts that the pack holds beside those to come."""
    if head is None:
        return None if work.single else []
    to = f"push to {work.repo}"
    files, folders = top_entries(work.hub, work.repo, head, to)
    if CONFIG_FILE in files and WEIGHTS_FILE not in files:
        raise HubError(
            f"{work.repo} holds something else (a {CONFIG_FILE} that is no artifact's); push to another repo."
        )
    if CONFIG_FILE in files and not work.single:
        raise HubError(f"{work.repo} holds one artifact at its top, so it cannot become a pack; push to another repo.")
    names = [] if CONFIG_FILE in files else pack_names(work.hub, work.repo, head, folders, to)
    if work.single and not names:
        return None
    ours = {item.artifact.name for item in work.items}
    others = [_other(work.hub, Reference(work.repo, name, head)) for name in names if name not in ours]
    return [one for one in others if one is not None]


def _other(hub: Hub, reference: Reference) -> Artifact | None:
    """An artifact of the same pack, for the pack's card; None where it cannot be read."""
    try:
        return load(fetch(hub, reference, silent))
    except ArtifactError as error:
        logger.warning("%s is left out of the pack's card: %s", reference.name, error)
        return None


def _with_cards(work: _Publication, head: str | None, files: dict[str, bytes], own_cards: dict[str, str]) -> _Upload:
    """The upload with each card decided: somebody's words on the Hub stay, then what was edited here, then ours."""
    cards = [path for path in files if path.rpartition("/")[2] == CARD_FILE]
    plots = {path.removesuffix(CARD_FILE) + name: path for path in cards for name in PLOTS}
    to = f"push to {work.repo}"
    there = files_at(work.hub, work.repo, head, [*cards, *plots], to) if head else {}
    kept: dict[str, str] = {}
    for path in cards:
        if path in own_cards:
            files[path] = own_cards[path].encode()
        if head is None or path not in there or there[path].is_same(files[path]):
            continue
        readable = there[path].size <= FILE_LIMITS[CARD_FILE]
        present = download(work.hub, work.repo, head, there[path]).read_bytes() if readable else b""
        if not is_generated(present.decode(errors="replace")):
            del files[path]
            kept[path] = present.decode(errors="replace")
    stale = [plot for plot, card in plots.items() if card in files and plot in there and plot not in files]
    return _Upload(files, stale, bool(kept), _note(kept, own_cards))


def _note(kept: Mapping[str, str], own_cards: Mapping[str, str]) -> str:
    """What to know about cards that were kept; empty when none was."""
    if not kept:
        return ""
    note = "The card on the Hub was edited by hand and is kept."
    if any(path in own_cards for path in kept):
        note += " Yours differs and was not uploaded: put the two together on the Hub."
    front = _FRONT_MATTER.match(kept.get(CARD_FILE, "---\nneurosteer\n---\n"))
    if front is None or LIBRARY not in front[1]:
        note += f" Add the tag {LIBRARY} to it, or nobody finds the repo by searching."
    return note


# --- after the commit ------------------------------------------------------------------------------------------------


def _compare(hub: Hub, repo: str, commit: str, files: Mapping[str, bytes]) -> None:
    """Hold every file on the Hub against what was sent, by hash."""
    try:
        there = files_at(hub, repo, commit, list(files), f"compare {repo}")
    except HubError as error:
        raise type(error)(
            f"{repo} was published as commit {commit[:8]}, but could not be compared with what is here ({error}); look "
            f"at it on {hub.url(repo)}, or push again: what is there already is not sent twice.",
            error.status,
        ) from error
    wrong = sorted(path for path, data in files.items() if path not in there or not there[path].is_same(data))
    if wrong:
        raise HubError(
            f"Commit {commit[:8]} of {repo} does not hold what was sent: {', '.join(wrong)[:200]} differ; push again, "
            f"and look at {hub.url(repo)}."
        )
