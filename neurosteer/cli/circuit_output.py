"""How circuits, attributions and their figures are printed, in the verbs and in the shell."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosteer.cli.output import err, new_table, out, print_table
from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.circuits import Attribution, CircuitGraph, Faithfulness, Selection
    from neurosteer.circuits.checks.probing import SweepPoint
    from neurosteer.models.language_model import LanguageModel

SHOWN = 20
_TOKENS = 24


def rows_of(circuit: "NeuronCircuit") -> list[list[Any]]:
    """A circuit's neurons as [layer, neuron, score]."""
    columns = (circuit.neuron_layers.tolist(), circuit.neurons.tolist(), circuit.scores.tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def print_neurons(circuit: "NeuronCircuit", heading: str = "Score", count: int = SHOWN) -> None:
    """The circuit's first neurons as a table."""
    table = new_table(("Neuron", heading), right=(heading,))
    for layer, neuron, score in rows_of(circuit)[:count]:
        table.add_row(f"L{layer}/N{neuron}", f"{score:+.4f}")
    print_table(table)


def print_multipliers(points: "Sequence[SweepPoint]", targets: Sequence[str]) -> None:
    """What comes next with a circuit at several multipliers: the targets' probabilities, and the likeliest tokens."""
    headings = ("Multiplier", *map(repr, targets), "Likeliest")
    table = new_table(headings, right=headings[:-1])
    for point in points:
        likeliest = ", ".join(f"{one.text!r} {one.probability:.3f}" for one in point.predictions)
        table.add_row(f"{point.multiplier:g}", *(f"{one.probability:.4f}" for one in point.asked), likeliest)
    print_table(table)


def print_effect(
    lm: "LanguageModel",
    text: str,
    circuit: "NeuronCircuit",
    multiplier: float,
    targets: Sequence[str],
    *,
    raw: bool,
    progress: Progress,
) -> None:
    """What comes next after `text`, and what is written, without steering and with the circuit at `multiplier`."""
    from neurosteer.artifacts.recipes import UNSTEERED
    from neurosteer.circuits import at_multiplier, next_token_probs, top_predictions
    from neurosteer.steering.decoding import Sampling
    from neurosteer.steering.session import Row, Session

    both = (UNSTEERED, at_multiplier(circuit, multiplier))
    out.print(f"{circuit.name}: {circuit.size} neuron{'s' if circuit.size > 1 else ''} × {multiplier:g}")
    before, after = (top_predictions(lm, text, one, 5, raw=raw) for one in both)
    table = new_table(("Before", "Probability", "After", "Probability"), right=("Probability",))
    for one, other in zip(before, after, strict=True):
        table.add_row(repr(one.text), f"{one.probability:.4f}", repr(other.text), f"{other.probability:.4f}")
    print_table(table)
    if targets:
        was, is_now = (next_token_probs(lm, text, targets, one, raw=raw) for one in both)
        out.print("; ".join(f"{token!r}: {was[token]:.4f} before, {is_now[token]:.4f} after" for token in targets))
    sampling, rows = Sampling(greedy=True), [Row(text, recipe) for recipe in both]
    written = Session(lm).generate(rows, max_new_tokens=_TOKENS, sampling=sampling, raw=raw, progress=progress)
    for label, row in zip(("before", "after "), written, strict=True):
        out.print(f"{label}: {row.text}")


def print_faithfulness(result: "Faithfulness") -> None:
    """The sweep as a table, and its areas."""
    headings = ("Percent", "Neurons", "Faithfulness", "Random", "Completeness", "Random")
    table = new_table(headings, right=headings)
    for row in result.rows:
        by_chance = (row.random_faithfulness, row.random_completeness)
        drawn = ["–" if value is None else f"{value:.3f}" for value in by_chance]
        pair = (f"{row.faithfulness:.3f}", drawn[0], f"{row.completeness:.3f}", drawn[1])
        table.add_row(f"{row.percent:g}", str(row.neurons), *pair)
    print_table(table)
    chance = "" if result.random_area is None else f"; of random neurons of the same layers {result.random_area:.3f}"
    out.print(
        f"Metric: {result.full:+.4f} with all neurons, {result.empty:+.4f} with all ablated. "
        f"Area under faithfulness {result.area:.3f}{chance}."
    )
    if result.same_prompts:
        out.print("The neurons were ranked on the prompts they are measured on; on others they keep less.")


def faithfulness_data(result: "Faithfulness") -> dict[str, Any]:
    """The sweep for JSON, with what random neurons do where they were drawn."""
    data = result.data()
    if result.draws:
        data["area"], data["random_area"] = result.area, result.random_area
        for row, source in zip(data["rows"], result.rows, strict=True):
            row["random_faithfulness"] = source.random_faithfulness
            row["random_completeness"] = source.random_completeness
    return data


def note_parts(found: "Attribution") -> None:
    """A line on stderr for every target of which only the first token counts."""
    for note in found.notes:
        err.print(f"Note: {note}")


def print_attribution(found: "Attribution", select: "Selection | None", prompt: int) -> None:
    """The neurons that one prompt's answer is owed to, position by position."""
    from neurosteer.circuits import Selection

    one, tokens = found.prompts[prompt], found.tokens[prompt]
    rows = found.rows(select or Selection(), prompt=prompt)
    against = f" against {one.counterfactual.text!r}" if one.counterfactual else ""
    out.print(f"{one.target.text!r}{against}: metric {one.metric:+.4f}; {len(rows)} neurons at a position, strongest:")
    table = new_table(("Neuron", "Position", "Token", "Score"), right=("Position", "Score"))
    for layer, position, neuron, score in rows[:SHOWN]:
        table.add_row(f"L{layer}/N{neuron}", str(position), repr(tokens[position]), f"{score:+.4f}")
    print_table(table)


def print_left_out(found: "Attribution") -> None:
    """How many neurons are left out, and which of them are super weights."""
    if not found.left_out or found.universal is None:
        return
    loud = ", ".join(f"L{layer}/N{neuron}" for layer, neuron in found.universal.super_weights)
    named = f", among them the super weights {loud}" if loud else ""
    out.print(f"{len(found.left_out)} universal neurons are left out{named}; --keep-universal counts them.")


def write_graph(graph: "CircuitGraph", folder: Path) -> tuple[Path, ...]:
    """Write the graph as JSON, for Graphviz and as a page; the files. Raises `UsageError`."""
    import json

    from neurosteer.artifacts.files import write_files
    from neurosteer.circuits import dot, figure_html

    data = json.dumps(graph.data(), ensure_ascii=False)
    return write_files(folder, {"edges.json": data, "edges.dot": dot(graph), "edges.html": figure_html(graph)})
