"""The Steer tab: a prompt, sliders, and the unsteered and the steered text side by side."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.examples import neutral_prompts, read_examples
from neurosteer.progress import check_cancelled
from neurosteer.ui import mixer as mixing
from neurosteer.ui import render
from neurosteer.ui.build_tab import KIND as BUILD_KIND
from neurosteer.ui.build_tab import PROGRESS, BuildHandlers, Settings, in_words
from neurosteer.ui.jobs import BUSY, Jobs, guarded, problem
from neurosteer.ui.loading import ModelHolder
from neurosteer.ui.mixer import Mix, Mixer, unchanged
from neurosteer.ui.shelf import put

if TYPE_CHECKING:
    from neurosteer.decoding import Sampling
    from neurosteer.steering import Row, Step

KIND = "steer"
SIDES = ("unsteered", "steered")
EXAMPLE_SET = "sentiment"
MAX_NEW_TOKENS = 512

_MODES = [("One prompt", "prompt"), ("Chat", "chat")]
_NOTHING_YET = (
    "Nothing to steer with yet. Build something from your own texts on the Build tab, upload an artifact that you or "
    "somebody else downloaded, or begin with the example:"
)
_OWN_PROMPTS = ("Tell me about your day.", "What was the new restaurant like?", "Write a postcard from the seaside.")
_UPDATE_S = 0.06  # faster than anyone reads, slow enough for any connection
_POLL_S = 0.3

Talk = dict[str, list[dict[str, str]]]
"""A conversation per side, as messages with `role` and `content`."""


class Ask(NamedTuple):
    """What to write: the values of the components, in their order."""

    mode: str
    prompt: str
    talk: Talk
    max_new_tokens: float
    temperature: float
    top_p: float
    seed: int
    greedy: bool


class View(NamedTuple):
    """Updates for the components that a run changes, in their order; by default none."""

    run: Any = gr.skip()
    stop: Any = gr.skip()
    error: Any = gr.skip()
    note: Any = gr.skip()
    unsteered: Any = gr.skip()
    steered: Any = gr.skip()
    unsteered_chat: Any = gr.skip()
    steered_chat: Any = gr.skip()
    talk: Any = gr.skip()
    prompt: Any = gr.skip()


def example_prompts() -> list[str]:
    """A few to click on; the bundled ones ask for nothing in particular."""
    try:
        neutral = neutral_prompts()
    except NeuroSteerError:
        neutral = ()
    return [*_OWN_PROMPTS, *neutral[3:4], *neutral[20:21]]


def new_talk() -> Talk:
    return {side: [] for side in SIDES}


class SteerHandlers:
    """What happens on the Steer tab."""

    def __init__(self, holder: ModelHolder, jobs: Jobs, building: BuildHandlers) -> None:
        self.holder = holder
        self.jobs = jobs
        self.building = building

    def begin(self, request: gr.Request) -> View:
        """At once, before the work has its turn: Stop works from here on."""
        self.jobs.begin(request.session_hash, KIND)
        waiting = render.note_line("Waiting for its turn…")
        return View(run=gr.update(interactive=False), stop=gr.update(interactive=True), error="", note=waiting)

    def give_up(self) -> View:
        """When the server could not even begin: the buttons as they were."""
        return self._ended(error=render.error_line(BUSY), note="")

    def stop(self, request: gr.Request) -> None:
        self.jobs.cancel(request.session_hash, KIND)

    def run(self, request: gr.Request, *values: Any) -> Iterator[View]:
        """Stream both texts. Whatever goes wrong becomes one line; what was written and entered stays."""
        ask, mix = Ask(*values[: len(Ask._fields)]), Mix.of(values[len(Ask._fields) :])
        try:
            yield from self._write(ask, mix, request.session_hash)
        except Exception as error:
            yield self._ended(error=render.error_line(problem(error)), note="")

    def _write(self, ask: Ask, mix: Mix, visitor: str | None) -> Iterator[View]:
        if not ask.prompt.strip():
            raise UsageError("The prompt is empty; write at least one character.")
        if not mix.chosen:
            raise UsageError("No artifact is chosen: choose one to steer with, build one, or upload one.")
        cancel = self.jobs.current(visitor, KIND)
        yield from self._wait(cancel)
        session = self.holder.wait(cancel=cancel)
        page, started = _Page(ask), time.monotonic()
        length, sampling = int(ask.max_new_tokens), _sampling(ask)
        stream = session.stream(_rows(page, mix), max_new_tokens=length, sampling=sampling, cancel=cancel)
        rows = yield from _growing(stream, page)
        note = render.run_note(rows, time.monotonic() - started)
        yield self._ended(**page.view(done=True)._asdict() | {"error": "", "note": note})

    def _wait(self, cancel: Any) -> Iterator[View]:
        """Says what loading is at until it is over."""
        self.holder.start_if_new()
        while not (status := self.holder.status).settled:
            yield View(note=render.note_line(f"Waiting for the model: {status.text}…"))
            cancel.wait(_POLL_S)
            check_cancelled(cancel, "Waiting for the model")
        yield View(note=render.note_line("Reading the prompt…"))

    def _ended(self, **updates: Any) -> View:
        return View(**updates | {"run": gr.update(interactive=True), "stop": gr.update(interactive=False)})

    def clear(self) -> list[Any]:
        """Begin a new conversation."""
        return [new_talk(), [], []]

    def show_mode(self, mode: str) -> list[Any]:
        """The panes of the mode."""
        chat = mode == "chat"
        return [gr.update(visible=not chat), gr.update(visible=chat), gr.update(visible=chat)]

    def remix(self, *values: Any) -> list[Any]:
        """After the visitor chose other artifacts: a slider for each."""
        return Mix.of(values).updates()

    def upload(self, path: str | None, *values: Any) -> list[Any]:
        """Put an uploaded zip on the shelf: `[error, note, *mixer]`. What does not fit the model is refused."""
        if not path:
            return [gr.skip(), gr.skip(), *unchanged()]
        mix = Mix.of(values)
        try:
            from neurosteer.artifacts import check_model
            from neurosteer.storage import unpack

            artifact = unpack(Path(path))
            warning = check_model(artifact, self.holder.wait().lm.reference)
            shelf, label = put(mix.shelf, artifact)
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
            artifact, _ = self.building.make(examples, Settings(), in_words(progress), request.session_hash)
            shelf, label = put(mix.shelf, artifact)
            ready = render.note_line(f"{label} is ready: press Run.")
            return [button, "", ready, *mix.choosing(shelf, [label]).updates()]
        except Exception as error:
            return [button, render.error_line(problem(error)), "", *unchanged()]


def _rows(page: "_Page", mix: Mix) -> "list[Row]":
    """The unsteered and the steered text, in that order: they decode together."""
    from neurosteer.combining import orthogonalised
    from neurosteer.recipes import Recipe
    from neurosteer.steering import Row

    recipe = Recipe.of(*((mix.shelf[label], float(mix.strength(label))) for label in mix.chosen))
    if mix.apart:
        recipe = orthogonalised(recipe)
    plain, steered = (page.asked(side) for side in SIDES)
    return [Row(plain), Row(steered, recipe, strength=1.0)]


def _sampling(ask: Ask) -> "Sampling":
    from neurosteer.decoding import Sampling

    return Sampling(greedy=bool(ask.greedy), temperature=float(ask.temperature), top_p=float(ask.top_p), seed=ask.seed)


def _growing(stream: "Iterator[Step]", page: "_Page") -> "Generator[View, None, list[Row]]":
    """Views of the texts as they grow; returns the finished rows."""
    shown, note = 0.0, render.note_line("Writing…")
    while True:
        try:
            step = next(stream)
        except StopIteration as finished:
            return finished.value
        page.take(step.first, step.pieces)
        if time.monotonic() - shown >= _UPDATE_S:
            yield page.view()._replace(note=note)
            shown, note = time.monotonic(), gr.skip()  # the note once: a screen reader would say it every time


class _Page:
    """Both texts of a run as they grow, and what the panes of its mode show of them."""

    def __init__(self, ask: Ask) -> None:
        self.chat = ask.mode == "chat"
        self.prompt = ask.prompt
        self.before = ask.talk
        self.texts = ["", ""]

    def asked(self, side: str) -> Any:
        """The prompt of a side: the text alone, or that side's conversation with it."""
        return [*self.before[side], {"role": "user", "content": self.prompt}] if self.chat else self.prompt

    def take(self, first: int, pieces: tuple[str, ...]) -> None:
        for row, piece in enumerate(pieces, start=first):
            self.texts[row] += piece

    def view(self, *, done: bool = False) -> View:
        if not self.chat:
            return View(unsteered=self.texts[0], steered=self.texts[1])
        talk = {
            side: [*self.asked(side), {"role": "assistant", "content": text}]
            for side, text in zip(SIDES, self.texts, strict=True)
        }
        chats = [[{**message, "content": render.chat_text(message["content"])} for message in talk[s]] for s in SIDES]
        return View(unsteered_chat=chats[0], steered_chat=chats[1], talk=talk if done else gr.skip(), prompt="")


