"""What happens on the Steer tab."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

import gradio as gr

from neurosteer.errors import UsageError
from neurosteer.examples.reading import read_examples
from neurosteer.progress import check_cancelled
from neurosteer.ui import links
from neurosteer.ui import mixer as mixing
from neurosteer.ui.jobs import BUSY, Jobs, problem
from neurosteer.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT, MAX_SECONDS, visitors_token
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import Mix, unchanged
from neurosteer.ui.presets import Preset
from neurosteer.ui.shelf import OWN, PULLED, RELEASED, origin, put, released_for, zip_file
from neurosteer.ui.show import colours
from neurosteer.ui.show import html as render
from neurosteer.ui.tabs.build import BuildHandlers, Settings
from neurosteer.ui.work import KIND as BUILD_KIND
from neurosteer.ui.work import PROGRESS, in_words

if TYPE_CHECKING:
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.steering.decoding import Sampling
    from neurosteer.steering.session import Row, Step

KIND = "steer"
SIDES = ("unsteered", "steered")
EXAMPLE_SET = "sentiment"
UNSTEERED_SIDE, KEPT_SIDE = "unsteered", "kept"

_UPDATE_S = 0.06  # faster than anyone reads, slow enough for any connection
_POLL_S = 0.3

Talk = dict[str, list[dict[str, str]]]
"""A conversation per side, as messages with `role` and `content`."""


class Kept(NamedTuple):
    """A recipe that was put aside to compare others with."""

    recipe: "Recipe"
    words: str


class Ask(NamedTuple):
    """What to write, and beside what: the values of the components, in their order."""

    mode: str
    prompt: str
    talk: Talk
    against: str
    kept: Kept | None
    max_new_tokens: float
    temperature: float
    top_p: float
    seed: int
    greedy: bool

    @property
    def beside(self) -> Kept | None:
        """The recipe of the left side; None for the unsteered model."""
        return self.kept if self.against == KEPT_SIDE else None


class View(NamedTuple):
    """Updates for the components that a run changes, in their order; by default none."""

    run: Any = gr.skip()
    again: Any = gr.skip()
    stop: Any = gr.skip()
    error: Any = gr.skip()
    note: Any = gr.skip()
    unsteered: Any = gr.skip()
    steered: Any = gr.skip()
    unsteered_chat: Any = gr.skip()
    steered_chat: Any = gr.skip()
    talk: Any = gr.skip()
    prompt: Any = gr.skip()
    last: Any = gr.skip()
    colours: Any = gr.skip()
    picked: Any = gr.skip()


_WRITING = View(error="", colours="")
"""While texts grow. What is there already costs gradio a fifth of what it makes of leaving a component alone."""


def new_talk() -> Talk:
    return {side: [] for side in SIDES}


class SteerHandlers:
    """What happens on the Steer tab."""

    def __init__(self, models: Models, jobs: Jobs, building: BuildHandlers) -> None:
        self.models = models
        self.jobs = jobs
        self.building = building

    # --- writing ---

    def run(self, request: gr.Request, *values: Any) -> Iterator[View]:
        """Stream both texts. Whatever goes wrong becomes one line; what was written and entered stays."""
        ask, mix = _asked(values)
        yield from self._guarded(ask, mix, request.session_hash)

    def again(self, request: gr.Request, *values: Any) -> Iterator[View]:
        """The same once more with other random numbers; in a chat, the last answers anew."""
        ask, mix = _asked(values)
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

        def run_preset(request: gr.Request, *values: Any) -> Iterator[View]:
            ask, mix = _asked(values)
            picked = (preset, time.monotonic())  # the same again is a change, too: sliders may have been moved
            for place, view in enumerate(self._guarded(ask, self._with_preset(preset, mix), request.session_hash)):
                yield view._replace(picked=picked) if place > 1 else view  # after the first words: it would delay them

        return run_preset

    def show_picked(self, picked: tuple[Preset, float], *values: Any) -> list[Any]:
        """What a preset steers with, for the mixer."""
        return self._with_preset(picked[0], Mix.of(values)).updates()

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
        recipe, page, started = mix.recipe(), _Page(ask), time.monotonic()
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

    def _wait(self, page: "_Page", mix: Mix, cancel: threading.Event) -> Iterator[View]:
        """Says what loading is at until it is over."""
        holder = self.models.holder(mix.model)
        holder.start_if_new()
        while not (status := holder.status).settled:
            yield page.begun(mix, f"Waiting for the model: {status.text}…")
            cancel.wait(_POLL_S)
            check_cancelled(cancel, "Waiting for the model")

    # --- looking at it ---

    def colour(self, kind: str, last: "tuple[Row, ...]", *values: Any) -> str:
        """The last texts with their words in colour; nothing where there are none."""
        if not kind:
            return ""
        if not last:
            return render.hint("Run it first: the words of what was written are then coloured here.")
        try:
            return self._coloured(kind, last, Mix.of(values))
        except Exception as error:
            return render.error_line(problem(error))

    def _coloured(self, kind: str, rows: Any, mix: Mix) -> str:
        return self.models.holder(mix.model).wait().run(colours.coloured, kind, rows)

    def keep(self, *values: Any) -> list[Any]:
        """Put the recipe aside to compare others with it: `[kept, against, error]`."""
        mix = Mix.of(values)
        try:
            if not mix.chosen:
                raise UsageError("There is no recipe to keep yet: choose something to steer with first.")
            kept = Kept(mix.recipe(), mix.in_words())
        except Exception as error:
            return [gr.skip(), gr.skip(), render.error_line(problem(error))]
        choices = [("the unsteered model", UNSTEERED_SIDE), (f"kept: {kept.words}", KEPT_SIDE)]
        return [kept, gr.update(choices=choices, value=KEPT_SIDE, visible=True), ""]

    def share(self, *values: Any) -> list[Any]:
        """The recipe, the prompt and the settings as a link's query: `[query, error]`."""
        ask, mix = _asked(values)
        try:
            links.check_shareable(mix.chosen, {label: origin(label) for label in mix.chosen}, OWN)
            link = links.Link(
                tuple((label, float(mix.strength(label))) for label in mix.chosen),
                ask.prompt,
                model=mix.model if mix.model != self.models.default else None,
                mode=ask.mode,
                max_new_tokens=int(ask.max_new_tokens),
                temperature=ask.temperature,
                top_p=ask.top_p,
                seed=int(ask.seed or 0),
                greedy=ask.greedy,
                apart=mix.apart,
            )
            return [link.query(), ""]
        except Exception as error:
            return ["", render.error_line(problem(error))]

    def clear(self) -> list[Any]:
        """Begin a new conversation."""
        return [new_talk(), [], []]

    def show_mode(self, mode: str) -> list[Any]:
        """The panes of the mode."""
        chat = mode == "chat"
        return [gr.update(visible=not chat), gr.update(visible=chat), gr.update(visible=chat)]

    # --- what there is to steer with ---

    def arrive(self, request: gr.Request, *values: Any) -> list[Any]:
        """A new visitor: the released artifacts on the shelf, and what their link says.

        `[model, mode, prompt, length, temperature, top-p, seed, greedy, error, *mixer]`.
        """
        mix = Mix.of(values)
        try:
            link = links.parse_link(_query(request))
            model = (link.model if link else None) or mix.model or self.models.default
            self.models.holder(model)  # whether it is on offer
            mix = mix.choosing({**released_for(model), **mix.shelf}, ())
            if link is None:
                return [*[gr.skip()] * 8, "", *mix.updates()]
            mix = self._with(link, mix)
            numbers = (link.max_new_tokens, link.temperature, link.top_p, link.seed)
            set_to = [gr.skip() if number is None else number for number in numbers]
            return [model, link.mode, link.prompt or gr.skip(), *set_to, link.greedy, "", *mix.updates()]
        except Exception as error:
            shelf = {**released_for(self.models.default), **mix.shelf}
            return [*[gr.skip()] * 8, render.error_line(problem(error)), *mix.choosing(shelf, ()).updates()]

    def _with(self, link: links.Link, mix: Mix) -> Mix:
        shelf = dict(mix.shelf)
        for name, _ in link.uses:
            if name in shelf:
                continue
            if origin(name) != PULLED:
                there = ", ".join(shelf) or "none"
                raise UsageError(f"The link names {name!r}, which is not among those released here ({there}).")
            from neurosteer.hub import pull

            shelf[name] = pull(name, token=visitors_token(None))
        labels = [name for name, _ in link.uses]
        mix = mix.choosing(shelf, labels).at(dict(link.uses))
        return replace(mix, apart=link.apart)

    def choose_model(self, *values: Any) -> list[Any]:
        """Another model: it begins to load, and what was released for it is on the shelf: `[error, *mixer]`."""
        mix = Mix.of(values)
        name = mix.model or self.models.default
        try:
            self.models.holder(name).start_if_new()
        except Exception as error:
            return [render.error_line(problem(error)), *unchanged()]
        kept = {label: artifact for label, artifact in mix.shelf.items() if origin(label) != RELEASED}
        shelf = {**released_for(name), **kept}
        return ["", *mix.choosing(shelf, [label for label in mix.chosen if label in shelf]).updates()]

    def remix(self, *values: Any) -> list[Any]:
        """After the visitor chose other artifacts: a slider for each."""
        return Mix.of(values).updates()

    def upload(self, request: gr.Request, path: str | None, *values: Any) -> list[Any]:
        """Put an uploaded zip on the shelf: `[error, note, *mixer]`. What does not fit the model is refused."""
        if not path:
            return [gr.skip(), gr.skip(), *unchanged()]
        mix = Mix.of(values)
        self.jobs.keep(request.session_hash, path)
        try:
            from neurosteer.artifacts.artifact import check_model
            from neurosteer.artifacts.storage import unpack

            artifact = unpack(Path(path))
            warning = check_model(artifact, self.models.holder(mix.model).wait().lm.reference)
            shelf, label = put(mix.shelf, artifact)
            self.jobs.keep(request.session_hash, zip_file(artifact))
            chosen = mix.chosen if len(mix.chosen) == mixing.MOST else (*mix.chosen, label)
            return ["", render.added(artifact, label, warning), *mix.choosing(shelf, chosen).updates()]
        except Exception as error:
            return [render.error_line(f"{Path(path).name}: {problem(error)}"), "", *unchanged()]

    def begin_example(self, request: gr.Request) -> list[Any]:
        """At once, before the work has its turn: `[button, error, note]`."""
        self.jobs.begin(request.session_hash, BUILD_KIND)
        return [gr.update(interactive=False), "", render.note_line("Building…")]

    def give_up_example(self) -> list[Any]:
        """When the server could not even begin."""
        return [gr.update(interactive=True), render.error_line(BUSY), ""]

    def build_example(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """One click to something to steer with: `[button, error, note, *mixer]`."""
        mix, button = Mix.of(values), gr.update(interactive=True)
        try:
            examples = read_examples(EXAMPLE_SET)
            report = in_words(progress)
            cancel = self.jobs.current(request.session_hash, BUILD_KIND)
            artifact, _ = self.building.make(examples, Settings(), report, cancel, mix.model)
            shelf, label = put(mix.shelf, artifact)
            self.jobs.keep(request.session_hash, zip_file(artifact))
            ready = render.note_line(f"{label} is ready: press Run.")
            return [button, "", ready, *mix.choosing(shelf, [label]).updates()]
        except Exception as error:
            return [button, render.error_line(problem(error)), "", *unchanged()]


def _asked(values: tuple[Any, ...]) -> tuple[Ask, Mix]:
    return Ask(*values[: len(Ask._fields)]), Mix.of(values[len(Ask._fields) :])


def _check(ask: Ask, mix: Mix) -> None:
    if not ask.prompt.strip():
        raise UsageError("The prompt is empty; write at least one character.")
    if len(ask.prompt) > MAX_PROMPT:
        raise UsageError(f"The prompt has {len(ask.prompt):,} characters; this page takes {MAX_PROMPT:,}.")
    if not mix.chosen:
        raise UsageError("No artifact is chosen: choose one to steer with, build one, or upload one.")
    if ask.max_new_tokens > MAX_NEW_TOKENS:
        raise UsageError(f"{ask.max_new_tokens:g} tokens are asked for; this page writes at most {MAX_NEW_TOKENS}.")


def _query(request: gr.Request) -> Mapping[str, list[str]]:
    found = getattr(request, "query_params", None)
    return parse_qs(str(found or ""), max_num_fields=50)


def _ended(**updates: Any) -> View:
    on, off = gr.update(interactive=True), gr.update(interactive=False)
    return View(**updates | {"run": on, "again": on, "stop": off})


def _rows(page: "_Page", ask: Ask, recipe: "Recipe") -> "list[Row]":
    """The two texts to compare, in that order: they decode together."""
    from neurosteer.artifacts.recipes import UNSTEERED
    from neurosteer.steering.session import Row

    left, right = (page.asked(side) for side in SIDES)
    return [Row(left, ask.beside.recipe if ask.beside else UNSTEERED), Row(right, recipe, strength=1.0)]


def _sampling(ask: Ask) -> "Sampling":
    from neurosteer.steering.decoding import Sampling

    return Sampling(greedy=bool(ask.greedy), temperature=float(ask.temperature), top_p=float(ask.top_p), seed=ask.seed)


def _growing(stream: "Iterator[Step]", page: "_Page", cancel: threading.Event) -> "Generator[View, None, list[Row]]":
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


class _Page:
    """Both texts of a run as they grow, and what the panes of its mode show of them."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.chat = ask.mode == "chat"
        self.texts = ["", ""]
        self._chats_before = [_escaped(ask.talk[side]) for side in SIDES]

    def asked(self, side: str) -> Any:
        """The prompt of a side: the text alone, or that side's conversation with it."""
        prompt = self.ask.prompt
        return [*self.ask.talk[side], {"role": "user", "content": prompt}] if self.chat else prompt

    def take(self, first: int, pieces: tuple[str, ...]) -> None:
        for row, piece in enumerate(pieces, start=first):
            self.texts[row] += piece

    def begun(self, mix: Mix, note: str) -> View:
        """At once: Stop works, and what is to be compared is said above the texts."""
        beside = f"Kept: {self.ask.beside.words}" if self.ask.beside else "Unsteered"
        named = [gr.update(label=label) for label in (beside, f"Steered: {mix.in_words()}")]
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        view = self._shown(*named)._replace(note=render.note_line(note))
        return view._replace(run=off, again=off, stop=on)

    def view(self, *, done: bool = False) -> View:
        """The texts as they stand; `done` adds them to the conversation."""
        if not self.chat:
            return self._shown(*self.texts)
        talk = {
            side: [*self.asked(side), {"role": "assistant", "content": text}]
            for side, text in zip(SIDES, self.texts, strict=True)
        }
        view = self._shown(*(_escaped(talk[side]) for side in SIDES))
        return view._replace(talk=talk if done else gr.skip(), prompt="")

    def _shown(self, left: Any, right: Any) -> View:
        """Updates for the two panes of the mode."""
        if self.chat:
            return _WRITING._replace(unsteered_chat=left, steered_chat=right)
        before = self._chats_before
        return _WRITING._replace(unsteered=left, steered=right, unsteered_chat=before[0], steered_chat=before[1])


def _escaped(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**message, "content": render.chat_text(message["content"])} for message in talk]
