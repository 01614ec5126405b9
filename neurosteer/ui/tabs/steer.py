"""The Steer tab: a prompt, sliders, and the unsteered and the steered text side by side."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from neurosteer.errors import NeuroSteerError
from neurosteer.examples.files import neutral_prompts
from neurosteer.ui import mixer as mixing
from neurosteer.ui.jobs import guarded
from neurosteer.ui.limits import MAX_BUILDS, MAX_NEW_TOKENS, MAX_PROMPT, MAX_RUNS
from neurosteer.ui.mixer import Mixer
from neurosteer.ui.presets import PRESETS
from neurosteer.ui.show import colours
from neurosteer.ui.show import html as render
from neurosteer.ui.tabs.steer_handlers import EXAMPLE_SET, KIND, SIDES, UNSTEERED_SIDE, SteerHandlers, new_talk
from neurosteer.ui.work import KIND as BUILD_KIND

_MODES = [("One prompt", "prompt"), ("Chat", "chat")]
_NOTHING_YET = (
    "Nothing to steer this model with yet. Build something from your own texts on the Build tab, find something on the "
    "Library tab, upload an artifact that somebody gave you, or begin with the example:"
)
_OWN_PROMPTS = ("Tell me about your day.", "What was the new restaurant like?", "Write a postcard from the seaside.")
_COPY_LINK = """(query) => {
  if (!query) return "";
  const link = window.location.origin + window.location.pathname + query;
  if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
  return link;
}"""

_LOOK_AT_TEXTS = """() => setTimeout(() => {
  const text = document.querySelector("#steered, #steered-chat");
  if (text && text.getBoundingClientRect().bottom > window.innerHeight)
    document.querySelector("#steer-note")?.parentElement.scrollIntoView({ block: "start", behavior: "smooth" });
}, 400)"""


def example_prompts() -> list[str]:
    """A few to click on; the bundled ones ask for nothing in particular."""
    try:
        neutral = neutral_prompts()
    except NeuroSteerError:
        neutral = ()
    return [*_OWN_PROMPTS, *neutral[3:4], *neutral[20:21]]


@dataclass(frozen=True)
class SteerTab:
    """The components that handlers read and write."""

    presets: tuple[gr.Button, ...]
    mixer: Mixer
    example: gr.Button
    upload: gr.UploadButton
    keep: gr.Button
    kept: gr.State
    against: gr.Radio
    mix_error: gr.HTML
    mix_note: gr.HTML
    mode: gr.Radio
    prompt: gr.Textbox
    settings: tuple[Any, ...]
    run: gr.Button
    again: gr.Button
    stop: gr.Button
    share: gr.Button
    query: gr.Textbox
    link: gr.Textbox
    clear: gr.Button
    error: gr.HTML
    note: gr.HTML
    panes: gr.Row
    texts: tuple[gr.Textbox, gr.Textbox]
    chat_panes: gr.Row
    chats: tuple[gr.Chatbot, gr.Chatbot]
    colour: gr.Radio
    coloured: gr.HTML
    talk: gr.State
    last: gr.State
    picked: gr.State

    @property
    def ask(self) -> list[Any]:
        """In the order of `Ask`'s fields."""
        return [self.mode, self.prompt, self.talk, self.against, self.kept, *self.settings]

    @property
    def view(self) -> list[Any]:
        """In the order of `View`'s fields."""
        before = [self.run, self.again, self.stop, self.error, self.note, *self.texts, *self.chats]
        return [*before, self.talk, self.prompt, self.last, self.coloured, self.picked]


def lay_out(model: gr.Dropdown, shelf: gr.State) -> SteerTab:
    """The tab's components, within the current layout."""
    gr.Markdown("### How should it write? One click shows the difference.")
    with gr.Row(elem_classes="ns-presets", elem_id="presets"):
        presets = tuple(gr.Button(preset.label, min_width=120, variant="primary") for preset in PRESETS)
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            mode, prompt, settings = _prompt_inputs()
            with gr.Row(elem_classes="ns-actions"):
                run = gr.Button("Run", variant="primary", size="md", min_width=70, elem_id="run")
                again = gr.Button("Again", size="md", min_width=70, elem_id="again")
                stop = gr.Button("Stop", interactive=False, size="md", min_width=70, elem_id="stop")
                share = gr.Button("Copy link", size="md", min_width=90, elem_id="share")
                clear = gr.Button("New chat", visible=False, size="md", min_width=90, elem_id="clear")
        with gr.Column(min_width=320):
            with gr.Column() as empty:
                gr.HTML(render.hint(_NOTHING_YET), elem_classes="ns-flush")
                example = gr.Button(f"Build the {EXAMPLE_SET} example", variant="primary", elem_id="build-example")
            mixer = mixing.lay_out(model, shelf, empty)
            against = gr.Radio(
                [("the unsteered model", UNSTEERED_SIDE)], value=UNSTEERED_SIDE, label="Compare with", visible=False,
                elem_id="against", elem_classes="ns-stacked",
            )  # fmt: skip
            with gr.Row():
                keep = gr.Button("Keep for comparison", size="sm", elem_id="keep")
                upload = gr.UploadButton("Upload an artifact (.zip)", size="sm", elem_id="upload")
            mix_error = gr.HTML(elem_id="mix-error", elem_classes="ns-flush")
            mix_note = gr.HTML(elem_id="mix-note", elem_classes="ns-flush")
    error = gr.HTML(elem_id="steer-error", elem_classes="ns-flush")
    note = gr.HTML(elem_id="steer-note", elem_classes="ns-flush")
    query = gr.Textbox("", label="Link's query", visible=False)
    link = gr.Textbox(
        "", label="The link (copied where the browser allows it)", visible=False, buttons=["copy"], elem_id="link"
    )
    with gr.Row(elem_classes="ns-columns") as panes:
        texts = tuple(_pane(side) for side in SIDES)
    with gr.Row(elem_classes="ns-columns", visible=False) as chat_panes:
        chats = tuple(_chat_pane(side) for side in SIDES)
    colour = gr.Radio(colours.KINDS, value="", label="Colour the words", elem_id="colour")
    coloured = gr.HTML(elem_id="coloured", elem_classes="ns-flush")
    mixer.about.render()
    return SteerTab(
        presets, mixer, example, upload, keep, gr.State(None), against, mix_error, mix_note, mode, prompt, settings,
        run, again, stop, share, query, link, clear, error, note, panes, (texts[0], texts[1]), chat_panes,
        (chats[0], chats[1]), colour, coloured, gr.State(new_talk()), gr.State(()),
        gr.State(None),
    )  # fmt: skip


