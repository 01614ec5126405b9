"""The Build tab: examples in, artifact out."""

from typing import Any

import gradio as gr

from neurosteer.examples.files import bundled_sets
from neurosteer.ui.jobs import guarded
from neurosteer.ui.limits import MAX_BUILDS, strangers
from neurosteer.ui.mixer import Mixer
from neurosteer.ui.settings import OF_SOME_METHODS, Settings
from neurosteer.ui.show import html as render
from neurosteer.ui.source import Source
from neurosteer.ui.tabs import describe
from neurosteer.ui.tabs.build_handlers import AUTOMATIC, NOTHING_YET, BuildHandlers
from neurosteer.ui.tabs.startable import wire_work
from neurosteer.ui.wiring import Form, Parts, bound
from neurosteer.ui.work import QUIET, READING

_SOURCES = [
    ("A ready-made set", "bundled"),
    ("Upload one file", "file"),
    ("Upload two files", "files"),
    ("Paste texts", "paste"),
    ("Describe it", "described"),
]
_DATASETS = ("A data set on the Hub", "dataset")  # fetched with the owner's token, at the owner's cost
_ABOUT = {
    "sentiment": "delighted reviews against disappointed ones",
    "formality": "formal writing against casual chat",
    "gratitude": "texts that give thanks against texts that don’t",
}
_TABLE_HELP = (
    "CSV, TSV, Parquet, JSON or JSONL with the columns <code>text</code> and <code>label</code> (positive or "
    "negative), <code>positive</code> and <code>negative</code>, or <code>prompt</code>, <code>chosen</code> and "
    "<code>rejected</code>; others can be named below. A few hundred texts of each kind work best."
)
_METHOD_HELP = "How to compare what goes on inside the model on the two kinds of text. The first is a good start."


class BuildTab(Parts):
    """The components of the tab."""

    @property
    def source(self) -> "Form[Source]":
        """The examples."""
        return Form(Source, self.pick(*Source._fields))

    @property
    def settings(self) -> "Form[Settings]":
        """How to build."""
        return Form(Settings, self.pick(*Settings._fields))


def lay_out() -> BuildTab:
    """The tab's components, within the current layout."""
    tab = BuildTab()
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### 1. Examples of what you want more, or less, of")
            _lay_out_source(tab)
        with gr.Column(min_width=320):
            gr.Markdown("### What is read")
            tab.preview = gr.HTML(render.hint(NOTHING_YET["bundled"]), elem_id="preview", elem_classes="ns-flush")
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### 2. Build the slider")
            _lay_out_settings(tab)
            with gr.Row():
                tab.start = gr.Button("Build", variant="primary", min_width=90, elem_id="build")
                tab.cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel-build")
        with gr.Column(min_width=320):
            gr.Markdown("### The result")
            tab.error = gr.HTML(elem_id="build-error", elem_classes="ns-flush")
            tab.note = gr.HTML(elem_id="build-note", elem_classes="ns-flush")
            nothing = render.hint("What you build appears here.")
            tab.result = gr.HTML(nothing, elem_id="built", elem_classes="ns-flush")
            tab.plot = gr.Plot(label="Told apart, by layer", show_label=False, visible=False, elem_id="plot")
            with gr.Row():
                tab.try_it = gr.Button("Try it", variant="primary", visible=False, elem_id="try-it")
                tab.download = gr.DownloadButton("Download (.zip)", visible=False, elem_id="download-built")
    tab.features = gr.HTML(elem_id="features", elem_classes="ns-flush")
    tab.latest = gr.State("")
    return tab


def _lay_out_source(tab: BuildTab) -> None:
    offered = _SOURCES if strangers() else [*_SOURCES, _DATASETS]
    tab.kind = gr.Radio(offered, value="bundled", label="Where the examples come from")
    names = sorted(bundled_sets(), key=lambda name: (name not in _ABOUT, [*_ABOUT, name].index(name)))
    described = [(f"{name}: {_ABOUT[name]}" if name in _ABOUT else name, name) for name in names]
    with gr.Column() as tab.bundled_group:
        first = names[0] if names else None
        tab.bundled = gr.Radio(described, value=first, label="Ready-made sets", elem_classes="ns-stacked")
    with gr.Column(visible=False) as tab.file_group:
        tab.file = gr.File(label="File with both kinds of text", height=140, elem_id="file")
        gr.HTML(f"<p class='ns-faint'>{_TABLE_HELP}</p>", elem_classes="ns-flush")
    with gr.Column(visible=False) as tab.files_group, gr.Row():
        tab.positive_file = gr.File(label="Texts that show it, one a line or paragraph", height=140)
        tab.negative_file = gr.File(label="Texts that don’t, one a line or paragraph", height=140)
    with gr.Column(visible=False) as tab.dataset_group:
        tab.dataset = gr.Textbox(
            "", label="Data set", placeholder="stanfordnlp/sst2:validation", max_lines=1, max_length=300,
            info="user/name, user/name:split or hf://datasets/user/name/file.csv; then press Enter",
            elem_id="dataset",
        )  # fmt: skip
    with gr.Column(visible=False) as tab.paste_group, gr.Row():
        tab.positive_text = gr.Textbox(label="Texts that show it, one a line", lines=8, max_lines=16)
        tab.negative_text = gr.Textbox(label="Texts that don’t, one a line", lines=8, max_lines=16)
    with gr.Column(visible=False) as tab.described_group:
        describe.lay_out(tab)
    with gr.Accordion("Columns of a file", open=False):
        _lay_out_columns(tab)


