"""The Steer tab: a prompt, sliders, and the unsteered and the steered text side by side."""

from typing import Any

import gradio as gr

from neurosteer.errors import NeuroSteerError
from neurosteer.examples.files import neutral_prompts
from neurosteer.ui import mixer as mixing
from neurosteer.ui.jobs import guarded
from neurosteer.ui.limits import MAX_BUILDS, MAX_NEW_TOKENS, MAX_PROMPT, MAX_RUNS
from neurosteer.ui.presets import PRESETS
from neurosteer.ui.show import colours
from neurosteer.ui.show import html as render
from neurosteer.ui.tabs.mixer_handlers import EXAMPLE_SET, MixerHandlers
from neurosteer.ui.tabs.steer_handlers import KIND, SteerHandlers
from neurosteer.ui.tabs.steer_texts import SIDES, UNSTEERED_SIDE, Ask, View, new_talk
from neurosteer.ui.wiring import Form, Parts, bound
from neurosteer.ui.work import HUB, LINKED, QUIET, READING
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


class SteerTab(Parts):
    """The components of the tab."""

    @property
    def ask(self) -> "Form[Ask]":
        """What to write, and beside what."""
        return Form(Ask, self.pick(*Ask._fields))


def lay_out(model: gr.Dropdown, shelf: gr.State) -> SteerTab:
    """The tab's components, within the current layout."""
    tab = SteerTab(**{name: gr.State(None) for name in ("kept", "picked", "wanted")})
    tab.talk, tab.last = gr.State(new_talk()), gr.State(())
    gr.Markdown("### How should it write? One click shows the difference.")
    with gr.Row(elem_classes="ns-presets", elem_id="presets"):
        tab.presets = tuple(gr.Button(preset.label, min_width=120, variant="primary") for preset in PRESETS)
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            _lay_out_prompt(tab)
            with gr.Row(elem_classes="ns-actions"):
                tab.run = gr.Button("Run", variant="primary", size="md", min_width=70, elem_id="run")
                tab.again = gr.Button("Again", size="md", min_width=70, elem_id="again")
                tab.stop = gr.Button("Stop", interactive=False, size="md", min_width=70, elem_id="stop")
                tab.share = gr.Button("Copy link", size="md", min_width=90, elem_id="share")
                tab.clear = gr.Button("New chat", visible=False, size="md", min_width=90, elem_id="clear")
        with gr.Column(min_width=320):
            tab.fetch = gr.Button("Fetch", variant="primary", visible=False, elem_id="fetch-linked")
            with gr.Column() as empty:
                gr.HTML(render.hint(_NOTHING_YET), elem_classes="ns-flush")
                tab.example = gr.Button(f"Build the {EXAMPLE_SET} example", variant="primary", elem_id="build-example")
            tab.mixer = mixing.lay_out(model, shelf, empty)
            tab.against = gr.Radio(
                [("the unsteered model", UNSTEERED_SIDE)], value=UNSTEERED_SIDE, label="Compare with", visible=False,
                elem_id="against", elem_classes="ns-stacked",
            )  # fmt: skip
            with gr.Row():
                tab.put_aside = gr.Button("Keep for comparison", size="sm", elem_id="keep")
                tab.upload = gr.UploadButton("Upload an artifact (.zip)", size="sm", elem_id="upload")
            tab.mix_error = gr.HTML(elem_id="mix-error", elem_classes="ns-flush")
            tab.mix_note = gr.HTML(elem_id="mix-note", elem_classes="ns-flush")
    tab.error = gr.HTML(elem_id="steer-error", elem_classes="ns-flush")
    tab.note = gr.HTML(elem_id="steer-note", elem_classes="ns-flush")
    tab.query = gr.Textbox("", label="Link's query", visible=False)
    tab.link = gr.Textbox(
        "", label="The link (copied where the browser allows it)", visible=False, buttons=["copy"], elem_id="link"
    )
    with gr.Row(elem_classes="ns-columns") as tab.panes:
        tab.unsteered, tab.steered = (_pane(side) for side in SIDES)
    with gr.Row(elem_classes="ns-columns", visible=False) as tab.chat_panes:
        tab.unsteered_chat, tab.steered_chat = (_chat_pane(side) for side in SIDES)
    tab.colour = gr.Radio(colours.KINDS, value="", label="Colour the words", elem_id="colour")
    tab.coloured = gr.HTML(elem_id="coloured", elem_classes="ns-flush")
    tab.mixer.about.render()
    return tab


