"""The Library tab: what is on the visitor's shelf, what others published, and publishing one's own."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import UsageError
from neurosteer.ui.jobs import BUSY, problem, told
from neurosteer.ui.limits import MAX_SECONDS, on_a_space, strangers, visitors_token
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import Mix, Mixer
from neurosteer.ui.shelf import OWN, origin, put, zip_file
from neurosteer.ui.show import html as render
from neurosteer.ui.show import library as show_library
from neurosteer.ui.turns import Caller
from neurosteer.ui.wiring import Form, Parts, Updates, bound
from neurosteer.ui.work import HUB, QUIET, session_soon, within

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
    """What to publish, and where."""

    label: str | None
    repo: str
    visibility: str
    licence: str
    description: str


class LibraryHandlers:
    """What happens on the Library tab."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def shelf(self, mix: Mix) -> Updates:
        """What there is, by where it comes from."""
        own = [label for label in mix.shelf if origin(label) == OWN]
        choices = [(f"{label} ({origin(label)})", label) for label in mix.shelf]
        return {
            "labels": gr.update(choices=choices), "label": gr.update(choices=own, value=own[-1] if own else None)
        }  # fmt: skip

    def show(self, label: str | None, mix: Mix) -> Updates:
        """An artifact of the shelf."""
        artifact = mix.shelf.get(label or "")
        if artifact is None:
            return {"card": render.hint(show_library.NOTHING_CHOSEN), "download": gr.update(visible=False)}
        return {"card": _card_of(artifact), "download": gr.update(value=zip_file(artifact), visible=True)}

    def use(self, label: str | None, mix: Mix) -> Updates:
        """Steer with it."""
        if not label or label not in mix.shelf:
            return {"shelf_error": render.error_line("Choose something from the list first.")}
        return {"tabs": gr.update(selected="steer"), "shelf_error": "", **mix.adding(mix.shelf, label).updates()}

    def remove(self, label: str | None, mix: Mix) -> Updates:
        """Take it off the shelf."""
        if label not in mix.shelf:
            return {"shelf_error": render.error_line("Choose something from the list first.")}
        kept = {one: artifact for one, artifact in mix.shelf.items() if one != label}
        chosen = [one for one in mix.chosen if one != label]
        return {"labels": gr.update(value=None), "shelf_error": "", **mix.choosing(kept, chosen).updates()}

    @told("hub_error", found_note="")
    def search(self, oauth: gr.OAuthToken | None, text: str, author: str, fitting: bool, model: str | None) -> Updates:
        """Look on the Hub."""
        from neurosteer import hub

        name = model or self.models.default
        ready = self.models.status(name).ready
        reference = self.models.holder(name).wait().lm.reference if ready else None
        found = hub.search(
            text.strip(),
            author=author.strip() or None,
            base_model=show_library.hub_id(name) if fitting else None,
            model=reference,
            limit=FOUND_AT_MOST,
            token=visitors_token(oauth),
        )
        choices = [(show_library.found_line(one), one.repo) for one in found]
        listed = gr.update(choices=choices, value=None, visible=bool(found))
        note = "" if found else render.hint(show_library.nothing_found(text))
        return {"found": listed, "found_note": note, "hub_error": ""}

    def look(self, oauth: gr.OAuthToken | None, repo: str | None) -> Updates:
        """A repository's card."""
        if not repo:
            return {}
        try:
            from neurosteer import hub

            token = visitors_token(oauth)
            names = hub.list_artifacts(repo, token=token)
            card = show_library.hub_card(hub.read_card(repo, token=token))
            pack = gr.update(choices=names, value=names[0] if names else None, visible=bool(names))
            return {"reference": repo, "names": pack, "hub_card": card, "hub_error": ""}
        except Exception as error:
            nothing = gr.update(choices=[], value=None, visible=False)
            said = render.error_line(problem(error))
            return {"reference": repo, "names": nothing, "hub_card": "", "hub_error": said}

    @told("hub_error", found_note="")
    def pull(self, oauth: gr.OAuthToken | None, reference: str, name: str | None, mix: Mix) -> Updates:
        """Fetch it and choose it."""
        wanted = _named(reference.strip(), name)
        from neurosteer import hub
        from neurosteer.artifacts.artifact import check_model

        token = visitors_token(oauth)
        artifact = within(MAX_SECONDS, f"Fetching {wanted[:100]}", lambda: hub.pull(wanted, token=token))
        warning = check_model(artifact, session_soon(self.models, mix.model).lm.reference)
        shelf, label = put(mix.shelf, artifact, wanted)
        note = render.added(artifact, label, warning)
        return {"found_note": note, "hub_error": "", **mix.adding(shelf, label).updates()}

    def who(self, oauth: gr.OAuthToken | None) -> Updates:
        """As whom things are published."""
        name = self._user(oauth)
        if name is None:
            return {"who": render.note_line(_not_logged_in())}
        return {"who": render.note_line(f"You publish as {name}."), "repo": gr.update(placeholder=f"{name}/my-vector")}

    def _user(self, oauth: gr.OAuthToken | None) -> str | None:
        from neurosteer import hub

        token = visitors_token(oauth)
        try:
            return None if token is False else hub.whoami(token)
        except Exception:  # the Hub is away: publishing says so
            return None

    @told("push_error", push_note="")
    def push(
        self, request: gr.Request, oauth: gr.OAuthToken | None, progress: gr.Progress, ask: Publication, mix: Mix
    ) -> Updates:
        """Publish one artifact. Whatever goes wrong, it stays on the shelf.

        Only the page itself may ask for it: another web page could send a visitor's browser here with an artifact of
        its own.
        """
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
        return {"push_note": show_library.published(pushed), "push_error": ""}

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

    return show_library.hub_card(render_card(artifact))


