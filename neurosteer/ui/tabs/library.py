"""The Library tab: what is on the visitor's shelf, what others published, and publishing one's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import UsageError
from neurosteer.ui.jobs import BUSY, problem
from neurosteer.ui.limits import on_a_space, strangers, visitors_token
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import MOST, Mix, Mixer, unchanged
from neurosteer.ui.shelf import OWN, origin, zip_file
from neurosteer.ui.show import html as render
from neurosteer.ui.show import library as shown
from neurosteer.ui.turns import Caller
from neurosteer.ui.work import PROGRESS

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact

LICENCES = ["apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "other"]
FOUND_AT_MOST = 20

_PUBLIC, _PRIVATE = "public", "private"
_NOT_LOGGED_IN_SPACE = "You are not logged in: press “Sign in with Hugging Face” first."
_NOT_LOGGED_IN_HERE = (
    "You are not logged in to the Hugging Face Hub: run “hf auth login” in a terminal, or set HF_TOKEN, and start the "
    "page again."
)
_STRANGERS = (
    "Nobody publishes from here: the page is open to others than this machine's owner. If they are all to use the "
    "owner's login of the Hub, start it with --trust-visitors."
)


class Publication(NamedTuple):
    """What to publish, and where: the values of the components, in their order."""

    label: str | None
    repo: str
    visibility: str
    licence: str
    description: str


class LibraryHandlers:
    """What happens on the Library tab."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def shelf(self, *values: Any) -> list[Any]:
        """What there is, by where it comes from: `[list, publishable]`."""
        mix = Mix.of(values)
        own = [label for label in mix.shelf if origin(label) == OWN]
        choices = [(f"{label} ({origin(label)})", label) for label in mix.shelf]
        return [gr.update(choices=choices), gr.update(choices=own, value=own[-1] if own else None)]

    def show(self, label: str | None, *values: Any) -> list[Any]:
        """An artifact of the shelf: `[card, download]`."""
        artifact = Mix.of(values).shelf.get(label or "")
        if artifact is None:
            return [render.hint(shown.NOTHING_CHOSEN), gr.update(visible=False)]
        return [_card_of(artifact), gr.update(value=zip_file(artifact), visible=True)]

    def use(self, label: str | None, *values: Any) -> list[Any]:
        """Steer with it: `[tabs, error, *mixer]`."""
        mix = Mix.of(values)
        if not label or label not in mix.shelf:
            return [gr.skip(), render.error_line("Choose something from the list first."), *unchanged()]
        chosen = [one for one in mix.chosen if one != label][: MOST - 1]
        return [gr.update(selected="steer"), "", *mix.choosing(mix.shelf, [*chosen, label]).updates()]

    def remove(self, label: str | None, *values: Any) -> list[Any]:
        """Take it off the shelf: `[list, error, *mixer]`."""
        mix = Mix.of(values)
        if label not in mix.shelf:
            return [gr.skip(), render.error_line("Choose something from the list first."), *unchanged()]
        kept = {one: artifact for one, artifact in mix.shelf.items() if one != label}
        chosen = [one for one in mix.chosen if one != label]
        return [gr.update(value=None), "", *mix.choosing(kept, chosen).updates()]

    def search(
        self, oauth: gr.OAuthToken | None, text: str, author: str, fitting: bool, model: str | None
    ) -> list[Any]:
        """Look on the Hub: `[results, note, error]`."""
        try:
            from neurosteer import hub

            name = model or self.models.default
            ready = self.models.status(name).ready
            reference = self.models.holder(name).wait().lm.reference if ready else None
            found = hub.search(
                text.strip(),
                author=author.strip() or None,
                base_model=shown.hub_id(name) if fitting else None,
                model=reference,
                limit=FOUND_AT_MOST,
                token=visitors_token(oauth),
            )
            if not found:
                return [gr.update(choices=[], value=None, visible=False), render.hint(shown.nothing_found(text)), ""]
            choices = [(shown.found_line(one), one.repo) for one in found]
            return [gr.update(choices=choices, value=None, visible=True), "", ""]
        except Exception as error:
            return [gr.skip(), "", render.error_line(problem(error))]

    def look(self, oauth: gr.OAuthToken | None, repo: str | None) -> list[Any]:
        """A repository's card: `[reference, names, card, error]`."""
        if not repo:
            return [gr.skip()] * 4
        try:
            from neurosteer import hub

            token = visitors_token(oauth)
            names = hub.list_artifacts(repo, token=token)
            card = shown.hub_card(hub.read_card(repo, token=token))
            pack = gr.update(choices=names, value=names[0] if names else None, visible=bool(names))
            return [repo, pack, card, ""]
        except Exception as error:
            return [repo, gr.update(choices=[], value=None, visible=False), "", render.error_line(problem(error))]

    def pull(self, oauth: gr.OAuthToken | None, reference: str, name: str | None, *values: Any) -> list[Any]:
        """Fetch it and choose it: `[note, error, *mixer]`."""
        mix = Mix.of(values)
        try:
            wanted = _named(reference.strip(), name)
            from neurosteer import hub
            from neurosteer.artifacts.artifact import check_model

            artifact = hub.pull(wanted, token=visitors_token(oauth))
            warning = check_model(artifact, self.models.holder(mix.model).wait().lm.reference)
            shelf = {**mix.shelf, wanted: artifact}
            chosen = [one for one in mix.chosen if one != wanted][: MOST - 1]
            return [render.added(artifact, wanted, warning), "", *mix.choosing(shelf, [*chosen, wanted]).updates()]
        except Exception as error:
            return ["", render.error_line(problem(error)), *unchanged()]

    def who(self, oauth: gr.OAuthToken | None) -> list[Any]:
        """As whom things are published: `[line, repo]`."""
        name = self._user(oauth)
        if name is None:
            return [render.note_line(_not_logged_in()), gr.skip()]
        return [render.note_line(f"You publish as {name}."), gr.update(placeholder=f"{name}/my-vector")]

    def _user(self, oauth: gr.OAuthToken | None) -> str | None:
        from neurosteer import hub

        token = visitors_token(oauth)
        try:
            return None if token is False else hub.whoami(token)
        except Exception:  # the Hub is away: publishing says so
            return None

    def push(
        self, request: gr.Request, oauth: gr.OAuthToken | None, progress: gr.Progress = PROGRESS, *values: Any
    ) -> list[Any]:
        """Publish one artifact: `[note, error]`. Whatever goes wrong, it stays on the shelf.

        Only the page itself may ask for it: another web page could send a visitor's browser here with an artifact of
        its own.
        """
        ask, mix = Publication(*values[: len(Publication._fields)]), Mix.of(values[len(Publication._fields) :])
        try:
            from neurosteer import hub

            if not Caller.of(request.request).from_page:
                raise UsageError("Publishing has to be asked for on NeuroSteer's own page; nothing was published.")
            if not ask.label or ask.label not in mix.shelf:
                raise UsageError("Choose what to publish first: something you built or uploaded.")
            token = visitors_token(oauth)
            if token is False:
                raise UsageError(_not_logged_in())
            artifact = mix.shelf[ask.label]
            if ask.description.strip():
                artifact = replace(artifact, description=ask.description.strip())
            progress(0.2, desc="Uploading")
            private = ask.visibility == _PRIVATE
            pushed = hub.push(artifact, ask.repo.strip(), private=private, licence=ask.licence, token=token)
            return [shown.published(pushed), ""]
        except Exception as error:
            return ["", render.error_line(problem(error))]

    def give_up(self) -> str:
        return render.error_line(BUSY)


