"""One commit of artifacts to a repo: which files it takes, given what the repo holds, and which cards stay."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import PLOTS, is_generated, render_card, render_pack_card
from neurosteer.artifacts.metadata import CARD_FILE, LIBRARY
from neurosteer.artifacts.storage import CONFIG_FILE, FILE_LIMITS, WEIGHTS_FILE, load
from neurosteer.errors import ArtifactError, HubError
from neurosteer.hub import repos
from neurosteer.hub.client import Hub
from neurosteer.hub.pulling import download, fetch
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)

_RACES = 3
_LEAST_S, _BYTES_PER_S = 60.0, 50_000  # how slow an upload may be


@dataclass(frozen=True)
class Item:
    """An artifact, its files but for the card, and its card where somebody edited it here."""

    artifact: Artifact
    files: Mapping[str, bytes]
    card: str | None = None


@dataclass(frozen=True)
class Publication:
    hub: Hub
    repo: str
    items: Sequence[Item]
    single: bool
    licence: str


@dataclass(frozen=True)
class Upload:
    files: Mapping[str, bytes]
    removed: Sequence[str]
    card_kept: bool
    note: str


def upload(work: Publication, progress: Progress) -> tuple[Upload, str]:
    """What went up, and its commit. When somebody else commits at the same time, it is prepared anew on top of that."""
    for race in range(1, _RACES + 1):
        progress(f"Preparing the files for {work.repo}")
        head = repos.repo_info(work.hub, work.repo, None, f"push to {work.repo}").sha
        upload = _prepare(work, head)
        progress(f"Uploading to {work.repo}")
        try:
            return upload, _send(work, upload, head)
        except HubError as error:
            if error.status not in (409, 412) or race == _RACES:
                raise
            logger.info("%s changed meanwhile; preparing the commit anew.", work.repo)
    raise AssertionError("unreachable")


def _send(work: Publication, upload: Upload, head: str | None) -> str:
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


def _prepare(work: Publication, head: str | None) -> Upload:
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
        files[CONFIG_FILE] = repos.pack_index([one.name for one in everything])
    return _with_cards(work, head, files, own_cards)


def _layout(work: Publication, head: str | None) -> list[Artifact] | None:
    """None where one artifact goes to the top; else the artifacts that the pack holds beside those to come."""
    if head is None:
        return None if work.single else []
    to = f"push to {work.repo}"
    files, folders = repos.top_entries(work.hub, work.repo, head, to)
    config, single = files.get(CONFIG_FILE), WEIGHTS_FILE in files
    if config is not None and not single and not _is_packs(work, head, config):
        raise HubError(
            f"{work.repo} holds something else (a {CONFIG_FILE} that is no artifact's); push to another repo."
        )
    if config is not None and single and not work.single:
        raise HubError(f"{work.repo} holds one artifact at its top, so it cannot become a pack; push to another repo.")
    names = [] if config is not None and single else repos.pack_names(work.hub, work.repo, head, folders, to)
    if work.single and not names:
        return None
    ours = {item.artifact.name for item in work.items}
    others = [_other(work.hub, repos.Reference(work.repo, name, head)) for name in names if name not in ours]
    return [one for one in others if one is not None]


def _is_packs(work: Publication, head: str, config: repos.RemoteFile) -> bool:
    """Whether the file at a repo's top is what `pack_index` writes."""
    small = config.size <= repos.MAX_INDEX_BYTES
    return small and repos.is_index(download(work.hub, work.repo, head, config).read_bytes())


def _other(hub: Hub, reference: repos.Reference) -> Artifact | None:
    """An artifact of the same pack, for the pack's card; None where it cannot be read."""
    try:
        return load(fetch(hub, reference, silent))
    except ArtifactError as error:
        logger.warning("%s is left out of the pack's card: %s", reference.name, error)
        return None


def _with_cards(work: Publication, head: str | None, files: dict[str, bytes], own_cards: dict[str, str]) -> Upload:
    """The upload with each card decided: somebody's words on the Hub stay, then what was edited here, then ours."""
    cards = [path for path in files if path.rpartition("/")[2] == CARD_FILE]
    plots = {path.removesuffix(CARD_FILE) + name: path for path in cards for name in PLOTS}
    to = f"push to {work.repo}"
    there = repos.files_at(work.hub, work.repo, head, [*cards, *plots], to) if head else {}
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
    return Upload(files, stale, bool(kept), _note(kept, own_cards))


def _note(kept: Mapping[str, str], own_cards: Mapping[str, str]) -> str:
    """What to know about cards that were kept; empty when none was."""
    if not kept:
        return ""
    note = "The card on the Hub was edited by hand and is kept."
    if any(path in own_cards for path in kept):
        note += " Yours differs and was not uploaded: put the two together on the Hub."
    top = kept.get(CARD_FILE)
    front = None if top is None else REGEX_YAML_BLOCK.match(top)
    if top is not None and (front is None or LIBRARY not in front[2]):
        note += f" Add the tag {LIBRARY} to it, or nobody finds the repo by searching."
    return note