def lay_out() -> Parts:
    """The tab's components, within the current layout."""
    tab = Parts()
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### On your shelf")
            said = "Released with NeuroSteer, pulled from the Hub, and yours"
            tab.labels = gr.Radio([], label=said, elem_id="labels", elem_classes="ns-stacked")
            with gr.Row(elem_classes="ns-actions"):
                tab.use = gr.Button("Steer with it", variant="primary", min_width=130, elem_id="use")
                tab.download = gr.DownloadButton("Download", visible=False, min_width=110)
                tab.remove = gr.Button("Remove", min_width=110, elem_id="remove")
            tab.shelf_error = gr.HTML(elem_id="shelf-error", elem_classes="ns-flush")
        with gr.Column(min_width=320):
            gr.Markdown("### Its card")
            tab.card = gr.HTML(render.hint(show_library.NOTHING_CHOSEN), elem_id="card", elem_classes="ns-flush")
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### Find more on the Hugging Face Hub")
            _lay_out_search(tab)
        with gr.Column(min_width=320):
            gr.Markdown("### Publish yours")
            _lay_out_publishing(tab)
    return tab


def _lay_out_search(tab: Parts) -> None:
    with gr.Row():
        tab.text = gr.Textbox(label="Search for", placeholder="sentiment", max_lines=1, elem_id="search-text")
        tab.author = gr.Textbox(label="By", placeholder="anybody", max_lines=1, elem_id="search-author")
    tab.fitting = gr.Checkbox(True, label="Only what was made for the model above")
    tab.search = gr.Button("Search", elem_id="search")
    tab.found = gr.Radio([], label="Found", visible=False, elem_id="found", elem_classes="ns-stacked")
    tab.found_note = gr.HTML(elem_id="found-note", elem_classes="ns-flush")
    tab.reference = gr.Textbox(
        label="Reference", info="user/repo, user/repo/name for one of a pack, @revision for a version",
        max_lines=1, max_length=300, elem_id="reference",
    )  # fmt: skip
    tab.names = gr.Dropdown([], label="Which one of the pack", visible=False, elem_id="pack")
    tab.pull = gr.Button("Pull and steer with it", variant="primary", elem_id="pull")
    tab.hub_error = gr.HTML(elem_id="hub-error", elem_classes="ns-flush")
    tab.hub_card = gr.HTML(elem_id="hub-card", elem_classes="ns-flush")


def _lay_out_publishing(tab: Parts) -> None:
    if on_a_space():
        gr.LoginButton()
    tab.who = gr.HTML(elem_id="who", elem_classes="ns-flush")
    tab.label = gr.Dropdown([], label="What", info="Something you built or uploaded", elem_id="publish-label")
    tab.repo = gr.Textbox(label="Repository", placeholder="you/my-vector", max_lines=1, max_length=200, elem_id="repo")
    said = "What it does, in a sentence"
    tab.description = gr.Textbox(label=said, max_lines=3, max_length=500, elem_id="publish-text")
    with gr.Row():
        tab.visibility = gr.Radio([_PUBLIC, _PRIVATE], value=_PUBLIC, label="Visible to")
        tab.licence = gr.Dropdown(LICENCES, value=LICENCES[0], label="Licence")
    tab.push = gr.Button("Publish", variant="primary", elem_id="push")
    tab.push_note = gr.HTML(elem_id="push-note", elem_classes="ns-flush")
    tab.push_error = gr.HTML(elem_id="push-error", elem_classes="ns-flush")


def wire(tab: Parts, mixer: Mixer, tabs: gr.Tabs, entry: gr.Tab, handlers: LibraryHandlers) -> None:
    """Connect the components with the handlers."""
    asked: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private", "concurrency_limit": HUB}
    mix, labelled = mixer.form, [tab.labels, mixer.form]
    gr.on([entry.select, mixer.shelf.change], *bound(handlers.shelf, [mix], tab.pick("labels", "label")), **QUIET)
    entry.select(*bound(handlers.who, [], tab.pick("who", "repo")), **{**QUIET, "concurrency_limit": HUB})
    tab.labels.change(*bound(handlers.show, labelled, tab.pick("card", "download")), **QUIET)
    used = {"tabs": tabs, "shelf_error": tab.shelf_error, **mixer.outputs}
    tab.use.click(*bound(handlers.use, labelled, used), **QUIET)
    removed = {**tab.pick("labels", "shelf_error"), **mixer.outputs}
    tab.remove.click(*bound(handlers.remove, labelled, removed), **QUIET)
    give_up = bound(handlers.give_up, [], tab.hub_error)
    results = tab.pick("found", "found_note", "hub_error")
    query = [tab.text, tab.author, tab.fitting, mixer.model]
    searching = [tab.search.click, tab.text.submit, tab.author.submit]
    gr.on(searching, *bound(handlers.search, query, results), **asked).failure(*give_up, queue=False, **QUIET)
    looked = tab.pick("reference", "names", "hub_card", "hub_error")
    tab.found.input(*bound(handlers.look, [tab.found], looked), **asked)
    pulled = bound(
        handlers.pull, [tab.reference, tab.names, mix], {**tab.pick("found_note", "hub_error"), **mixer.outputs}
    )
    gr.on([tab.pull.click, tab.reference.submit], *pulled, **asked).failure(*give_up, queue=False, **QUIET)
    publication = Form(Publication, tab.pick(*Publication._fields))
    pushed = bound(handlers.push, [publication, mix], tab.pick("push_note", "push_error"))
    gave_up = bound(handlers.give_up, [], tab.push_error)
    tab.push.click(*pushed, **asked).failure(*gave_up, queue=False, **QUIET)