@dataclass(frozen=True)
class SteerTab:
    """The components that handlers read and write."""

    mixer: Mixer
    example: gr.Button
    upload: gr.UploadButton
    mix_error: gr.HTML
    mix_note: gr.HTML
    mode: gr.Radio
    prompt: gr.Textbox
    settings: tuple[Any, ...]
    run: gr.Button
    stop: gr.Button
    clear: gr.Button
    error: gr.HTML
    note: gr.HTML
    panes: gr.Row
    texts: tuple[gr.Textbox, gr.Textbox]
    chat_panes: gr.Row
    chats: tuple[gr.Chatbot, gr.Chatbot]
    talk: gr.State
    shelf: gr.State


def lay_out(shelf: gr.State) -> SteerTab:
    """The tab's components, within the current layout."""
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### 1. What to steer with")
            with gr.Column() as empty:
                gr.HTML(render.hint(_NOTHING_YET), elem_classes="ns-flush")
                example = gr.Button(f"Build the {EXAMPLE_SET} example", variant="primary", elem_id="build-example")
            mixer = mixing.lay_out(shelf, empty)
            mix_error = gr.HTML(elem_id="mix-error", elem_classes="ns-flush")
            mix_note = gr.HTML(elem_id="mix-note", elem_classes="ns-flush")
            upload = gr.UploadButton("Upload an artifact (.zip)", size="sm", elem_id="upload")
        with gr.Column(min_width=320):
            gr.Markdown("### 2. What to write about")
            mode = gr.Radio(_MODES, value="prompt", label="Mode")
            prompts = example_prompts()
            prompt = gr.Textbox(prompts[0], label="Prompt", info="Enter runs it", max_lines=8, elem_id="prompt")
            gr.Examples(prompts, prompt, label="Ideas", api_visibility="private")
            settings = _settings_inputs()
            with gr.Row():
                run = gr.Button("Run", variant="primary", min_width=90, elem_id="run")
                stop = gr.Button("Stop", interactive=False, min_width=90, elem_id="stop")
                clear = gr.Button("New chat", visible=False, min_width=90, elem_id="clear")
    error = gr.HTML(elem_id="steer-error", elem_classes="ns-flush")
    note = gr.HTML(elem_id="steer-note", elem_classes="ns-flush")
    with gr.Row(elem_classes="ns-columns") as panes:
        texts = tuple(_pane(side) for side in SIDES)
    with gr.Row(elem_classes="ns-columns", visible=False) as chat_panes:
        chats = tuple(_chat_pane(side) for side in SIDES)
    mixer.about.render()
    talk = gr.State(new_talk())
    return SteerTab(
        mixer, example, upload, mix_error, mix_note, mode, prompt, settings, run, stop, clear, error, note,
        panes, (texts[0], texts[1]), chat_panes, (chats[0], chats[1]), talk, shelf,
    )  # fmt: skip