def _not_logged_in() -> str:
    if on_a_space():
        return _NOT_LOGGED_IN_SPACE
    return _STRANGERS if strangers() else _NOT_LOGGED_IN_HERE


def _named(reference: str, name: str | None) -> str:
    """`user/repo` with the name of one artifact of a pack."""
    if not reference:
        raise UsageError("Which one? Write a reference like user/repo, or choose one of the results.")
    repo, at, revision = reference.partition("@")
    if name and repo.count("/") == 1:
        repo = f"{repo}/{name}"
    return repo + at + revision


def _card_of(artifact: "Artifact") -> str:
    from neurosteer.artifacts.cards import render_card

    return shown.hub_card(render_card(artifact))


@dataclass(frozen=True)
class LibraryTab:
    """The components that handlers read and write."""

    labels: gr.Radio
    use: gr.Button
    remove: gr.Button
    download: gr.DownloadButton
    shelf_error: gr.HTML
    card: gr.HTML
    query: tuple[Any, ...]
    search: gr.Button
    found: gr.Radio
    found_note: gr.HTML
    reference: gr.Textbox
    names: gr.Dropdown
    pull: gr.Button
    hub_error: gr.HTML
    hub_card: gr.HTML
    publication: tuple[Any, ...]
    who: gr.HTML
    push: gr.Button
    push_note: gr.HTML
    push_error: gr.HTML


