"""The Evaluate tab: what an artifact or recipe does and breaks, by strength, beside its controls."""

import gradio as gr

from neurosteer.examples.files import bundled_sets
from neurosteer.ui.evaluating import MOST_RANDOM, N_PROMPTS, N_TOKENS, STRENGTHS, Plan
from neurosteer.ui.limits import (
    MAX_EVALUATED_PROMPTS,
    MAX_EVALUATED_SAMPLES,
    MAX_EVALUATED_TOKENS,
    MAX_EVALUATIONS,
    strangers,
)
from neurosteer.ui.mixer import Mixer
from neurosteer.ui.show import html as render
from neurosteer.ui.source import Source
from neurosteer.ui.tabs.evaluate_handlers import (
    BUNDLED,
    FILE,
    OWN,
    PATTERN,
    REFUSAL,
    WORDS,
    EvaluateHandlers,
    JudgeAsked,
)
from neurosteer.ui.tabs.startable import wire_work
from neurosteer.ui.wiring import Form, Parts, bound
from neurosteer.ui.work import QUIET, READING

_JUDGES = [
    ("A classifier, trained on a ready-made set", BUNDLED),
    ("… on the examples of the Build tab", OWN),
    ("… on labelled texts of mine", FILE),
    ("A detector of refusals", REFUSAL),
    ("Words to look for", WORDS),
]
_PATTERNS = ("A pattern (regular expression)", PATTERN)  # some keep a processor busy for hours: not for strangers
_HELP = (
    "The model writes the same prompts at every strength, and beside that with no steering, with random twins at the "
    "same KL and with a plain instruction. A judge says which texts show the behaviour; damage needs no judge."
)
_LABELLED = "Texts with labels, as for building: not those the artifact was built from"


def lay_out() -> Parts:
    """The tab's components, within the current layout."""
    tab = Parts(measured=gr.State(None))
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### What does it do, and what does it break?")
            gr.HTML(render.hint(_HELP), elem_classes="ns-flush")
            tab.what = gr.Dropdown([], label="What to evaluate", elem_id="evaluated")
            _lay_out_judge(tab)
        with gr.Column(min_width=320):
            gr.Markdown("### What it writes for that")
            _lay_out_plan(tab)
            with gr.Row():
                tab.start = gr.Button("Run", variant="primary", min_width=90, elem_id="evaluate")
                tab.cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel-evaluate")
            tab.error = gr.HTML(elem_id="evaluate-error", elem_classes="ns-flush")
            tab.note = gr.HTML(elem_id="evaluate-note", elem_classes="ns-flush")
            nothing = render.hint("What is found appears here: about a minute on a laptop’s processor.")
            tab.summary = gr.HTML(nothing, elem_id="evaluation", elem_classes="ns-flush")
            with gr.Row():
                tab.attach = gr.Button("Keep", variant="primary", visible=False, elem_id="keep-receipt")
                tab.download = gr.DownloadButton("Download (.zip)", visible=False, elem_id="download-evaluation")
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            tab.effect = gr.Plot(label="Effect by strength", show_label=False, visible=False, elem_id="effect")
        with gr.Column(min_width=320):
            tab.damage = gr.Plot(label="Damage by strength", show_label=False, visible=False, elem_id="damage")
    tab.table = gr.HTML(elem_id="figures", elem_classes="ns-flush")
    tab.texts = gr.HTML(elem_id="written", elem_classes="ns-flush")
    return tab


