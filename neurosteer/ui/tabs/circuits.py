"""The Circuits tab: which neurons an answer is owed to, how they feed one another, and what happens without them."""

from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.ui.explaining import (
    KEEP,
    KIND,
    LEAVE_OUT,
    LEAVE_OUT_MORE,
    MOST_NEURONS,
    MULTIPLIER_STEP,
    Explained,
    Question,
    check_prompt,
    check_question,
    explain,
    explain_circuit,
    predicted,
)
from neurosteer.ui.jobs import BUSY, told
from neurosteer.ui.limits import MAX_CIRCUITS, MAX_PROMPT
from neurosteer.ui.mixer import MULTIPLIERS, Mix, Mixer
from neurosteer.ui.shelf import put
from neurosteer.ui.show import html as render
from neurosteer.ui.show.circuits import COLUMNS
from neurosteer.ui.tabs.startable import Startable
from neurosteer.ui.wiring import Form, Parts, Updates, bound
from neurosteer.ui.work import QUIET, at_most, in_words

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.circuits.checks.probing import SweepPoint

_HELP = (
    "Write a prompt and the word that should come next. In one pass forth and back the model tells which of its "
    "neurons that word is owed to; then switch them off, or up, and see what it would say instead."
)
_EXAMPLES = [
    ["The capital of France is", " Paris", ""],
    ["The opposite of hot is", " cold", ""],
    ["Monday, Tuesday,", " Wednesday", ""],
]
_FIELDS = ("prompt", "target", "counterfactual", "neurons", "universal", "chat")


class OnScreen(NamedTuple):
    """What is on the screen: the circuit, and what would come next at each multiplier."""

    circuit: "NeuronCircuit"
    sweep: "tuple[SweepPoint, ...]"


class CircuitHandlers(Startable):
    """What happens on the Circuits tab."""

    kind = KIND

    def attribute(self, request: gr.Request, progress: gr.Progress, question: Question, mix: Mix) -> Updates:
        """The neurons that the word is owed to."""
        return self._explained(request, progress, mix, check_question, explain, question)

    def take(
        self, request: gr.Request, progress: gr.Progress, label: str | None, question: Question, mix: Mix
    ) -> Updates:
        """A circuit of the shelf, tried on the prompt, and on the next word if there is one."""
        circuit = mix.shelf.get(label or "")
        if circuit is None:
            return {}
        found = self._explained(request, progress, mix, check_prompt, explain_circuit, question, circuit)
        return {**found, "save": gr.update(visible=False)} if found["error"] == "" else found

    @told("error")
    def _explained(
        self, request: gr.Request, progress: gr.Progress, mix: Mix, check: Any, work: Any, asked: Question, *more: Any
    ) -> Updates:
        cancel, report = self.jobs.begin(request.session_hash, KIND), in_words(progress)
        check(asked)
        with at_most(cancel, "ask for fewer neurons, or about a shorter prompt"):
            session = self.models.holder(mix.model).wait(report, cancel)
            found = session.run(work, *more, asked, progress=report, cancel=cancel)
        return {"error": "", **_shown(found)}

    def move(self, current: OnScreen | None, multiplier: float) -> str:
        """What would come next with the circuit at another multiplier."""
        return "" if current is None else predicted(current.sweep, multiplier)

    def circuits(self, mix: Mix) -> Any:
        """The circuits on the shelf."""
        labels = [label for label, artifact in mix.shelf.items() if artifact.kind == "neuron-circuit"]
        return gr.update(choices=labels, visible=bool(labels))

    @told("error")
    def save(self, current: OnScreen | None, mix: Mix) -> Updates:
        """Put the circuit on the shelf and choose it."""
        if current is None:
            return {}
        shelf, label = put(mix.shelf, current.circuit)
        done = render.note_line(f"{label} is on your shelf: steer with it, download or publish it.")
        return {"summary": done, **mix.adding(shelf, label).updates()}


def _shown(found: Explained) -> Updates:
    return {
        "summary": found.summary,
        "heat": gr.update(value=found.heat, visible=found.heat is not None),
        "table": gr.update(value=found.table, visible=True),
        "edges": gr.update(value=found.edges, visible=found.edges is not None),
        "multiplier": gr.update(value=0.0, visible=True),
        "predictions": predicted(found.sweep, 0.0),
        "current": OnScreen(found.circuit, found.sweep),
        "save": gr.update(visible=True),
    }


