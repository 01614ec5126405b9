"""Publishing artifacts: everything is written here first, goes up in one commit, and is then compared by hash."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import EVALUATION_PLOT, SEPARATION_PLOT, is_generated
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.metadata import CARD_FILE
from neurosteer.artifacts.plots import separation_plot
from neurosteer.artifacts.storage import CONFIG_FILE, WEIGHTS_FILE, load, save
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, HubError, NeuroSteerError, UsageError
from neurosteer.hub.client import Hub, Token, connect
from neurosteer.hub.commits import Item, Publication, upload
from neurosteer.hub.repos import MOST_ARTIFACTS, files_at, parse_reference, repo_info
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,49}")
_ONE = (SteeringVector, NeuronCircuit, str, Path)


@dataclass(frozen=True)
class Pushed:
    """What was published: `files` are the paths in the repo, `commit` the one that holds them.

    `card_kept` says that a card on the Hub held somebody's own words and was left as it is; `note` says so, what
    follows from it, and whether a Collection took the repo, in sentences.
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
    collection: str | None = None,
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
        collection: the title of a Collection of the repo's owner, made when it is not there, to add the repo to. Where
            that fails, `Pushed.note` says so.

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
    work = Publication(hub, target, items, single, licence)
    created = _make_repo(hub, target, private)
    try:
        sent, commit = upload(work, progress)
    except NeuroSteerError as error:
        if not created:
            raise
        left = f"The repo {hub.url(target)} was made for it and is still empty; push again, or delete it there."
        if not isinstance(error, HubError):
            raise HubError(f"{error} {left}") from error
        raise type(error)(f"{error} {left}", error.status) from error
    progress("Comparing what arrived")
    _compare(hub, target, commit, sent.files)
    note = sent.note
    if collection:
        progress(f"Adding it to the collection {collection}")
        note = f"{note} {_collect(hub, target, collection, private)}".strip()
    return Pushed(target, hub.url(target), commit, tuple(sorted(sent.files)), sent.card_kept, note)


# --- before anything is sent -----------------------------------------------------------------------------------------


def _items(artifacts: Artifact | str | Path | Sequence[Artifact | str | Path]) -> list[Item]:
    given = [artifacts] if isinstance(artifacts, _ONE) else list(artifacts)
    if not 1 <= len(given) <= MOST_ARTIFACTS:
        raise UsageError(f"There are {len(given)} artifacts to publish; a repo takes 1 to {MOST_ARTIFACTS}.")
    items = [_item(one) for one in given]
    names = [item.artifact.name for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"Two of the artifacts are named {twice!r}; in a pack every name may stand once.")
    return items


def _item(given: Artifact | str | Path) -> Item:
    if not isinstance(given, (str, Path)):
        return Item(given, _files_of(given))
    artifact = load(given)
    files = _files_of(artifact)
    try:
        card = (Path(given).expanduser() / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Item(artifact, files)
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"The card {CARD_FILE} in {str(given)[:200]!r} cannot be read as UTF-8 text.") from error
    return Item(artifact, files, None if is_generated(card) else card)


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


def _collect(hub: Hub, repo: str, title: str, private: bool) -> str:
    """Add the repo to its owner's Collection of that title, and say in one line what came of it."""

    def collect(api: HfApi) -> str:
        made = api.create_collection(title, namespace=repo.partition("/")[0], private=private, exists_ok=True)
        return api.add_collection_item(made.slug, repo, "model", exists_ok=True).url

    try:
        return f"It is in the collection {hub.ask(f'add {repo} to the collection {title[:60]!r}', collect)}."
    except HubError as error:
        return f"It is published, but in no collection: {error}"
