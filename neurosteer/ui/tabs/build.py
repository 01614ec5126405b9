"""The Build tab: examples in, artifact out."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import Cancelled, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import bundled_sets
from neurosteer.progress import Progress
from neurosteer.ui.jobs import BUSY, Jobs, guarded, problem
from neurosteer.ui.limits import MAX_BUILDS, strangers
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import Mix, Mixer, unchanged
from neurosteer.ui.shelf import put, zip_file
from neurosteer.ui.show import html as render
from neurosteer.ui.show.layer_figure import layer_figure

if TYPE_CHECKING:
    from neurosteer.models.language_model import LanguageModel
from neurosteer.ui.source import Source, read_source
from neurosteer.ui.work import KIND, PROGRESS, in_words

HELD_FOR_JUDGING = 0.5

_SOURCES = [
    ("A ready-made set", "bundled"),
    ("Upload one file", "file"),
    ("Upload two text files", "files"),
    ("Paste texts", "paste"),
]
_ABOUT = {
    "sentiment": "delighted reviews against disappointed ones",
    "formality": "formal writing against casual chat",
    "gratitude": "texts that give thanks against texts that don’t",
}
_NOTHING_YET = {
    "bundled": "Pick a set to see what is in it.",
    "file": "Choose a file to see what is read from it.",
    "files": "Choose both files to see what is read from them.",
    "paste": "Fill both boxes to see what is read from them.",
}
_TABLE_HELP = (
    "CSV, TSV, JSON or JSONL with the columns <code>text</code> and <code>label</code> (positive or negative), "
    "or <code>positive</code> and <code>negative</code>. A few hundred texts of each kind work best."
)
_METHOD_HELP = "How to compare what goes on inside the model on the two kinds of text. The first is a good start."
_AUTOMATIC = ("automatic", "")
_OWN = ("rank", "operation", "top_k", "weight", "sides", "sae", "min_output_score", "contexts")
"""Parameters that only some methods have, in the order of their components."""
_IN_WORDS = {
    ("rank", "difference"): "how much more active",
    ("rank", "dprime"): "how clearly it tells them apart",
    ("rank", "write"): "how much it pushes that way",
    ("rank", "rate"): "how much more often it fires",
    ("rank", "probe"): "what a classifier relies on",
    ("weight", "difference"): "how much more active",
    ("weight", "target"): "how active on its own side",
    ("sides", "positive"): "features of texts that show it",
    ("sides", "both"): "and of texts that don’t, turned down",
}


class Settings(NamedTuple):
    """How to build: the values of the settings components, in their order. Empty means automatic."""

    name: str = ""
    method: str = "caa"
    layers: str = "auto"
    framing: str = ""
    tokens: str = ""
    rank: str = ""
    operation: str = ""
    top_k: str = ""
    weight: str = ""
    sides: str = ""
    sae: str = ""
    min_output_score: str = ""
    contexts: bool = True
    calibrate: bool = True
    keep_half: bool = False


def build_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `build`: what was left automatic, and what the method does not take, is left out."""
    from neurosteer.methods import find_method

    takes = find_method(settings.method).defaults
    own = {
        **{name: getattr(settings, name) for name in ("rank", "operation", "weight", "sides")},
        "sae": settings.sae.strip(),
        "top_k": _number(settings.top_k),
        "min_output_score": _number(settings.min_output_score),
        "contexts": "" if settings.contexts else 0,
    }
    options = {name: value for name, value in own.items() if name in takes}
    options |= {"name": settings.name.strip(), "framing": settings.framing, "tokens": settings.tokens}
    options = {name: value for name, value in options.items() if value != ""}
    always = {"calibrate": settings.calibrate, "hold_out": HELD_FOR_JUDGING if settings.keep_half else 0.0}
    return {"method": settings.method, "layers": settings.layers.strip() or "auto", **always, **options}


def _number(text: str) -> float | str:
    """What stands in a field for a number; what is none is left for the library to refuse."""
    try:
        number = float(text)
    except ValueError:
        return text.strip()
    return int(number) if number.is_integer() else number


def check_sae(named: str, lm: "LanguageModel") -> None:
    """On a Space, only SAEs that fit the model: others are fetched whole, gigabytes at times, before they are refused.

    Raises `UsageError` naming those there are.
    """
    from neurosteer.saes.offers import EMBEDDED, embedded_saes, released_for

    known = (EMBEDDED, *released_for(lm))
    if not strangers() or any(f"{named}/".startswith(f"{name}/") for name in known):
        return
    offered = [*(f"{EMBEDDED}/{layer}" for layer in embedded_saes(lm)), *(f"{name}/…" for name in released_for(lm))]
    raise UsageError(
        f"The SAE {named[:100]!r} is not offered on this page; for {lm.name} there are: "
        f"{', '.join(offered) or 'none'}. Run NeuroSteer on a machine of your own to use any other."
    )