def lay_out() -> LibraryTab:
    """The tab's components, within the current layout."""
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### On your shelf")
            labels = gr.Radio([], label="Released with NeuroSteer, pulled from the Hub, and yours", elem_id="labels",
                              elem_classes="ns-stacked")  # fmt: skip
            with gr.Row(elem_classes="ns-actions"):
                use = gr.Button("Steer with it", variant="primary", min_width=130, elem_id="use")
                download = gr.DownloadButton("Download", visible=False, min_width=110)
                remove = gr.Button("Remove", min_width=110, elem_id="remove")
            shelf_error = gr.HTML(elem_id="shelf-error", elem_classes="ns-flush")
        with gr.Column(min_width=320):
            gr.Markdown("### Its card")
            card = gr.HTML(render.hint(shown.NOTHING_CHOSEN), elem_id="card", elem_classes="ns-flush")
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### Find more on the Hugging Face Hub")
            query, search = _search_inputs()
            found = gr.Radio([], label="Found", visible=False, elem_id="found", elem_classes="ns-stacked")
            found_note = gr.HTML(elem_id="found-note", elem_classes="ns-flush")
            reference = gr.Textbox(
                label="Reference", info="user/repo, user/repo/name for one of a pack, @revision for a version",
                max_lines=1, max_length=300, elem_id="reference",
            )  # fmt: skip
            names = gr.Dropdown([], label="Which one of the pack", visible=False, elem_id="pack")
            pull = gr.Button("Pull and steer with it", variant="primary", elem_id="pull")
            hub_error = gr.HTML(elem_id="hub-error", elem_classes="ns-flush")
            hub_card = gr.HTML(elem_id="hub-card", elem_classes="ns-flush")
        with gr.Column(min_width=320):
            gr.Markdown("### Publish yours")
            publication, who, push = _publish_inputs()
            push_note = gr.HTML(elem_id="push-note", elem_classes="ns-flush")
            push_error = gr.HTML(elem_id="push-error", elem_classes="ns-flush")
    return LibraryTab(
        labels, use, remove, download, shelf_error, card, query, search, found, found_note, reference, names, pull,
        hub_error, hub_card, publication, who, push, push_note, push_error,
    )  # fmt: skip


def _search_inputs() -> tuple[tuple[Any, ...], gr.Button]:
    with gr.Row():
        text = gr.Textbox(label="Search for", placeholder="sentiment", max_lines=1, elem_id="search-text")
        author = gr.Textbox(label="By", placeholder="anybody", max_lines=1, elem_id="search-author")
    fitting = gr.Checkbox(True, label="Only what was made for the model above")
    return (text, author, fitting), gr.Button("Search", elem_id="search")


def _publish_inputs() -> tuple[tuple[Any, ...], gr.HTML, gr.Button]:
    if on_a_space():
        gr.LoginButton()
    who = gr.HTML(elem_id="who", elem_classes="ns-flush")
    label = gr.Dropdown([], label="What", info="Something you built or uploaded", elem_id="publish-label")
    repo = gr.Textbox(label="Repository", placeholder="you/my-vector", max_lines=1, max_length=200, elem_id="repo")
    description = gr.Textbox(label="What it does, in a sentence", max_lines=3, max_length=500, elem_id="publish-text")
    with gr.Row():
        visibility = gr.Radio([_PUBLIC, _PRIVATE], value=_PUBLIC, label="Visible to")
        licence = gr.Dropdown(LICENCES, value=LICENCES[0], label="Licence")
    push = gr.Button("Publish", variant="primary", elem_id="push")
    return (label, repo, visibility, licence, description), who, push


def wire(tab: LibraryTab, mixer: Mixer, tabs: gr.Tabs, entry: gr.Tab, handlers: LibraryHandlers) -> None:
    """Connect the components with the handlers."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    asked: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private", "concurrency_limit": 8}
    lists = [tab.labels, tab.publication[0]]
    shelf_of: Sequence[Any] = mixer.inputs
    gr.on([entry.select, mixer.shelf.change], handlers.shelf, shelf_of, lists, **quiet)
    entry.select(handlers.who, None, [tab.who, tab.publication[1]], **quiet)
    tab.labels.change(handlers.show, [tab.labels, *shelf_of], [tab.card, tab.download], **quiet)
    tab.use.click(handlers.use, [tab.labels, *shelf_of], [tabs, tab.shelf_error, *mixer.outputs], **quiet)
    tab.remove.click(handlers.remove, [tab.labels, *shelf_of], [tab.labels, tab.shelf_error, *mixer.outputs], **quiet)
    results = [tab.found, tab.found_note, tab.hub_error]
    gr.on(
        [tab.search.click, tab.query[0].submit, tab.query[1].submit],
        handlers.search, [*tab.query, mixer.model], results, **asked,
    ).failure(handlers.give_up, None, tab.hub_error, queue=False, **quiet)  # fmt: skip
    seen = [tab.reference, tab.names, tab.hub_card, tab.hub_error]
    tab.found.input(handlers.look, tab.found, seen, **asked)
    pulled = [tab.found_note, tab.hub_error, *mixer.outputs]
    gr.on(
        [tab.pull.click, tab.reference.submit], handlers.pull, [tab.reference, tab.names, *shelf_of], pulled, **asked
    ).failure(handlers.give_up, None, tab.hub_error, queue=False, **quiet)
    tab.push.click(handlers.push, [*tab.publication, *shelf_of], [tab.push_note, tab.push_error], **asked).failure(
        handlers.give_up, None, tab.push_error, queue=False, **quiet
    )
