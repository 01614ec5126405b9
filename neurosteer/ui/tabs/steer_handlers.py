"""What happens on the Steer tab."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from neurosteer.errors import UsageError
from neurosteer.progress import check_cancelled
from neurosteer.ui import links
from neurosteer.ui.jobs import BUSY, Handlers, problem, told
from neurosteer.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT, MAX_SECONDS
from neurosteer.ui.mixer import Mix
from neurosteer.ui.presets import Preset
from neurosteer.ui.shelf import OWN, origin, released_for
from neurosteer.ui.show import colours
from neurosteer.ui.show import html as render
from neurosteer.ui.tabs.steer_texts import KEPT_SIDE, SIDES, UNSTEERED_SIDE, Ask, Kept, Texts, View, new_talk
from neurosteer.ui.wiring import Updates
from neurosteer.ui.work import session_soon

if TYPE_CHECKING:
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.steering.decoding import Sampling
    from neurosteer.steering.session import Row, Step

KIND = "steer"

_UPDATE_S = 0.06  # faster than anyone reads, slow enough for any connection
_POLL_S = 0.3


class SteerHandlers(Handlers):
    """What happens on the Steer tab."""

    # --- writing ---

    def run(self, request: gr.Request, ask: Ask, mix: Mix) -> Iterator[View]:
        """Stream both texts. Whatever goes wrong becomes one line; what was written and entered stays."""
        yield from self._guarded(ask, mix, request.session_hash)

    def again(self, request: gr.Request, ask: Ask, mix: Mix) -> Iterator[View]:
        """The same once more with other random numbers; in a chat, the last answers anew."""
        ask = ask._replace(seed=self.next_seed(ask.seed))
        if ask.mode == "chat" and ask.talk[SIDES[0]]:
            before = {side: ask.talk[side][:-2] for side in SIDES}
            ask = ask._replace(prompt=ask.talk[SIDES[0]][-2]["content"], talk=before)
        yield from self._guarded(ask, mix, request.session_hash)

    @staticmethod
    def next_seed(seed: float | None) -> int:
        """Of what `again` writes."""
        return int(seed or 0) + 1

    def runner(self, preset: Preset) -> Callable[..., Iterator[View]]:
        """The handler of a preset's button: writes at once with a released artifact at a strength, alone."""

        def run_preset(request: gr.Request, ask: Ask, mix: Mix) -> Iterator[View]:
            picked = (preset, time.monotonic())  # the same again is a change, too: sliders may have been moved
            for place, view in enumerate(self._guarded(ask, self._with_preset(preset, mix), request.session_hash)):
                yield view._replace(picked=picked) if place > 1 else view  # after the first words: it would delay them

        return run_preset

    def show_picked(self, picked: tuple[Preset, float], mix: Mix) -> Updates:
        """What a preset steers with, for the mixer."""
        return self._with_preset(picked[0], mix).updates()

    def _with_preset(self, preset: Preset, mix: Mix) -> Mix:
        shelf = {**released_for(mix.model or self.models.default), **mix.shelf}
        return mix.choosing(shelf, [preset.artifact]).at({preset.artifact: preset.strength})

    def stop(self, request: gr.Request) -> None:
        self.jobs.cancel(request.session_hash, KIND)

    def give_up(self) -> View:
        """When the server could not even begin: the buttons as they were."""
        return _ended(error=render.error_line(BUSY), note="")

    def _guarded(self, ask: Ask, mix: Mix, visitor: str | None) -> Iterator[View]:
        try:
            yield from self._write(ask, mix, visitor)
        except Exception as error:
            yield _ended(error=render.error_line(problem(error)), note="")

    def _write(self, ask: Ask, mix: Mix, visitor: str | None) -> Iterator[View]:
        _check(ask, mix)
        cancel = self.jobs.begin(visitor, KIND)
        recipe, page, started = mix.recipe(), Texts(ask), time.monotonic()
        yield from self._wait(page, mix, cancel)
        session = self.models.holder(mix.model).wait(cancel=cancel)
        length, sampling = int(ask.max_new_tokens), _sampling(ask)
        try:
            stream = session.stream(_rows(page, ask, recipe), max_new_tokens=length, sampling=sampling, cancel=cancel)
            yield page.begun(mix, "Reading the prompt…")  # which has begun: telling takes as long as reading
            rows = yield from _growing(stream, page, cancel)
        finally:
            cancel.set()
        note = render.run_note(rows, time.monotonic() - started)
        yield _ended(**page.view(done=True)._asdict() | {"note": note, "last": tuple(rows)})

    def _wait(self, page: Texts, mix: Mix, cancel: threading.Event) -> Iterator[View]:
        """Says what loading is at until it is over."""
        holder = self.models.holder(mix.model)
        holder.start_if_new()
        while not (status := holder.status).settled:
            yield page.begun(mix, f"Waiting for the model: {status.text}…")
            cancel.wait(_POLL_S)
            check_cancelled(cancel, "Waiting for the model")

    # --- looking at it ---

    def colour(self, kind: str, last: "tuple[Row, ...]", mix: Mix) -> str:
        """The last texts with their words in colour; nothing where there are none."""
        if not kind:
            return ""
        if not last:
            return render.hint("Run it first: the words of what was written are then coloured here.")
        try:
            return session_soon(self.models, mix.model).run(colours.coloured, kind, last)
        except Exception as error:
            return render.error_line(problem(error))

    @told("mix_error")
    def put_aside(self, mix: Mix) -> Updates:
        """Keep the recipe to compare others with it."""
        if not mix.chosen:
            raise UsageError("There is no recipe to keep yet: choose something to steer with first.")
        kept = Kept(mix.recipe(), mix.in_words())
        choices = [("the unsteered model", UNSTEERED_SIDE), (f"kept: {kept.words}", KEPT_SIDE)]
        return {
            "kept": kept, "against": gr.update(choices=choices, value=KEPT_SIDE, visible=True), "mix_error": ""
        }  # fmt: skip

    @told("error", query="")
    def share(self, ask: Ask, mix: Mix) -> Updates:
        """The recipe, the prompt and the settings as a link's query."""
        links.check_shareable(mix.chosen, {label: origin(label) for label in mix.chosen}, OWN)
        link = links.Link(
            tuple((label, float(mix.strength(label))) for label in mix.chosen),
            ask.prompt,
            model=mix.model if mix.model != self.models.default else None,
            max_new_tokens=int(ask.max_new_tokens),
            seed=int(ask.seed or 0),
            apart=mix.without_overlap,
            **{name: getattr(ask, name) for name in ("mode", "temperature", "top_p", "greedy")},
        )
        return {"query": link.query(), "error": ""}

    def clear(self) -> Updates:
        """Begin a new conversation."""
        return {"talk": new_talk(), "unsteered_chat": [], "steered_chat": []}

    def show_mode(self, mode: str) -> Updates:
        """The panes of the mode."""
        chat = mode == "chat"
        return {
            "panes": gr.update(visible=not chat),
            "chat_panes": gr.update(visible=chat),
            "clear": gr.update(visible=chat),
        }


