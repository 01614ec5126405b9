"""The Circuits tab: which neurons an answer is owed to, how they feed one another, and what happens without them."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import UsageError
from neurosteer.progress import Progress, silent
from neurosteer.ui.jobs import BUSY, Jobs, problem
from neurosteer.ui.limits import MAX_CIRCUITS, MAX_PROMPT
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import MOST, MULTIPLIERS, Mix, Mixer, unchanged
from neurosteer.ui.shelf import put
from neurosteer.ui.show import circuits as shown
from neurosteer.ui.show import html as render
from neurosteer.ui.work import PROGRESS, in_words

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.models.language_model import LanguageModel

KIND = "circuits"
MOST_NEURONS = 1000
MAX_TOKENS = 256  # of a prompt
LEAVE_OUT, LEAVE_OUT_MORE, KEEP = "leave out", "leave out more", "keep"  # neurons that fire on almost any prompt
EDGE_TARGETS = 30

_PREDICTIONS = 8
_HELP = (
    "Write a prompt and the word that should come next. In one pass forth and back the model tells which of its "
    "neurons that word is owed to; then switch them off, or up, and see what it would say instead."
)
_EXAMPLES = [
    ["The capital of France is", " Paris", ""],
    ["The opposite of hot is", " cold", ""],
    ["Monday, Tuesday,", " Wednesday", ""],
]


class Question(NamedTuple):
    """What to attribute: the values of the components, in their order."""

    prompt: str
    target: str
    counterfactual: str
    neurons: float
    universal: str
    chat: bool


class Shown(NamedTuple):
    """What is on the screen: the circuit, and the prompt and framing to try it on."""

    circuit: "NeuronCircuit"
    prompt: str
    raw: bool


class CircuitHandlers:
    """What happens on the Circuits tab."""

    def __init__(self, models: Models, jobs: Jobs) -> None:
        self.models = models
        self.jobs = jobs

    def attribute(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """`[error, summary, heat map, table, edges, multiplier, predictions, shown, save]`."""
        question, mix = Question(*values[: len(Question._fields)]), Mix.of(values[len(Question._fields) :])
        cancel = self.jobs.begin(request.session_hash, KIND)
        try:
            _check(question)
            session = self.models.holder(mix.model).wait(in_words(progress), cancel)
            found = session.run(explain, question, progress=in_words(progress), cancel=cancel)
            return [
                "",
                found.summary,
                gr.update(value=found.heat, visible=True),
                gr.update(value=found.table, visible=True),
                gr.update(value=found.edges, visible=True),
                gr.update(value=0.0, visible=True),
                found.predictions,
                Shown(found.circuit, question.prompt, not question.chat),
                gr.update(visible=True),
            ]
        except Exception as error:
            return [render.error_line(problem(error)), *[gr.skip()] * 8]

    def take(self, label: str | None, *values: Any) -> list[Any]:
        """A circuit of the shelf, tried on the prompt, and on the next word if there is one: as `attribute`."""
        question, mix = Question(*values[: len(Question._fields)]), Mix.of(values[len(Question._fields) :])
        try:
            circuit: Any = mix.shelf.get(label or "")
            if circuit is None:
                return [gr.skip()] * 9
            _check_prompt(question)
            session, current = self.models.holder(mix.model).wait(), Shown(circuit, question.prompt, not question.chat)
            found = session.run(explain_circuit, circuit, question)
            return [
                "",
                found.summary,
                gr.update(value=found.heat, visible=found.heat is not None),
                gr.update(value=found.table, visible=True),
                gr.update(value=found.edges, visible=found.edges is not None),
                gr.update(value=0.0, visible=True),
                found.predictions,
                current,
                gr.update(visible=False),
            ]
        except Exception as error:
            return [render.error_line(problem(error)), *[gr.skip()] * 8]

    def move(self, current: Shown | None, multiplier: float, model: str | None) -> str:
        """What would come next with the circuit at another multiplier."""
        if current is None:
            return ""
        try:
            return self.models.holder(model).wait().run(predicted, *current, float(multiplier))
        except Exception as error:
            return render.error_line(problem(error))

    def circuits(self, *values: Any) -> Any:
        """The circuits on the shelf."""
        mix = Mix.of(values)
        labels = [label for label, artifact in mix.shelf.items() if artifact.kind == "neuron-circuit"]
        return gr.update(choices=labels, visible=bool(labels))

    def save(self, current: Shown | None, *values: Any) -> list[Any]:
        """Put the circuit on the shelf and choose it: `[summary, *mixer]`."""
        if current is None:
            return [gr.skip(), *unchanged()]
        mix = Mix.of(values)
        shelf, label = put(mix.shelf, current.circuit)
        chosen = [*mix.chosen[: MOST - 1], label]
        done = render.note_line(f"{label} is on your shelf: steer with it, download or publish it.")
        return [done, *mix.choosing(shelf, chosen).updates()]

    def stop(self, request: gr.Request) -> None:
        self.jobs.cancel(request.session_hash, KIND)

    def give_up(self) -> str:
        return render.error_line(BUSY)


class Explained(NamedTuple):
    """What is found for a question, ready to be shown."""

    circuit: "NeuronCircuit"
    summary: str
    heat: Any
    table: list[list[Any]]
    edges: Any
    predictions: str


def explain(
    lm: "LanguageModel", question: Question, *, progress: Progress = silent, cancel: threading.Event | None = None
) -> Explained:
    """The neurons that the next word is owed to. Raises as `attribute` does, `UsageError` for a long prompt."""
    from neurosteer.circuits import Selection, attribute, find_edges

    raw, select = not question.chat, Selection("top_k", int(question.neurons))
    _check_length(lm, question)
    found = attribute(
        lm,
        question.prompt,
        question.target,
        question.counterfactual or None,
        raw=raw,
        keep_universal=question.universal == KEEP,
        specific=question.universal == LEAVE_OUT_MORE,
        progress=progress,
        cancel=cancel,
    )
    circuit = found.circuit(select=select)
    edges = find_edges(lm, found, select=select, n_targets=EDGE_TARGETS, progress=progress, cancel=cancel)
    return Explained(
        circuit,
        shown.summary(found, circuit),
        shown.heat_map(found),
        shown.table(found, int(question.neurons)),
        shown.edge_picture(edges),
        predicted(lm, circuit, question.prompt, raw, 0.0),
    )


def explain_circuit(lm: "LanguageModel", circuit: "NeuronCircuit", question: Question) -> Explained:
    """What of the next word is owed to the neurons of `circuit`; without a word, only what it changes. Raises as
    `explain`."""
    from neurosteer.circuits import Selection, attribute, find_edges

    raw, heat, edges = not question.chat, None, None
    _check_length(lm, question)
    about, table = shown.about_circuit(circuit), shown.circuit_table(circuit)
    if question.target:
        word, other = question.target, question.counterfactual or None
        found = attribute(lm, question.prompt, word, other, raw=raw, keep_universal=True, within=circuit)
        rows = found.rows(Selection("top_k", int(question.neurons)))
        if rows:
            picture = find_edges(lm, found, select=Selection("top_k", len(rows)), n_targets=EDGE_TARGETS)
            heat, edges = shown.heat_map(found), shown.edge_picture(picture)
            about, table = shown.about_circuit(circuit, found), shown.table(found, len(rows))
    return Explained(circuit, about, heat, table, edges, predicted(lm, circuit, question.prompt, raw, 0.0))


def predicted(lm: "LanguageModel", circuit: "NeuronCircuit", prompt: str, raw: bool, multiplier: float) -> str:
    """The likeliest next words as the model is and with the circuit at `multiplier`, as HTML."""
    from neurosteer.circuits.checks.probing import sweep_multipliers

    before, after = sweep_multipliers(lm, circuit, prompt, [1.0, multiplier], k=_PREDICTIONS, raw=raw)
    return shown.predictions(before.predictions, after.predictions, multiplier)


def _check_prompt(question: Question) -> None:
    if not question.prompt.strip():
        raise UsageError("The prompt is empty; write at least one character.")
    if len(question.prompt) > MAX_PROMPT:
        raise UsageError(f"The prompt has {len(question.prompt):,} characters; this page takes {MAX_PROMPT:,}.")


def _check_length(lm: "LanguageModel", question: Question) -> None:
    if len(lm.prompt_ids(question.prompt, raw=not question.chat)) > MAX_TOKENS:
        raise UsageError(f"The prompt is longer than the {MAX_TOKENS} tokens that this page looks at.")


def _check(question: Question) -> None:
    _check_prompt(question)
    if not question.target:
        raise UsageError("There is no next word to look for: write one, with the space before it, like “ Paris”.")
    if not 1 <= question.neurons <= MOST_NEURONS:
        raise UsageError(f"{question.neurons:g} neurons are asked for; choose from 1 to {MOST_NEURONS}.")


@dataclass(frozen=True)
class CircuitsTab:
    """The components that handlers read and write."""

    question: tuple[Any, ...]
    start: gr.Button
    stop: gr.Button
    built: gr.Dropdown
    error: gr.HTML
    summary: gr.HTML
    heat: gr.Plot
    table: gr.Dataframe
    edges: gr.Plot
    multiplier: gr.Slider
    predictions: gr.HTML
    shown: gr.State
    save: gr.Button

    @property
    def outputs(self) -> list[Any]:
        """In the order of what `attribute` returns."""
        views = [self.error, self.summary, self.heat, self.table, self.edges, self.multiplier, self.predictions]
        return [*views, self.shown, self.save]


def lay_out() -> CircuitsTab:
    """The tab's components, within the current layout."""
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### Which neurons is a word owed to?")
            gr.HTML(render.hint(_HELP), elem_classes="ns-flush")
            question = _question_inputs()
            with gr.Row():
                start = gr.Button("Find the neurons", variant="primary", min_width=120, elem_id="attribute")
                stop = gr.Button("Stop", min_width=80, elem_id="stop-attribute")
            built = gr.Dropdown(
                [],
                label="Or try a circuit of your shelf on the prompt and word",
                visible=False,
                elem_id="built-circuit",
            )
            error = gr.HTML(elem_id="circuit-error", elem_classes="ns-flush")
        with gr.Column(min_width=320):
            gr.Markdown("### What would it say without them?")
            summary = gr.HTML(render.hint("The neurons appear here."), elem_id="circuit", elem_classes="ns-flush")
            multiplier = gr.Slider(
                *MULTIPLIERS, value=0.0, step=0.1, label="Multiplier", visible=False, elem_id="multiplier",
                info="0 switches the neurons off, 1 is the model as it is, 2 doubles them",
            )  # fmt: skip
            predictions = gr.HTML(elem_id="predictions", elem_classes="ns-flush")
            save = gr.Button("Save to my shelf", visible=False, elem_id="save-circuit")
    heat = gr.Plot(label="By layer and token", show_label=False, visible=False, elem_id="heat")
    edges = gr.Plot(label="How they feed one another", show_label=False, visible=False, elem_id="edges")
    table = gr.Dataframe(
        headers=list(shown.COLUMNS), label="The neurons, strongest first (click a heading to sort)", visible=False,
        interactive=False, max_height=360, elem_id="neurons", wrap=False,
        column_widths=["18%", "18%", "22%", "20%", "22%"],
    )  # fmt: skip
    state = gr.State(None)
    return CircuitsTab(
        question, start, stop, built, error, summary, heat, table, edges, multiplier, predictions, state, save
    )


