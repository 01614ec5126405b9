"""What a next word is owed to, as the Circuits tab and the endpoints ask for it, and the work that finds it."""

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosteer.errors import UsageError
from neurosteer.progress import Progress, silent
from neurosteer.ui.limits import MAX_PROMPT
from neurosteer.ui.mixer import MULTIPLIERS
from neurosteer.ui.show import circuits as show_circuits

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.circuits import Attribution
    from neurosteer.circuits.checks.probing import SweepPoint
    from neurosteer.models.language_model import LanguageModel

KIND = "circuits"
MOST_NEURONS = 1000
MAX_TOKENS = 256  # of a prompt
LEAVE_OUT, LEAVE_OUT_MORE, KEEP = "leave out", "leave out more", "keep"  # neurons that fire on almost any prompt
EDGE_TARGETS = 30
PREDICTIONS = 8
MULTIPLIER_STEP = 0.1


class Question(NamedTuple):
    """What to attribute."""

    prompt: str
    target: str
    counterfactual: str = ""
    neurons: float = 200
    universal: str = LEAVE_OUT
    chat: bool = False
    metric: str = "difference"
    attention: str = "full"
    seed_response: str = ""

    @property
    def raw(self) -> bool:
        return not self.chat


class Explained(NamedTuple):
    """What is found for a question, ready to be shown. `sweep` tells what comes next at each multiplier."""

    circuit: "NeuronCircuit"
    summary: str
    heat: Any
    table: list[list[Any]]
    edges: Any
    sweep: "tuple[SweepPoint, ...]"


def check_prompt(question: Question) -> None:
    """Raise `UsageError` for a prompt that is empty, and for any text that is too long."""
    if not question.prompt.strip():
        raise UsageError("The prompt is empty; write at least one character.")
    if len(question.prompt) > MAX_PROMPT:
        raise UsageError(f"The prompt has {len(question.prompt):,} characters; this page takes {MAX_PROMPT:,}.")
    for what, text in (
        ("next word", question.target),
        ("word it is held against", question.counterfactual),
        ("answer's beginning", question.seed_response),
    ):
        if len(text) > MAX_PROMPT:
            raise UsageError(f"The {what} has {len(text):,} characters; this page takes {MAX_PROMPT:,}.")


def check_question(question: Question) -> None:
    """Raise `UsageError` for what the page does not look for."""
    check_prompt(question)
    if not question.target:
        raise UsageError("The next word is empty: write one, with the space before it, like “ Paris”.")
    if not 1 <= question.neurons <= MOST_NEURONS:
        raise UsageError(f"neurons is {question.neurons:g}; choose from 1 to {MOST_NEURONS:,} of them.")


def attributed(
    lm: "LanguageModel",
    question: Question,
    *,
    within: "NeuronCircuit | None" = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> "Attribution":
    """What the word is owed to; with `within`, of the neurons of that circuit alone. Raises as
    `neurosteer.circuits.attribute` does, `UsageError` for a long prompt."""
    from neurosteer.circuits import attribute

    check_length(lm, question)
    given: dict[str, Any] = {"metric": question.metric, "attention": question.attention}
    return attribute(
        lm,
        question.prompt,
        question.target,
        question.counterfactual or None,
        raw=question.raw,
        seed_response=question.seed_response,
        keep_universal=question.universal == KEEP or within is not None,
        specific=question.universal == LEAVE_OUT_MORE and within is None,
        within=within,
        progress=progress,
        cancel=cancel,
        **given,
    )


def check_length(lm: "LanguageModel", question: Question) -> None:
    """Raise `UsageError` for a prompt of too many tokens."""
    ids = lm.prompt_ids(question.prompt, raw=question.raw, seed_response=question.seed_response)
    if len(ids) > MAX_TOKENS:
        raise UsageError(f"The prompt is longer than the {MAX_TOKENS} tokens that are looked at; shorten it.")


def explain(
    lm: "LanguageModel", question: Question, *, progress: Progress = silent, cancel: threading.Event | None = None
) -> Explained:
    """The neurons that the next word is owed to. Raises as `attributed` does."""
    from neurosteer.circuits import Selection, find_edges

    select = Selection("top_k", int(question.neurons))
    found = attributed(lm, question, progress=progress, cancel=cancel)
    circuit = found.circuit(select=select)
    edges = find_edges(lm, found, select=select, n_targets=EDGE_TARGETS, progress=progress, cancel=cancel)
    return Explained(
        circuit,
        show_circuits.summary(found, circuit),
        show_circuits.heat_map(found),
        show_circuits.table(found, int(question.neurons)),
        show_circuits.edge_picture(edges),
        swept(lm, circuit, question),
    )


def explain_circuit(
    lm: "LanguageModel",
    circuit: "NeuronCircuit",
    question: Question,
    *,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Explained:
    """What of the next word is owed to the neurons of `circuit`; without a word, only what it changes. Raises as
    `explain`."""
    from neurosteer.circuits import Selection, find_edges

    heat, edges = None, None
    check_length(lm, question)
    about, table = show_circuits.about_circuit(circuit), show_circuits.circuit_table(circuit)
    if question.target:
        found = attributed(lm, question, within=circuit, progress=progress, cancel=cancel)
        rows = found.rows(Selection("top_k", int(question.neurons)))
        if rows:
            select = Selection("top_k", len(rows))
            graph = find_edges(lm, found, select=select, n_targets=EDGE_TARGETS, progress=progress, cancel=cancel)
            heat, edges = show_circuits.heat_map(found), show_circuits.edge_picture(graph)
            about, table = show_circuits.about_circuit(circuit, found), show_circuits.table(found, len(rows))
    return Explained(circuit, about, heat, table, edges, swept(lm, circuit, question))


def swept(lm: "LanguageModel", circuit: "NeuronCircuit", question: Question) -> "tuple[SweepPoint, ...]":
    """What would come next at every multiplier that the slider can stand at, in one call: sliding costs none."""
    from neurosteer.circuits.checks.probing import sweep_multipliers

    least, most = MULTIPLIERS
    count = round((most - least) / MULTIPLIER_STEP)
    multipliers = [round(least + MULTIPLIER_STEP * number, 6) for number in range(count + 1)]
    return tuple(sweep_multipliers(lm, circuit, question.prompt, multipliers, k=PREDICTIONS, raw=question.raw))


def predicted(sweep: "tuple[SweepPoint, ...]", multiplier: float) -> str:
    """The likeliest next words as the model is and with the circuit at `multiplier` (the nearest there is), as HTML."""
    before, after = (
        min(sweep, key=lambda point: abs(point.multiplier - wanted)) for wanted in (1.0, float(multiplier))
    )
    return show_circuits.predictions(before.predictions, after.predictions, after.multiplier)