def _pane(side: str) -> gr.Textbox:
    with gr.Column(min_width=320):
        return gr.Textbox(
            label=side.capitalize(), lines=8, max_lines=24, interactive=False, buttons=["copy"], elem_id=side
        )


def _chat_pane(side: str) -> gr.Chatbot:
    with gr.Column(min_width=320):
        return gr.Chatbot(
            label=side.capitalize(),
            render_markdown=False,
            allow_tags=False,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            height=420,
            elem_id=f"{side}-chat",
        )


def _settings_inputs() -> tuple[Any, ...]:
    with gr.Accordion("Settings", open=False):
        length = gr.Slider(1, MAX_NEW_TOKENS, value=80, step=1, label="Length", info="At most this many tokens")
        with gr.Row():
            temperature = gr.Slider(0.05, 2.0, value=0.8, step=0.05, label="Temperature", info="Higher is more varied")
            top_p = gr.Slider(0.05, 1.0, value=0.95, step=0.05, label="Top-p", info="Lower drops unlikely words")
        with gr.Row():
            seed = gr.Number(0, label="Seed", info="The same seed gives the same texts", precision=0)
            greedy = gr.Checkbox(False, label="Greedy", info="Always the likeliest word; no chance involved")
    return length, temperature, top_p, seed, greedy


def wire(tab: SteerTab, handlers: SteerHandlers) -> None:
    """Connect the components with the handlers."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    mixer = tab.mixer
    view = [tab.run, tab.stop, tab.error, tab.note, *tab.texts, *tab.chats, tab.talk, tab.prompt]
    gr.on([tab.run.click, tab.prompt.submit], handlers.begin, None, view, queue=False, **quiet).then(
        handlers.run, [tab.mode, tab.prompt, tab.talk, *tab.settings, *mixer.inputs], view, **quiet
    ).failure(handlers.give_up, None, view, queue=False, **quiet)
    tab.stop.click(handlers.stop, None, None, queue=False, **quiet)
    gr.on([tab.clear.click, *(chat.clear for chat in tab.chats)], handlers.clear, None, [tab.talk, *tab.chats], **quiet)
    tab.mode.change(handlers.show_mode, tab.mode, [tab.panes, tab.chat_panes, tab.clear], queue=False, **quiet)
    mixer.chosen.input(guarded(handlers.remix), mixer.inputs, mixer.outputs, **quiet)
    mixed = [tab.mix_error, tab.mix_note, *mixer.outputs]
    tab.upload.upload(handlers.upload, [tab.upload, *mixer.inputs], mixed, **quiet)
    example = [tab.example, tab.mix_error, tab.mix_note]
    tab.example.click(handlers.begin_example, None, example, queue=False, **quiet).then(
        handlers.build_example,
        mixer.inputs,
        [tab.example, *mixed],
        show_progress_on=tab.mix_note,
        concurrency_id=BUILD_KIND,
        api_visibility="private",
    ).failure(handlers.give_up_example, None, example, queue=False, **quiet)
