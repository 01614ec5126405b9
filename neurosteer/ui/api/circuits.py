"""Circuits for programs: which neurons a next word is owed to, and how they feed one another, without state."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neurosteer.errors import UsageError
from neurosteer.progress import Progress, silent
from neurosteer.ui.api.endpoints import Endpoint, add, handed_over, working
from neurosteer.ui.explaining import (
    KEEP,
    KIND,
    LEAVE_OUT,
    LEAVE_OUT_MORE,
    PREDICTIONS,
    Question,
    attributed,
    check_question,
)
from neurosteer.ui.jobs import Handlers
from neurosteer.ui.limits import MAX_CIRCUITS

if TYPE_CHECKING:
    import threading

    from neurosteer.circuits import Prediction
    from neurosteer.models.language_model import LanguageModel

MOST_TARGETS = 100
MOST_EDGES = 1_000

_HUBS = 10


class CircuitEndpoints(Handlers):
    """What programs may ask about circuits. All raise the library's errors."""

    def attribute(
        self,
        prompt: str,
        target: str,
        counterfactual: str = "",
        neurons: int = 200,
        metric: str = "difference",
        attention: str = "full",
        keep_universal: bool = False,
        specific: bool = False,
        seed_response: str = "",
        chat: bool = False,
        model: str = "",
    ) -> dict[str, Any]:
        """Find the MLP neurons that a language model's next word is owed to (its circuit), in one pass forwards and one
        backwards, and what the model would say without them.

        Args:
            prompt: What the word follows, like "The capital of France is"; up to 8,000 characters and 256 tokens.
            target: The word in question as a token, mostly with a space before it, like " Paris". Of several tokens the
                first counts.
            counterfactual: The token it is held against, like " London"; empty for the best other one.
            neurons: How many of the strongest, each at a position of the prompt, 1 to 1,000.
            metric: difference (the target's logit minus the counterfactual's) or logit (the target's alone).
            attention: full, or frozen: as if what each token attends to were fixed.
            keep_universal: Whether to count neurons, too, that fire whatever the text is about.
            specific: Whether to leave out neurons, too, that everyday answers are owed to: steering with the circuit
                then changes other answers less.
            seed_response: How the answer begins, before the target; mostly for chats.
            chat: Whether the prompt is a user's message and the target the answer's first word; otherwise the target
                goes on in the prompt's own text.
            model: A name from `list`; empty for this server's own.

        Returns:
            "metric" (logits in favour of the target), "target", "counterfactual", "tokens" (the prompt's), "neurons"
                (lists of layer, position, neuron and score, its share in the metric, strongest first), "universal"
                (lists of layer and neuron that were left out), "predictions" and "predictions_without" (the likeliest
                next words with "text" and "probability", as the model is and with the circuit switched off),
                "artifact" (base64 text: give it to `steer` as REF, where strength -1 switches the neurons off and 1
                doubles them) and what it is: "name", "kind", "method", "model", "layers", "strength"; "warnings" (a
                list of sentences), "seconds".
        """
        universal = _universal(keep_universal, specific)
        asked = (prompt, target, counterfactual, neurons, universal, chat, metric, attention, seed_response)
        return self._answer(explain_answer, Question(*asked), model)

    def edges(
        self,
        prompt: str,
        target: str,
        counterfactual: str = "",
        neurons: int = 200,
        targets: int = 30,
        count: int = 100,
        metric: str = "difference",
        attention: str = "full",
        keep_universal: bool = False,
        specific: bool = False,
        seed_response: str = "",
        chat: bool = False,
        model: str = "",
    ) -> dict[str, Any]:
        """Find how the MLP neurons behind a language model's next word (as `attribute` finds them) feed one another.

        Args:
            prompt: As for `attribute`, like all that is not told here.
            target: The word in question as a token, like " Paris".
            counterfactual: The token it is held against; empty for the best other one.
            neurons: How many of the strongest are joined, 1 to 1,000.
            targets: Into how many of these, the strongest ones, edges are looked for, 1 to 100.
            count: How many edges to return, the strongest ones, 1 to 1,000.
            metric: difference or logit.
            attention: full or frozen.
            keep_universal: Whether to count neurons, too, that fire whatever the text is about.
            specific: Whether to leave out neurons, too, that everyday answers are owed to.
            seed_response: How the answer begins, before the target.
            chat: Whether the prompt is a user's message and the target the answer's first word.
            model: A name from `list`; empty for this server's own.

        Returns:
            "edges" (lists of source, target and weight; a neuron is a list of layer, position and neuron; the weight is
                what of the target's activation is owed to the source), strongest first, and how many there are in all:
                "n_edges"; "hubs" (the neurons with the largest sums of edges: "layer", "neuron", "n_in", "n_out",
                "weight_in", "weight_out"), "bottleneck" (lists of layer and neuron in which much meets and from which
                much goes out), "super_weights" (lists of layer and neuron whose edges are outliers), "flow" (lists of
                layer, layer and the sum of edges between them, largest first), "metric", "target", "counterfactual",
                "tokens", "warnings", "seconds".
        """
        if not 1 <= targets <= MOST_TARGETS or not 1 <= count <= MOST_EDGES:
            raise UsageError(
                f"targets is {targets} and count {count}; give 1 to {MOST_TARGETS} targets and 1 to {MOST_EDGES:,} "
                "edges."
            )
        universal = _universal(keep_universal, specific)
        asked = (prompt, target, counterfactual, neurons, universal, chat, metric, attention, seed_response)
        return self._answer(explain_wiring, Question(*asked), model, targets, count)

    def _answer(self, explain: Any, question: Question, model: str, *more: Any) -> dict[str, Any]:
        check_question(question)
        with working(self.jobs, "ask for less") as cancel:
            session = self.models.holder(model or None).wait(cancel=cancel)
            started = time.monotonic()
            found = session.run(explain, question, *more, progress=silent, cancel=cancel)
        return {**found, "seconds": round(time.monotonic() - started, 3)}