def _lay_out_prompt(tab: SteerTab) -> None:
    prompts = example_prompts()
    tab.prompt = gr.Textbox(
        prompts[0], label="Prompt", info="Enter runs it", max_lines=8, max_length=MAX_PROMPT, elem_id="prompt"
    )
    gr.Examples(prompts, tab.prompt, label="Ideas", api_visibility="private")
    tab.mode = gr.Radio(_MODES, value="prompt", label="Mode")
    with gr.Accordion("Settings", open=False):
        tab.max_new_tokens = gr.Slider(
            1, MAX_NEW_TOKENS, value=80, step=1, label="Length", info="At most this many tokens"
        )
        with gr.Row():
            tab.temperature = gr.Slider(
                0.05, 2.0, value=0.8, step=0.05, label="Temperature", info="Higher is more varied"
            )
            tab.top_p = gr.Slider(0.05, 1.0, value=0.95, step=0.05, label="Top-p", info="Lower drops unlikely words")
        with gr.Row():
            tab.seed = gr.Number(0, label="Seed", info="The same seed, the same texts", precision=0)
            tab.greedy = gr.Checkbox(False, label="Greedy", info="Always the likeliest word; no chance involved")


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


def wire(tab: SteerTab, handlers: SteerHandlers) -> None:
    """Connect what writes, and what is done with the texts."""
    mixer = tab.mixer
    given, view = [tab.ask, mixer.form], tab.pick(*View._fields)
    writing: dict[str, Any] = {**QUIET, "concurrency_limit": MAX_RUNS, "concurrency_id": KIND}
    starting = [tab.run.click, tab.again.click, tab.prompt.submit, *(button.click for button in tab.presets)]
    gr.on(starting, None, None, None, js=_LOOK_AT_TEXTS, **QUIET)
    events = [gr.on([tab.run.click, tab.prompt.submit], *bound(handlers.run, given, view), **writing)]
    events.append(tab.again.click(*bound(handlers.again, given, view), **writing))
    tab.again.click(*bound(handlers.next_seed, [tab.seed], tab.seed), queue=False, **QUIET)
    for button, preset in zip(tab.presets, PRESETS, strict=True):
        events.append(button.click(*bound(handlers.runner(preset), given, view), **writing))
    picked = bound(guarded(handlers.show_picked), [tab.picked, mixer.form], mixer.outputs)
    tab.picked.change(*picked, queue=False, **QUIET)
    colour = bound(handlers.colour, [tab.colour, tab.last, mixer.form], tab.coloured)
    reading: dict[str, Any] = {**QUIET, "concurrency_limit": READING, "concurrency_id": "colour"}
    for event in events:
        event.failure(*bound(handlers.give_up, [], view), queue=False, **QUIET)
        event.success(*colour, **reading)
    tab.colour.input(*colour, **reading)
    tab.stop.click(*bound(handlers.stop), queue=False, **QUIET)
    clearing = [tab.clear.click, tab.unsteered_chat.clear, tab.steered_chat.clear]
    gr.on(clearing, *bound(handlers.clear, [], tab.pick("talk", "unsteered_chat", "steered_chat")), **QUIET)
    panes = tab.pick("panes", "chat_panes", "clear")
    tab.mode.change(*bound(handlers.show_mode, [tab.mode], panes), queue=False, **QUIET)
    aside = tab.pick("kept", "against", "mix_error")
    tab.put_aside.click(*bound(handlers.put_aside, [mixer.form], aside), **QUIET)
    tab.share.click(*bound(handlers.share, given, tab.pick("query", "error")), **QUIET).success(
        lambda query: gr.update(visible=bool(query)), tab.query, tab.link, **QUIET
    ).success(None, tab.query, tab.link, js=_COPY_LINK, **QUIET)


def wire_mixer(tab: SteerTab, page: gr.Blocks, handlers: MixerHandlers) -> None:
    """Connect what there is to steer with: what a visitor finds, fetches, uploads and chooses."""
    mixer, given = tab.mixer, [tab.mixer.form]
    mixed = {**tab.pick("mix_error", "mix_note"), **mixer.outputs}
    set_to = tab.pick("mode", "prompt", "max_new_tokens", "temperature", "top_p", "seed", "greedy", "wanted", "fetch")
    page.load(*bound(handlers.arrive, given, {"model": mixer.model, **set_to, **mixed}), **QUIET)
    fetched = {**tab.pick("wanted", "fetch"), **mixed}
    tab.fetch.click(
        *bound(handlers.fetch_linked, [tab.wanted, mixer.form], fetched),
        show_progress_on=tab.mix_note,
        concurrency_limit=LINKED,
        api_visibility="private",
    )
    mixer.chosen.input(*bound(guarded(handlers.remix), given, mixer.outputs), **QUIET)
    mixer.model.input(*bound(handlers.choose_model, given, mixed), **QUIET)
    uploading: dict[str, Any] = {**QUIET, "concurrency_limit": HUB}
    tab.upload.upload(*bound(handlers.upload, [tab.upload, mixer.form], mixed), **uploading)
    example = tab.pick("example", "mix_error", "mix_note")
    tab.example.click(*bound(handlers.begin_example, [], example), queue=False, **QUIET).then(
        *bound(handlers.build_example, given, {**example, **mixed}),
        show_progress_on=tab.mix_note,
        concurrency_id=BUILD_KIND,
        concurrency_limit=MAX_BUILDS,
        api_visibility="private",
    ).failure(*bound(handlers.give_up_example, [], example), queue=False, **QUIET)
