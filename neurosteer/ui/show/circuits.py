"""What the Circuits tab shows, as pure functions. Tokens are data: all of it is escaped."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from neurosteer.ui.show.html import signed, what_it_is
from neurosteer.ui.show.theme import AGAINST_TO_TOWARDS, AXIS, ON_ANY_PAGE

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.circuits import Attribution, CircuitGraph
    from neurosteer.circuits.checks.probing import Prediction

COLUMNS = ("Layer", "Position", "Token", "Neuron", "Score")

_MOST_TICKS = 48


def visible(token: str) -> str:
    """A token in printable characters, its space as a mark."""
    shown = "".join(
        "·" if char == " " else "↵" if char == "\n" else char if char.isprintable() else "�" for char in token
    )
    return shown or "∅"


def summary(found: "Attribution", circuit: "NeuronCircuit") -> str:
    """What was asked, what the metric is, how many neurons."""
    one = found.prompts[0]
    against = f" rather than {_quoted(one.counterfactual.text)}" if one.counterfactual else ""
    part = " It is the first token of what you wrote." if one.target.is_part else ""
    count = len(found.left_out)
    left_out = f" {count:,} that fire on almost any prompt are left out." if count else ""
    return (
        f"<div class='ns-card'><p>{_quoted(one.target.text)}{against}: {signed(round(one.metric, 2))} logits in favour."
        f"{part}</p><p class='ns-faint'>The {circuit.size:,} strongest neurons ({circuit.share:.2%} of all) in "
        f"{len(circuit.layers)} layers are the circuit.{left_out}</p></div>"
    )


def about_circuit(circuit: "NeuronCircuit", found: "Attribution | None" = None) -> str:
    """A circuit of the shelf, in a sentence; `found`, within the circuit, adds what of a word is owed to it."""
    what = f"{what_it_is(circuit)}, made with {circuit.method}."
    owed = ""
    if found is not None:
        one = found.prompts[0]
        against = f" rather than {_quoted(one.counterfactual.text)}" if one.counterfactual else ""
        share = signed(round(float(one.by_token.sum()), 2))
        owed = (
            f"<p>{_quoted(one.target.text)}{against}: {signed(round(one.metric, 2))} logits in favour, of which its "
            f"neurons give {share}.</p>"
        )
    return f"<div class='ns-card'><p><b>{escape(circuit.name)}</b>: {escape(what)}</p>{owed}</div>"


def table(found: "Attribution", count: int) -> list[list[Any]]:
    """The strongest neurons, a row each, under `COLUMNS`."""
    from neurosteer.circuits import Selection

    tokens = found.tokens[0]
    rows = found.rows(Selection("top_k", count))
    return [[row.layer, row.position, visible(tokens[row.position]), row.neuron, round(row.score, 3)] for row in rows]


def circuit_table(circuit: "NeuronCircuit") -> list[list[Any]]:
    """The neurons of a circuit that belongs to no prompt."""
    order = circuit.scores.abs().argsort(descending=True).tolist()
    layers, neurons, scores = circuit.neuron_layers.tolist(), circuit.neurons.tolist(), circuit.scores.tolist()
    return [[layers[place], "", "", neurons[place], round(scores[place], 3)] for place in order]


def heat_map(found: "Attribution") -> Any:
    """A plotly figure of the scores added up by layer and token."""
    import plotly.graph_objects as go

    values, tokens = found.prompts[0].by_token, [visible(token) for token in found.tokens[0]]
    most = float(values.abs().max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values.tolist(), zmin=-most, zmax=most, colorscale=AGAINST_TO_TOWARDS,
            colorbar={"title": "logits", "thickness": 12},
            hovertemplate="layer %{y}, token %{x}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    step = max(1, len(tokens) // _MOST_TICKS)
    places = list(range(0, len(tokens), step))
    ticks = {"tickvals": places, "ticktext": [escape(tokens[place][:16]) for place in places]}
    title = "What a layer’s neurons add at a token<br>(blue: towards the word, orange: against it)"
    figure.update_layout(
        **ON_ANY_PAGE, height=420, margin={"l": 52, "r": 16, "t": 50, "b": 80},
        title={"text": title, "font": {"size": 13}},
        xaxis={**AXIS, **ticks, "title": "token", "showgrid": False},
        yaxis={**AXIS, "title": "layer", "tickformat": "d", "showgrid": False},
    )  # fmt: skip
    return figure


def edge_picture(graph: "CircuitGraph") -> Any:
    """`figure` in the page's colours."""
    from neurosteer.circuits import figure

    title = "How the neurons feed one another<br>(blue: they push each other up, orange: down)"
    lines = {"linecolor": AXIS["gridcolor"], "tickcolor": AXIS["gridcolor"]}
    return figure(graph).update_layout(
        **ON_ANY_PAGE, height=460, title={"text": title, "font": {"size": 13}},
        margin={"l": 52, "r": 16, "t": 50, "b": 80}, xaxis={**AXIS, **lines, "title": "token"},
        yaxis={**AXIS, **lines, "title": "layer", "tickformat": "d"},
    )  # fmt: skip


def predictions(before: "Sequence[Prediction]", after: "Sequence[Prediction]", multiplier: float) -> str:
    """The likeliest next words, as the model is and with the circuit at `multiplier`."""
    columns = _column("The model as it is", before) + _column(f"The circuit × {multiplier:g}", after)
    return f"<div class='ns-card'><div class='ns-samples ns-predictions'>{columns}</div></div>"


def _column(title: str, found: "Sequence[Prediction]") -> str:
    items = "".join(
        f"<li><bdi class='ns-word'>{escape(visible(one.text))}</bdi> {one.probability:.1%}"
        f"<span class='ns-bar ns-up' style='--share:{one.probability:.0%}' aria-hidden='true'></span></li>"
        for one in found
    )
    return f"<div><h4>{escape(title)}</h4><ol>{items}</ol></div>"


def _quoted(token: str) -> str:
    return f"<bdi class='ns-word'>{escape(visible(token))}</bdi>"