def serve_circuits(endpoints: CircuitEndpoints) -> None:
    """Add the endpoints to the page that is being laid out."""
    add(
        endpoints.models,
        Endpoint("attribute", endpoints.attribute, KIND, MAX_CIRCUITS),
        Endpoint("edges", endpoints.edges, KIND, MAX_CIRCUITS),
    )


# --- what is done where the model is ---------------------------------------------------------------------------------


def explain_answer(
    lm: "LanguageModel", question: Question, *, progress: Progress = silent, cancel: "threading.Event | None" = None
) -> dict[str, Any]:
    """The answer of `attribute`, as data. Raises as `neurosteer.circuits.attribute` does."""
    from neurosteer.circuits import Selection, sweep_multipliers

    found = attributed(lm, question, progress=progress, cancel=cancel)
    select = Selection("top_k", int(question.neurons))
    circuit = found.circuit(select=select)
    before, without = sweep_multipliers(
        lm, circuit, question.prompt, [1.0, 0.0], k=PREDICTIONS, raw=question.raw, seed_response=question.seed_response
    )
    return {
        **found.data(select),
        "tokens": list(found.tokens[0]),
        "universal": [list(pair) for pair in found.left_out],
        "predictions": _predictions(before.predictions),
        "predictions_without": _predictions(without.predictions),
        **{key: value for key, value in handed_over(circuit).items() if key in _OF_A_CIRCUIT},
        "warnings": list(found.notes),
    }


def explain_wiring(
    lm: "LanguageModel",
    question: Question,
    targets: int,
    count: int,
    *,
    progress: Progress = silent,
    cancel: "threading.Event | None" = None,
) -> dict[str, Any]:
    """The answer of `edges`, as data. Raises as `neurosteer.circuits.find_edges` does."""
    from neurosteer.circuits import Selection, find_edges

    found = attributed(lm, question, progress=progress, cancel=cancel)
    select = Selection("top_k", int(question.neurons))
    graph = find_edges(lm, found, select=select, n_targets=targets, progress=progress, cancel=cancel)
    return {
        **graph.data(count),
        "n_edges": len(graph.edges),
        "hubs": [asdict(hub) for hub in graph.hubs[:_HUBS]],
        "bottleneck": [[hub.layer, hub.neuron] for hub in graph.bottleneck],
        "super_weights": [[one.layer, one.neuron] for one in graph.super_weights],
        "flow": [[*layers, weight] for layers, weight in graph.layer_flow.items()],
        "metric": graph.metric,
        "target": graph.target.text,
        "counterfactual": graph.counterfactual.text if graph.counterfactual else None,
        "tokens": list(graph.tokens),
        "warnings": list(found.notes),
    }


_OF_A_CIRCUIT = ("artifact", "name", "kind", "method", "model", "layers", "strength")


def _predictions(found: "tuple[Prediction, ...] | list[Prediction]") -> list[dict[str, Any]]:
    return [{"text": one.text, "probability": one.probability} for one in found]


def _universal(keep_universal: bool, specific: bool) -> str:
    if specific and keep_universal:
        raise UsageError("specific leaves out neurons that keep_universal keeps; ask for one of them.")
    return KEEP if keep_universal else LEAVE_OUT_MORE if specific else LEAVE_OUT