def _options_of(name: str, values: Iterable[str]) -> list[tuple[str, str]]:
    """The choices of a dropdown for the parameter `name`, in words where there are some."""
    said = [(f"{value}: {_IN_WORDS[name, value]}" if (name, value) in _IN_WORDS else value, value) for value in values]
    return [_AUTOMATIC, *said]


class BuildHandlers:
    """What happens on the Build tab."""

    def __init__(self, models: Models, jobs: Jobs) -> None:
        self.models = models
        self.jobs = jobs

    def choices(self) -> list[Any]:
        """The methods and the options of Advanced, from the library; it is not imported before the page is up."""
        self.models.holder().wait_for_libraries()
        from neurosteer.artifacts.circuit import CIRCUIT_OPERATIONS
        from neurosteer.methods import METHODS
        from neurosteer.methods.sae import SIDES, WEIGHTS
        from neurosteer.models.language_model import FRAMINGS
        from neurosteer.reading.request import TOKENS

        methods = [(f"{method.name}: {method.explanation}", method.name) for method in METHODS.values()]
        options = {
            "framing": FRAMINGS,
            "tokens": TOKENS,
            "operation": CIRCUIT_OPERATIONS,
            "weight": WEIGHTS,
            "sides": SIDES,
        }
        lists = [_options_of(name, values) for name, values in options.items()]
        return [gr.update(choices=choices) for choices in (methods, *lists)]

    def show_source(self, kind: str) -> list[Any]:
        """Which of the four groups of inputs is visible."""
        return [gr.update(visible=value == kind) for _, value in _SOURCES]

    def show_parameters(self, method: str) -> list[Any]:
        """Those of `_OWN` that the method takes; rank and top_k begin anew, because they mean something else."""
        self.models.holder().wait_for_libraries()
        from neurosteer.methods import cna, find_method, sae

        takes = find_method(method).defaults
        counted, share = ("Features", "A count") if method == "sae" else ("Neurons", "A count, or a share below 1")
        ranks = {"cna": cna.RANKS, "sae": sae.RANKS}.get(method, ())
        changes: dict[str, dict[str, Any]] = {
            "rank": {
                "choices": _options_of("rank", ranks),
                "value": "",
                "info": f"What makes a {counted.lower()[:-1]} matter",
            },
            "top_k": {"label": f"{counted} (top_k)", "info": share, "value": ""},
        }
        return [gr.update(visible=name in takes, **changes.get(name, {})) for name in _OWN]

    def preview(self, request: gr.Request, *values: Any) -> str:
        """What is read from the source as it stands."""
        source = Source(*values)
        self.jobs.keep(request.session_hash, source.file, source.positive_file, source.negative_file)
        try:
            examples = read_source(source)
        except Exception as error:
            return render.error_line(problem(error))
        return render.hint(_NOTHING_YET[source.kind]) if examples is None else render.examples_read(examples)

    def begin(self, request: gr.Request) -> list[Any]:
        """At once, before the work has its turn: Cancel works from here on."""
        self.jobs.begin(request.session_hash, KIND)
        return [gr.update(interactive=False), gr.update(interactive=True), "", ""]

    def give_up(self) -> list[Any]:
        """When the server could not even begin: the buttons as they were."""
        return [gr.update(interactive=True), gr.update(interactive=False), render.error_line(BUSY), ""]

    def cancel(self, request: gr.Request) -> None:
        self.jobs.cancel(request.session_hash, KIND)

    def build(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Build, and put the result on the visitor's shelf. Whatever goes wrong becomes one line, inputs stay."""
        n_source, n_settings = len(Source._fields), len(Settings._fields)
        source, settings = Source(*values[:n_source]), Settings(*values[n_source:][:n_settings])
        mix = Mix.of(values[n_source + n_settings :])
        buttons = [gr.update(interactive=True), gr.update(interactive=False)]
        try:
            examples = read_source(source)
            if examples is None:
                raise UsageError(f"There are no examples yet. {_NOTHING_YET[source.kind]}")
            report = in_words(progress)
            cancel = self.jobs.current(request.session_hash, KIND)
            artifact, seconds = self.make(examples, settings, report, cancel, mix.model)
            shelf, label = put(mix.shelf, artifact)
            self.jobs.keep(request.session_hash, zip_file(artifact))
            shown = Built(artifact, label, seconds, examples)
            mixed = mix.choosing(shelf, mix.chosen or [label]).updates()
            return [*buttons, "", "", *shown.updates(), label, *mixed]
        except Cancelled:
            stopped = render.note_line("Cancelled: nothing was built, what you entered is still here.")
            return [*buttons, "", stopped, *[gr.skip()] * 6, *unchanged()]
        except Exception as error:
            return [*buttons, render.error_line(problem(error)), "", *[gr.skip()] * 6, *unchanged()]

    def make(
        self,
        examples: ContrastSet,
        settings: Settings,
        progress: Progress,
        cancel: threading.Event,
        model: str | None = None,
    ) -> tuple[Any, float]:
        """The artifact, once the model is there, and the seconds that building took. Raises the library's errors."""
        session = self.models.holder(model).wait(progress, cancel)
        from neurosteer.building.build import build

        options = build_options(settings)
        if "sae" in options:
            check_sae(options["sae"], session.lm)
        started = time.monotonic()
        artifact = session.run(build, examples, progress=progress, cancel=cancel, **options)
        return artifact, time.monotonic() - started

    def try_it(self, label: str, *values: Any) -> list[Any]:
        """To the Steer tab, with the newest artifact alone."""
        mix = Mix.of(values)
        return [gr.update(selected="steer"), *mix.choosing(mix.shelf, [label]).updates()]


class Built(NamedTuple):
    """A result to show."""

    artifact: Any
    label: str
    seconds: float
    examples: ContrastSet

    def updates(self) -> list[Any]:
        """For the result's sentence, features, plot, and two buttons."""
        source = self.artifact.provenance
        figure = layer_figure(source.separation, self.artifact.layers, source.candidates)
        return [
            render.built(self.artifact, self.label, self.seconds, self.examples),
            render.made_of(self.artifact),
            gr.update(value=figure, visible=figure is not None),
            gr.update(value=zip_file(self.artifact), visible=True),
            gr.update(visible=True),
        ]


@dataclass(frozen=True)
class BuildTab:
    """The components that handlers read and write."""

    kind: gr.Radio
    groups: tuple[gr.Column, ...]
    source: tuple[Any, ...]
    preview: gr.HTML
    settings: tuple[Any, ...]
    start: gr.Button
    cancel: gr.Button
    error: gr.HTML
    note: gr.HTML
    result: gr.HTML
    features: gr.HTML
    plot: gr.Plot
    download: gr.DownloadButton
    try_it: gr.Button
    latest: gr.State


def lay_out() -> BuildTab:
    """The tab's components, within the current layout."""
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### 1. Examples of what you want more, or less, of")
            kind, groups, source = _source_inputs()
        with gr.Column(min_width=320):
            gr.Markdown("### What is read")
            preview = gr.HTML(render.hint(_NOTHING_YET["bundled"]), elem_id="preview", elem_classes="ns-flush")
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### 2. Build the slider")
            settings = _settings_inputs()
            with gr.Row():
                start = gr.Button("Build", variant="primary", min_width=90, elem_id="build")
                cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel-build")
        with gr.Column(min_width=320):
            gr.Markdown("### The result")
            error = gr.HTML(elem_id="build-error", elem_classes="ns-flush")
            note = gr.HTML(elem_id="build-note", elem_classes="ns-flush")
            result = gr.HTML(render.hint("What you build appears here."), elem_id="built", elem_classes="ns-flush")
            plot = gr.Plot(label="Told apart, by layer", show_label=False, visible=False, elem_id="plot")
            with gr.Row():
                try_it = gr.Button("Try it", variant="primary", visible=False, elem_id="try-it")
                download = gr.DownloadButton("Download (.zip)", visible=False, elem_id="download-built")
    features = gr.HTML(elem_id="features", elem_classes="ns-flush")
    latest = gr.State("")
    return BuildTab(
        kind, groups, source, preview, settings, start, cancel, error, note, result, features, plot, download, try_it,
        latest,
    )  # fmt: skip


def _source_inputs() -> tuple[gr.Radio, tuple[gr.Column, ...], tuple[Any, ...]]:
    kind = gr.Radio(_SOURCES, value="bundled", label="Where the examples come from")
    names = sorted(bundled_sets(), key=lambda name: (name not in _ABOUT, [*_ABOUT, name].index(name)))
    described = [(f"{name}: {_ABOUT[name]}" if name in _ABOUT else name, name) for name in names]
    with gr.Column() as bundled_group:
        first = names[0] if names else None
        bundled = gr.Radio(described, value=first, label="Ready-made sets", elem_classes="ns-stacked")
    with gr.Column(visible=False) as file_group:
        file = gr.File(label="File with both kinds of text", height=140, elem_id="file")
        gr.HTML(f"<p class='ns-faint'>{_TABLE_HELP}</p>", elem_classes="ns-flush")
    with gr.Column(visible=False) as files_group, gr.Row():
        positive_file = gr.File(label="Texts that show it, one a line", height=140)
        negative_file = gr.File(label="Texts that don’t, one a line", height=140)
    with gr.Column(visible=False) as paste_group, gr.Row():
        positive = gr.Textbox(label="Texts that show it, one a line", lines=8, max_lines=16)
        negative = gr.Textbox(label="Texts that don’t, one a line", lines=8, max_lines=16)
    source = (kind, bundled, file, positive_file, negative_file, positive, negative)
    return kind, (bundled_group, file_group, files_group, paste_group), source


def _settings_inputs() -> tuple[Any, ...]:
    method = gr.Radio([("caa", "caa")], value="caa", label="Method", info=_METHOD_HELP, elem_classes="ns-stacked")
    name = gr.Textbox(label="Name", placeholder="chosen for you", max_lines=1, max_length=96)
    with gr.Accordion("Advanced", open=False):
        layers = gr.Textbox("auto", label="Layers", info="auto, all, a number (14), a range (10-18) or a list (3,7,9)")
        with gr.Row():
            framing = gr.Dropdown(
                [_AUTOMATIC], value="", label="Framing", info="Read a text as it is, as a request, or as an answer"
            )
            tokens = gr.Dropdown([_AUTOMATIC], value="", label="Tokens", info="The mean over a text, or its last token")
        with gr.Row():
            rank = gr.Dropdown([_AUTOMATIC], value="", label="Rank", visible=False)
            operation = gr.Dropdown(
                [_AUTOMATIC], value="", label="Operation", info="Scale the neurons, or shift them", visible=False
            )
            top_k = gr.Textbox("", label="Neurons (top_k)", placeholder="automatic", visible=False)
        own = (rank, operation, top_k, *_feature_inputs(), *_measuring_inputs())
    return name, method, layers, framing, tokens, *own


def _measuring_inputs() -> tuple[Any, ...]:
    calibrate = gr.Checkbox(
        True,
        label="Calibrate",
        info="Strength 1 is made the same safe push everywhere, by measurement; takes some seconds",
        elem_id="calibrate",
    )
    keep_half = gr.Checkbox(
        False,
        label="Keep half the examples for judging",
        info="They take no part in building, so that the Evaluate tab can train a judge on them",
        elem_id="keep-half",
    )
    return calibrate, keep_half


def _feature_inputs() -> tuple[Any, ...]:
    """The settings of `sae` alone, hidden until it is chosen."""
    with gr.Row():
        weight = gr.Dropdown([_AUTOMATIC], value="", label="Weight", info="What a feature counts", visible=False)
        sides = gr.Dropdown([_AUTOMATIC], value="", label="Sides", info="Whose features are used", visible=False)
    with gr.Row():
        sae = gr.Textbox(
            "",
            label="SAE",
            info="The sparse autoencoder that knows the features: release/id, or a folder",
            placeholder="the model’s own",
            max_lines=1,
            visible=False,
            elem_id="sae",
        )
        least = gr.Textbox(
            "",
            label="Least output score (min_output_score)",
            info="Leaves out features that hardly move what is written; takes longer",
            placeholder="none",
            max_lines=1,
            visible=False,
        )
    contexts = gr.Checkbox(
        True,
        label="Quote the texts",
        info="Shows where each feature fires in them; the quotes are in the download too",
        visible=False,
    )
    return weight, sides, sae, least, contexts


def wire(tab: BuildTab, mixer: Mixer, tabs: gr.Tabs, page: gr.Blocks, handlers: BuildHandlers) -> None:
    """Connect the components with the handlers."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    name, method, layers, framing, tokens, *own = tab.settings
    _rank, operation, _top_k, weight, sides, *_ = own = own[: len(_OWN)]
    page.load(guarded(handlers.choices), None, [method, framing, tokens, operation, weight, sides], **quiet)
    page.load(guarded(handlers.preview), list(tab.source), tab.preview, **quiet)
    tab.kind.change(handlers.show_source, tab.kind, list(tab.groups), queue=False, **quiet)
    for component in tab.source:
        component.change(guarded(handlers.preview), list(tab.source), tab.preview, trigger_mode="always_last", **quiet)
    method.change(guarded(handlers.show_parameters), method, own, **quiet)

    buttons = [tab.start, tab.cancel, tab.error, tab.note]
    result = [*buttons, tab.result, tab.features, tab.plot, tab.download, tab.try_it, tab.latest]
    gr.on([tab.start.click, name.submit, layers.submit], handlers.begin, None, buttons, queue=False, **quiet).then(
        handlers.build,
        [*tab.source, *tab.settings, *mixer.inputs],
        [*result, *mixer.outputs],
        show_progress_on=tab.result,
        concurrency_id=KIND,
        concurrency_limit=MAX_BUILDS,
        api_visibility="private",
    ).failure(handlers.give_up, None, buttons, queue=False, **quiet)
    tab.cancel.click(handlers.cancel, None, None, queue=False, **quiet)
    tab.try_it.click(guarded(handlers.try_it), [tab.latest, *mixer.inputs], [tabs, *mixer.outputs], **quiet)