def _lay_out_columns(tab: BuildTab) -> None:
    """What a file calls its columns, where their names do not say it."""
    with gr.Row():
        tab.text_column = _column("Column of texts", "text", "text-column")
        tab.label_column = _column("Column of labels", "label", "label-column")
    with gr.Row():
        tab.positive_label = _column("Label of texts that show it", "positive, 1, yes, …", "positive-label")
        tab.prompt_column = _column("Column of what they answer", "prompt or question, if there", "prompt-column")
    tab.drop_conflicts = gr.Checkbox(
        False, label="Leave out texts in both classes", info="Else such a file is refused", elem_id="drop-conflicts"
    )


def _column(label: str, placeholder: str, elem_id: str) -> gr.Textbox:
    return gr.Textbox("", label=label, placeholder=placeholder, max_lines=1, max_length=200, elem_id=elem_id)


def _lay_out_settings(tab: BuildTab) -> None:
    tab.method = gr.Radio([("caa", "caa")], value="caa", label="Method", info=_METHOD_HELP, elem_classes="ns-stacked")
    tab.name = gr.Textbox(label="Name", placeholder="chosen for you", max_lines=1, max_length=96)
    with gr.Accordion("Advanced", open=False):
        tab.layers = gr.Textbox(
            "auto", label="Layers", info="auto, all, a number (14), a range (10-18) or a list (3,7,9)", max_length=300
        )
        with gr.Row():
            tab.framing = _choice("Framing", "Read a text as it is, as a request, or as an answer")
            tab.tokens = _choice("Tokens", "The mean over a text, or its last token")
        with gr.Row():
            tab.rank = _choice("Rank", visible=False)
            tab.operation = _choice("Operation", "Scale the neurons, or shift them", visible=False)
            tab.top_k = gr.Textbox("", label="Neurons (top_k)", placeholder="automatic", visible=False)
        _lay_out_features(tab)
        tab.calibrate = gr.Checkbox(
            True,
            label="Calibrate",
            info="Strength 1 is made the same safe push everywhere, by measurement; takes some seconds",
            elem_id="calibrate",
        )
        tab.keep_half = gr.Checkbox(
            False,
            label="Keep half the examples for judging",
            info="They take no part in building, so that the Evaluate tab can train a judge on them",
            elem_id="keep-half",
        )


def _choice(label: str, info: str | None = None, visible: bool = True) -> gr.Dropdown:
    return gr.Dropdown([AUTOMATIC], value="", label=label, info=info, visible=visible)


def _lay_out_features(tab: BuildTab) -> None:
    """The settings of `sae` alone, hidden until it is chosen."""
    with gr.Row():
        tab.weight = _choice("Weight", "What a feature counts", visible=False)
        tab.sides = _choice("Sides", "Whose features are used", visible=False)
    with gr.Row():
        tab.sae = gr.Textbox(
            "", label="SAE", info="The sparse autoencoder that knows the features: release/id, or a folder",
            placeholder="the model’s own", max_lines=1, max_length=300, visible=False, elem_id="sae",
        )  # fmt: skip
        tab.min_output_score = gr.Textbox(
            "", label="Least output score (min_output_score)", placeholder="none", max_lines=1, visible=False,
            info="Leaves out features that hardly move what is written; takes longer",
        )  # fmt: skip
    tab.contexts = gr.Checkbox(
        True,
        label="Quote the texts",
        info="Shows where each feature fires in them; the quotes are in the download too",
        visible=False,
    )


def wire(tab: BuildTab, mixer: Mixer, tabs: gr.Tabs, page: gr.Blocks, handlers: BuildHandlers) -> None:
    """Connect the components with the handlers."""
    describe.wire(tab, mixer.model, describe.DescribeHandlers(handlers.models, handlers.jobs))
    from_library = tab.pick("method", "framing", "tokens", "operation", "weight", "sides")
    groups = tab.pick(*(f"{kind}_group" for kind in NOTHING_YET))
    result = tab.pick("result", "features", "plot", "download", "try_it", "latest")
    preview = bound(guarded(handlers.preview), [tab.source], tab.preview)
    parsing: dict[str, Any] = {**QUIET, "concurrency_limit": READING, "concurrency_id": "preview"}
    page.load(*bound(guarded(handlers.choices), [], from_library), **QUIET)
    page.load(*preview, **parsing)
    tab.kind.change(*bound(handlers.show_source, [tab.kind], groups), queue=False, **QUIET)
    for name, component in tab.source.parts.items():
        if name != "dataset":
            component.change(*preview, trigger_mode="always_last", **parsing)
    gr.on([tab.dataset.submit, tab.dataset.blur], *preview, trigger_mode="always_last", **parsing)  # not at every key
    own = tab.pick(*OF_SOME_METHODS)
    tab.method.change(*bound(guarded(handlers.show_parameters), [tab.method], own), **QUIET)
    given = [tab.source, tab.settings, mixer.form, tab.describing.told]
    starting = [tab.start.click, tab.name.submit, tab.layers.submit]
    outputs = {**result, **mixer.outputs}
    wire_work(tab, starting, handlers, handlers.build, given, outputs, at_once=MAX_BUILDS, shown_on=tab.result)
    tried = {"tabs": tabs, **mixer.outputs}
    tab.try_it.click(*bound(guarded(handlers.try_it), [tab.latest, mixer.form], tried), **QUIET)
