"""What there is to steer with: what a visitor finds when they arrive, chooses, uploads, or builds with one click."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import gradio as gr

from neurosteer.errors import UsageError
from neurosteer.ui import links
from neurosteer.ui.jobs import BUSY, Handlers, Jobs, problem, told
from neurosteer.ui.limits import visitors_token
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import MOST, Mix
from neurosteer.ui.settings import Settings
from neurosteer.ui.shelf import PULLED, RELEASED, origin, put, released_for, zip_file
from neurosteer.ui.show import html as render
from neurosteer.ui.source import read_bundled
from neurosteer.ui.tabs.build_handlers import BuildHandlers
from neurosteer.ui.wiring import Updates
from neurosteer.ui.work import KIND, LINK_S, in_words, session_soon, within

EXAMPLE_SET = "sentiment"


class MixerHandlers(Handlers):
    """What happens around the shelf and the sliders of the Steer tab."""

    def __init__(self, models: Models, jobs: Jobs, building: BuildHandlers) -> None:
        super().__init__(models, jobs)
        self.building = building

    def arrive(self, request: gr.Request, mix: Mix) -> Updates:
        """A new visitor: the released artifacts on the shelf, and what their link says. Nothing is fetched here: what
        is not on the shelf yet is offered to be."""
        try:
            link = links.parse_link(_query(request))
            model = (link.model if link else None) or mix.model or self.models.default
            self.models.check_offered(model)
            mix = mix.choosing({**released_for(model), **mix.shelf}, ())
            if link is None:
                return {"mix_error": "", **mix.updates()}
            missing = [name for name, _ in link.uses if name not in mix.shelf]
            for name in missing:
                if origin(name) != PULLED:
                    there = ", ".join(mix.shelf) or "none"
                    raise UsageError(f"The link names {name!r}, which is not among those released here ({there}).")
            given = {name: getattr(link, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
            set_to = {name: value for name, value in given.items() if value is not None}
            if link.prompt:
                set_to["prompt"] = link.prompt
            if missing:
                offer = f"This link wants to fetch {', '.join(missing)} from the Hub: press to fetch"
                set_to |= {"wanted": link, "fetch": gr.update(value=offer, visible=True)}
            mixed = _linked(link, mix).updates()
            return {"model": model, "mode": link.mode, "greedy": link.greedy, "mix_error": "", **set_to, **mixed}
        except Exception as error:
            shelf = {**released_for(self.models.default), **mix.shelf}
            return {"mix_error": render.error_line(problem(error)), **mix.choosing(shelf, ()).updates()}

    @told("mix_error")
    def fetch_linked(self, wanted: links.Link | None, mix: Mix) -> Updates:
        """Fetch what the visitor's link names and is not on their shelf; then all is chosen as the link says."""
        if wanted is None:
            return {}
        from neurosteer.hub import pull

        shelf = mix.shelf
        for name in (name for name, _ in wanted.uses if name not in shelf):
            artifact = within(LINK_S, f"Fetching {name}", lambda name=name: pull(name, token=visitors_token(None)))
            shelf, _ = put(shelf, artifact, name)
        mixed = _linked(wanted, replace(mix, shelf=shelf)).updates()
        return {"fetch": gr.update(visible=False), "wanted": None, "mix_error": "", **mixed}

    @told("mix_error")
    def choose_model(self, mix: Mix) -> Updates:
        """Another model: it begins to load, and what was released for it is on the shelf."""
        name = mix.model or self.models.default
        self.models.holder(name).start_if_new()
        kept = {label: artifact for label, artifact in mix.shelf.items() if origin(label) != RELEASED}
        shelf = {**released_for(name), **kept}
        return {"mix_error": "", **mix.choosing(shelf, [label for label in mix.chosen if label in shelf]).updates()}

    def remix(self, mix: Mix) -> Updates:
        """After the visitor chose other artifacts: a slider for each."""
        return mix.updates()

    def upload(self, request: gr.Request, path: str | None, mix: Mix) -> Updates:
        """Put an uploaded zip on the shelf. What does not fit the model is refused."""
        if not path:
            return {}
        self.jobs.remove_uploads_later(request.session_hash, path)
        try:
            from neurosteer.artifacts.artifact import check_model
            from neurosteer.artifacts.storage import unpack

            artifact = unpack(Path(path))
            warning = check_model(artifact, session_soon(self.models, mix.model).lm.reference)
            shelf, label = put(mix.shelf, artifact)
            self.jobs.remove_later(request.session_hash, zip_file(artifact))
            chosen = mix.chosen if len(mix.chosen) == MOST else (*mix.chosen, label)
            note = render.added(artifact, label, warning)
            return {"mix_error": "", "mix_note": note, **mix.choosing(shelf, chosen).updates()}
        except Exception as error:
            return {"mix_error": render.error_line(f"{Path(path).name}: {problem(error)}"), "mix_note": ""}

    def begin_example(self, request: gr.Request) -> Updates:
        """At once, before the work has its turn."""
        self.jobs.begin(request.session_hash, KIND)
        return {"example": gr.update(interactive=False), "mix_error": "", "mix_note": render.note_line("Building…")}

    def give_up_example(self) -> Updates:
        """When the server could not even begin."""
        return {"example": gr.update(interactive=True), "mix_error": render.error_line(BUSY), "mix_note": ""}

    @told("mix_error", mix_note="", example=gr.update(interactive=True))
    def build_example(self, request: gr.Request, progress: gr.Progress, mix: Mix) -> Updates:
        """One click to something to steer with."""
        cancel = self.jobs.current(request.session_hash, KIND)
        examples = read_bundled(EXAMPLE_SET)
        artifact, _ = self.building.make(examples, Settings(), in_words(progress), cancel, mix.model)
        shelf, label = put(mix.shelf, artifact)
        self.jobs.remove_later(request.session_hash, zip_file(artifact))
        ready = render.note_line(f"{label} is ready: press Run.")
        mixed = mix.choosing(shelf, [label]).updates()
        return {"example": gr.update(interactive=True), "mix_error": "", "mix_note": ready, **mixed}


def _linked(link: links.Link, mix: Mix) -> Mix:
    """What the link steers with, as far as it is on the shelf."""
    there = {name: position for name, position in link.uses if name in mix.shelf}
    return replace(mix.choosing(mix.shelf, list(there)).at(there), without_overlap=link.apart)


def _query(request: gr.Request) -> Mapping[str, list[str]]:
    found = getattr(request, "query_params", None)
    return parse_qs(str(found or ""), max_num_fields=50)