def _prompt_inputs() -> tuple[gr.Radio, gr.Textbox, tuple[Any, ...]]:
    prompts = example_prompts()
    prompt = gr.Textbox(
        prompts[0], label="Prompt", info="Enter runs it", max_lines=8, max_length=MAX_PROMPT, elem_id="prompt"
    )
    gr.Examples(prompts, prompt, label="Ideas", api_visibility="private")
    mode = gr.Radio(_MODES, value="prompt", label="Mode")
    return mode, prompt, _settings_inputs()


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
            seed = gr.Number(0, label="Seed", info="The same seed, the same texts", precision=0)
            greedy = gr.Checkbox(False, label="Greedy", info="Always the likeliest word; no chance involved")
    return length, temperature, top_p, seed, greedy


def wire(tab: SteerTab, handlers: SteerHandlers) -> None:
    """Connect the components with the handlers."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    writing = {**quiet, "concurrency_limit": MAX_RUNS, "concurrency_id": KIND}
    mixer = tab.mixer
    given, mixed = [*tab.ask, *mixer.inputs], [tab.mix_error, tab.mix_note, *mixer.outputs]
    starting = [tab.run.click, tab.again.click, tab.prompt.submit, *(button.click for button in tab.presets)]
    gr.on(starting, None, None, None, js=_LOOK_AT_TEXTS, **quiet)
    events = [gr.on([tab.run.click, tab.prompt.submit], handlers.run, given, tab.view, **writing)]
    events.append(tab.again.click(handlers.again, given, tab.view, **writing))
    tab.again.click(handlers.next_seed, tab.settings[3], tab.settings[3], queue=False, **quiet)
    for button, preset in zip(tab.presets, PRESETS, strict=True):
        events.append(button.click(handlers.runner(preset), given, tab.view, **writing))
    tab.picked.change(guarded(handlers.show_picked), [tab.picked, *mixer.inputs], mixer.outputs, queue=False, **quiet)
    colouring = [tab.colour, tab.last, *mixer.inputs]
    for event in events:
        event.failure(handlers.give_up, None, tab.view, queue=False, **quiet)
        event.success(handlers.colour, colouring, tab.coloured, **quiet)
    tab.stop.click(handlers.stop, None, None, queue=False, **quiet)
    gr.on([tab.clear.click, *(chat.clear for chat in tab.chats)], handlers.clear, None, [tab.talk, *tab.chats], **quiet)
    tab.mode.change(handlers.show_mode, tab.mode, [tab.panes, tab.chat_panes, tab.clear], queue=False, **quiet)
    tab.colour.input(handlers.colour, colouring, tab.coloured, **quiet)
    tab.keep.click(handlers.keep, mixer.inputs, [tab.kept, tab.against, tab.mix_error], **quiet)
    tab.share.click(handlers.share, given, [tab.query, tab.error], **quiet).success(
        lambda query: gr.update(visible=bool(query)), tab.query, tab.link, **quiet
    ).success(None, tab.query, tab.link, js=_COPY_LINK, **quiet)
    mixer.chosen.input(guarded(handlers.remix), mixer.inputs, mixer.outputs, **quiet)
    mixer.model.input(handlers.choose_model, mixer.inputs, [tab.mix_error, *mixer.outputs], **quiet)
    tab.upload.upload(handlers.upload, [tab.upload, *mixer.inputs], mixed, **quiet)
    example = [tab.example, tab.mix_error, tab.mix_note]
    tab.example.click(handlers.begin_example, None, example, queue=False, **quiet).then(
        handlers.build_example,
        mixer.inputs,
        [tab.example, *mixed],
        show_progress_on=tab.mix_note,
        concurrency_id=BUILD_KIND,
        concurrency_limit=MAX_BUILDS,
        api_visibility="private",
    ).failure(handlers.give_up_example, None, example, queue=False, **quiet)


def wire_arrival(tab: SteerTab, page: gr.Blocks, handlers: SteerHandlers) -> None:
    """What a visitor finds: the released artifacts, and what their link says."""
    mixer = tab.mixer
    arrived = [mixer.model, tab.mode, tab.prompt, *tab.settings, tab.mix_error, *mixer.outputs]
    page.load(handlers.arrive, mixer.inputs, arrived, show_progress="hidden", api_visibility="private")