def _question_inputs() -> tuple[Any, ...]:
    prompt = gr.Textbox(_EXAMPLES[0][0], label="Prompt", max_lines=6, max_length=MAX_PROMPT, elem_id="circuit-prompt")
    with gr.Row():
        target = gr.Textbox(_EXAMPLES[0][1], label="Next word", info="With the space before it", max_lines=1,
                            elem_id="target")  # fmt: skip
        counterfactual = gr.Textbox("", label="Rather than", info="Empty: the best other word", max_lines=1,
                                    elem_id="counterfactual")  # fmt: skip
    gr.Examples(_EXAMPLES, [prompt, target, counterfactual], label="Ideas", api_visibility="private")
    with gr.Accordion("Settings", open=False):
        neurons = gr.Slider(
            1, MOST_NEURONS, value=200, step=1, label="Neurons in the circuit", info="The strongest ones"
        )
        universal = gr.Radio(
            [("Leave them out", LEAVE_OUT), ("And those of everyday answers", LEAVE_OUT_MORE), ("Keep them", KEEP)],
            value=LEAVE_OUT,
            label="Neurons that fire on almost any prompt",
            info="Leaving out more spares other answers when the circuit is switched off",
        )
        chat = gr.Checkbox(
            False, label="As a chat", info="The prompt as a user's message, the word as the answer's first"
        )
    return prompt, target, counterfactual, neurons, universal, chat