def lay_out() -> Parts:
    """The tab's components, within the current layout."""
    tab = Parts(current=gr.State(None))
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### Which neurons is a word owed to?")
            gr.HTML(render.hint(_HELP), elem_classes="ns-flush")
            _lay_out_question(tab)
            with gr.Row():
                tab.start = gr.Button("Find the neurons", variant="primary", min_width=120, elem_id="attribute")
                tab.stop = gr.Button("Stop", min_width=80, elem_id="stop-attribute")
            said = "Or try a circuit of your shelf on the prompt and word"
            tab.built = gr.Dropdown([], label=said, visible=False, elem_id="built-circuit")
            tab.error = gr.HTML(elem_id="circuit-error", elem_classes="ns-flush")
        with gr.Column(min_width=320):
            gr.Markdown("### What would it say without them?")
            nothing = render.hint("The neurons appear here.")
            tab.summary = gr.HTML(nothing, elem_id="circuit", elem_classes="ns-flush")
            tab.multiplier = gr.Slider(
                *MULTIPLIERS, value=0.0, step=MULTIPLIER_STEP, label="Multiplier", visible=False, elem_id="multiplier",
                info="0 switches the neurons off, 1 is the model as it is, 2 doubles them",
            )  # fmt: skip
            tab.predictions = gr.HTML(elem_id="predictions", elem_classes="ns-flush")
            tab.save = gr.Button("Save to my shelf", visible=False, elem_id="save-circuit")
    tab.heat = gr.Plot(label="By layer and token", show_label=False, visible=False, elem_id="heat")
    tab.edges = gr.Plot(label="How they feed one another", show_label=False, visible=False, elem_id="edges")
    tab.table = gr.Dataframe(
        headers=list(COLUMNS), label="The neurons, strongest first (click a heading to sort)", visible=False,
        interactive=False, max_height=360, elem_id="neurons", wrap=False,
        column_widths=["18%", "18%", "22%", "20%", "22%"],
    )  # fmt: skip
    return tab


def _lay_out_question(tab: Parts) -> None:
    prompt, target, _ = _EXAMPLES[0]
    tab.prompt = gr.Textbox(prompt, label="Prompt", max_lines=6, max_length=MAX_PROMPT, elem_id="circuit-prompt")
    with gr.Row():
        tab.target = gr.Textbox(
            target, label="Next word", info="With the space before it", max_lines=1, elem_id="target"
        )
        tab.counterfactual = gr.Textbox(
            "", label="Rather than", info="Empty: the best other word", max_lines=1, elem_id="counterfactual"
        )
    written = [tab.prompt, tab.target, tab.counterfactual]
    gr.Examples(_EXAMPLES, written, label="Ideas", api_visibility="private")
    with gr.Accordion("Settings", open=False):
        tab.neurons = gr.Slider(
            1, MOST_NEURONS, value=200, step=1, label="Neurons in the circuit", info="The strongest ones"
        )
        tab.universal = gr.Radio(
            [("Leave them out", LEAVE_OUT), ("And those of everyday answers", LEAVE_OUT_MORE), ("Keep them", KEEP)],
            value=LEAVE_OUT,
            label="Neurons that fire on almost any prompt",
            info="Leaving out more spares other answers when the circuit is switched off",
        )
        tab.chat = gr.Checkbox(
            False, label="As a chat", info="The prompt as a user's message, the word as the answer's first"
        )


def wire(tab: Parts, mixer: Mixer, handlers: CircuitHandlers) -> None:
    """Connect the components with the handlers."""
    given = [Form(Question, tab.pick(*_FIELDS)), mixer.form]
    views = ("summary", "heat", "table", "edges", "multiplier", "predictions", "current", "save")
    outputs = tab.pick("error", *views)
    working: dict[str, Any] = {
        "show_progress_on": tab.summary, "concurrency_id": KIND, "concurrency_limit": MAX_CIRCUITS,
        "api_visibility": "private",
    }  # fmt: skip
    give_up = bound(lambda: render.error_line(BUSY), [], tab.error)
    starting = [tab.start.click, tab.prompt.submit, tab.target.submit, tab.counterfactual.submit]
    asked = gr.on(starting, *bound(handlers.attribute, given, outputs), **working)
    taken = tab.built.input(*bound(handlers.take, [tab.built, *given], outputs), **working)
    for event in (asked, taken):
        event.failure(*give_up, queue=False, **QUIET)
    tab.stop.click(*bound(handlers.stop), queue=False, **QUIET)
    moved = bound(handlers.move, [tab.current, tab.multiplier], tab.predictions)
    tab.multiplier.release(*moved, queue=False, **QUIET)
    tab.multiplier.input(*moved, trigger_mode="always_last", queue=False, **QUIET)
    saved = {**tab.pick("summary", "error"), **mixer.outputs}
    tab.save.click(*bound(handlers.save, [tab.current, mixer.form], saved), **QUIET)
    mixer.shelf.change(*bound(handlers.circuits, [mixer.form], tab.built), **QUIET)