def _check(ask: Ask, mix: Mix) -> None:
    if not ask.prompt.strip():
        raise UsageError("The prompt is empty; write at least one character.")
    if len(ask.prompt) > MAX_PROMPT:
        raise UsageError(f"The prompt has {len(ask.prompt):,} characters; this page takes {MAX_PROMPT:,}.")
    if not mix.chosen:
        raise UsageError("No artifact is chosen: choose one to steer with, build one, or upload one.")
    if ask.max_new_tokens > MAX_NEW_TOKENS:
        raise UsageError(f"{ask.max_new_tokens:g} tokens are asked for; this page writes at most {MAX_NEW_TOKENS}.")


def _ended(**updates: Any) -> View:
    on, off = gr.update(interactive=True), gr.update(interactive=False)
    return View(**updates | {"run": on, "again": on, "stop": off})


def _rows(page: Texts, ask: Ask, recipe: "Recipe") -> "list[Row]":
    """The two texts to compare, in that order: they decode together."""
    from neurosteer.artifacts.recipes import UNSTEERED
    from neurosteer.steering.session import Row

    left, right = (page.asked(side) for side in SIDES)
    return [Row(left, ask.beside.recipe if ask.beside else UNSTEERED), Row(right, recipe, strength=1.0)]


def _sampling(ask: Ask) -> "Sampling":
    from neurosteer.steering.decoding import Sampling

    return Sampling(greedy=bool(ask.greedy), temperature=float(ask.temperature), top_p=float(ask.top_p), seed=ask.seed)


def _growing(stream: "Iterator[Step]", page: Texts, cancel: threading.Event) -> "Generator[View, None, list[Row]]":
    """Views of the texts as they grow; returns the finished rows. A run that takes too long is stopped."""
    shown, started = 0.0, time.monotonic()
    while True:
        try:
            step = next(stream)
        except StopIteration as finished:
            return finished.value
        if step.waiting is not None:
            yield View(note=render.note_line(_before_you(step.waiting)))
            continue
        page.take(step.first, step.pieces)
        if time.monotonic() - started > MAX_SECONDS:
            cancel.set()
        if time.monotonic() - shown >= _UPDATE_S:
            yield page.view()._replace(note=render.note_line("Writing…"))
            shown = time.monotonic()


def _before_you(count: int) -> str:
    if not count:
        return "You are next…"
    return f"Waiting for its turn: {count} {'visitor is' if count == 1 else 'visitors are'} before you…"