def wire(tab: CircuitsTab, mixer: Mixer, handlers: CircuitHandlers) -> None:
    """Connect the components with the handlers."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    prompt, target, counterfactual, *_ = tab.question
    gr.on(
        [tab.start.click, prompt.submit, target.submit, counterfactual.submit],
        handlers.attribute,
        [*tab.question, *mixer.inputs],
        tab.outputs,
        show_progress_on=tab.summary,
        concurrency_id=KIND,
        concurrency_limit=MAX_CIRCUITS,
        api_visibility="private",
    ).failure(handlers.give_up, None, tab.error, queue=False, **quiet)
    tab.stop.click(handlers.stop, None, None, queue=False, **quiet)
    tab.built.input(handlers.take, [tab.built, *tab.question, *mixer.inputs], tab.outputs, **quiet)
    tab.multiplier.release(handlers.move, [tab.shown, tab.multiplier, mixer.model], tab.predictions, **quiet)
    tab.multiplier.input(
        handlers.move, [tab.shown, tab.multiplier, mixer.model], tab.predictions, trigger_mode="always_last", **quiet
    )
    tab.save.click(handlers.save, [tab.shown, *mixer.inputs], [tab.summary, *mixer.outputs], **quiet)
    mixer.shelf.change(handlers.circuits, mixer.inputs, tab.built, **quiet)