def _lay_out_judge(tab: Parts) -> None:
    offered = _JUDGES if strangers() else [*_JUDGES, _PATTERNS]
    tab.kind = gr.Radio(offered, value=BUNDLED, label="Who judges", elem_classes="ns-stacked", elem_id="judge")
    names = list(bundled_sets())
    tab.bundled = gr.Dropdown(names, value=names[0] if names else None, label="Ready-made set", elem_id="judge-set")
    tab.file = gr.File(label=_LABELLED, height=140, visible=False, elem_id="judge-file")
    tab.words = gr.Textbox(
        "", label="Words", info="A text with any of them shows it; commas between", max_lines=2, max_length=500,
        visible=False, elem_id="judge-words",
    )  # fmt: skip
    tab.pattern = gr.Textbox("", label="Pattern", max_lines=1, max_length=500, visible=False, elem_id="judge-pattern")
    tab.about_judge = gr.HTML(elem_id="about-judge", elem_classes="ns-flush")


def _lay_out_plan(tab: Parts) -> None:
    tab.prompts = gr.Textbox(
        "", label="Prompts, one a line", placeholder="empty: neutral ones that ask for nothing in particular", lines=3,
        max_lines=10, elem_id="evaluate-prompts",
    )  # fmt: skip
    with gr.Row():
        tab.n_prompts = gr.Slider(
            2,
            MAX_EVALUATED_PROMPTS,
            value=N_PROMPTS,
            step=2,
            label="Neutral prompts",
            info="Where there are none above",
        )
        tab.strengths = gr.Textbox(
            STRENGTHS, label="Strengths", info="1 is the artifact as it is", max_lines=1, max_length=100,
            elem_id="strengths",
        )  # fmt: skip
    with gr.Row():
        tab.samples = gr.Slider(1, MAX_EVALUATED_SAMPLES, value=1, step=1, label="Samples", info="Texts a prompt")
        tab.tokens = gr.Slider(
            8, MAX_EVALUATED_TOKENS, value=N_TOKENS, step=1, label="Length", info="At most this many tokens"
        )
    with gr.Accordion("Controls", open=False):
        tab.n_random = gr.Slider(1, MOST_RANDOM, value=MOST_RANDOM, step=1, label="Random twins")
        with gr.Row():
            tab.more = gr.Textbox("", label="Asking for it in plain words", placeholder="automatic", max_length=300)
            tab.less = gr.Textbox("", label="… and for the opposite", placeholder="automatic", max_length=300)
        tab.seed = gr.Number(0, label="Seed", info="The same seed, the same figures", precision=0)


def wire(tab: Parts, mixer: Mixer, source: Form[Source], entry: gr.Tab, handlers: EvaluateHandlers) -> None:
    """Connect the components with the handlers; `source` are the Build tab's components of examples."""
    judge = Form(JudgeAsked, tab.pick(*JudgeAsked._fields))
    chosen = [tab.what, tab.bundled, mixer.form]
    offered = bound(handlers.choices, chosen, tab.pick("what", "bundled"))
    gr.on([entry.select, mixer.shelf.change], *offered, **QUIET)
    tab.what.input(*bound(handlers.fitting, chosen, tab.bundled), **QUIET)
    groups = tab.pick("bundled", "file", "words", "pattern")
    tab.kind.change(*bound(handlers.show_judge, [tab.kind], groups), queue=False, **QUIET)
    about = bound(handlers.about_judge, [tab.what, judge, source, mixer.form], tab.about_judge)
    parsing = {**QUIET, "concurrency_limit": READING, "concurrency_id": "preview"}
    for component in (tab.what, tab.kind, tab.bundled, tab.file):
        component.change(*about, trigger_mode="always_last", **parsing)
    entry.select(*about, **parsing)
    found = tab.pick("summary", "effect", "damage", "table", "texts", "download", "attach", "measured")
    given = [tab.what, judge, Form(Plan, tab.pick(*Plan._fields)), source, mixer.form]
    starting = [tab.start.click, tab.words.submit, tab.pattern.submit]
    wire_work(tab, starting, handlers, handlers.evaluate, given, found, at_once=MAX_EVALUATIONS, shown_on=tab.summary)
    attached = {**tab.pick("error", "note", "attach"), **mixer.outputs}
    tab.attach.click(*bound(handlers.attach, [tab.measured, mixer.form], attached), **QUIET)
