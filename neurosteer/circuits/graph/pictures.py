"""A circuit's graph as text, as Graphviz DOT and as a picture to explore."""

import html
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from neurosteer.circuits.graph.edges import CircuitGraph, Edge
from neurosteer.circuits.relp.scores import NeuronScore
from neurosteer.circuits.relp.weights import Neuron

EDGES_SHOWN = 60
_POSITIVE, _NEGATIVE = "#4f46e5", "#b45309"
_BAR = 24
_STRENGTHS = 4  # widths of lines in the picture


def text_diagram(graph: CircuitGraph, *, edges: int = 10) -> str:
    """Layer by layer, the last on top: its neurons as a bar, what flows in and out, its strongest neuron; then the
    strongest edges. Neurons of the bottleneck are marked with a star."""
    counts = Counter(node.layer for node in graph.nodes)
    most = max(counts.values(), default=1)
    flow = graph.layer_flow.items()
    lines = [_headline(graph), "", f"layer  {'neurons':{_BAR + 5}} flow in  flow out  strongest"]
    for layer in sorted(counts, reverse=True):
        bar = "█" * max(1, round(_BAR * counts[layer] / most))
        coming = sum(weight for (_, target), weight in flow if target == layer)
        going = sum(weight for (source, _), weight in flow if source == layer)
        strongest = next(node for node in graph.nodes if node.layer == layer)
        lines.append(
            f"{layer:5}  {f'{bar} {counts[layer]}':{_BAR + 5}} {coming:7.2f}  {going:8.2f}  "
            f"{_name(graph, strongest)} {strongest.score:+.3f}"
        )
    lines += ["", f"strongest of {len(graph.edges)} edges" if graph.edges else "no edges"]
    lines += [
        f"  {_name(graph, edge.source)} → {_name(graph, edge.target)} {edge.weight:+.3f}"
        for edge in graph.edges[:edges]
    ]
    return "\n".join(lines)


def dot(graph: CircuitGraph, *, edges: int = EDGES_SHOWN) -> str:
    """The strongest edges and their neurons in Graphviz's language: a rank for each layer, the first one lowest; lines
    as wide as they are strong, blue for positive and brown for negative weights."""
    shown = graph.edges[:edges]
    nodes = _ends(graph, shown)
    widest = abs(shown[0].weight) if shown else 1.0
    lines = ["digraph circuit {", "  rankdir=BT;", '  node [shape=box, style=rounded, fontname="sans-serif"];']
    for layer in sorted({node.layer for node in nodes}):
        here = [node for node in nodes if node.layer == layer]
        lines.append("  { rank=same;")
        for node in here:
            label = _quoted(f"L{node.layer}/N{node.neuron}\n{_token(graph, node.position)}\n{node.score:+.3f}")
            lines.append(f"    {_id(node)} [label={label}, color={_quoted(_colour(node.score))}];")
        lines.append("  }")
    for source, target, weight in shown:
        width = max(0.3, 4 * abs(weight) / widest)
        style = f"color={_quoted(_colour(weight))}, penwidth={width:.2f}, tooltip={_quoted(f'{weight:+.4f}')}"
        lines.append(f"  {_id(source)} -> {_id(target)} [{style}];")
    return "\n".join([*lines, "}", ""])


def figure(graph: CircuitGraph, *, edges: int = EDGES_SHOWN) -> Any:
    """A plotly `Figure`: tokens from left to right, layers from bottom to top, neurons as dots as large as their share
    in the metric, the strongest edges between them."""
    from plotly.graph_objects import Figure, Scatter

    shown = graph.edges[:edges]
    nodes = _ends(graph, shown) or list(graph.nodes[:edges])
    across = _across(nodes)
    traces = [
        Scatter(x=x, y=y, mode="lines", line={"color": colour, "width": width}, hoverinfo="skip", opacity=0.6)
        for colour, width, x, y in _lines(shown, across)
    ]
    largest = max((abs(node.score) for node in nodes), default=1.0) or 1.0
    traces.append(
        Scatter(
            x=[across[node[:3]] for node in nodes],
            y=[node.layer for node in nodes],
            mode="markers",
            marker={
                "size": [8 + 20 * (abs(node.score) / largest) ** 0.5 for node in nodes],
                "color": [_colour(node.score) for node in nodes],
                "line": {"width": 1, "color": "white"},
            },
            text=[_escaped(f"{_name(graph, node)}: {node.score:+.4f}") for node in nodes],
            hovertemplate="%{text}<extra></extra>",
        )
    )
    positions = sorted({node.position for node in nodes})
    return Figure(traces).update_layout(
        title={"text": _escaped(_headline(graph)), "font": {"size": 14}},
        showlegend=False,
        template="simple_white",
        xaxis={"tickvals": positions, "ticktext": [_escaped(_token(graph, one)) for one in positions]},
        yaxis={"title": {"text": "Layer"}},
        margin={"l": 50, "r": 20, "t": 50, "b": 50},
    )


def figure_html(graph: CircuitGraph, *, edges: int = EDGES_SHOWN) -> str:
    """`figure` as a page by itself that asks nobody else for anything (about 5 MB, plotly's script included)."""
    return figure(graph, edges=edges).to_html(include_plotlyjs=True, full_html=True)


# --- parts -----------------------------------------------------------------------------------------------------------


def _headline(graph: CircuitGraph) -> str:
    against = f" − {graph.counterfactual.text!r}" if graph.counterfactual else ""
    return f"{graph.target.text!r}{against} = {graph.metric:.3f} logits; {len(graph.nodes)} neurons"


def _name(graph: CircuitGraph, node: Neuron | NeuronScore) -> str:
    star = "*" if (node.layer, node.neuron) in {(hub.layer, hub.neuron) for hub in graph.bottleneck} else ""
    return f"L{node.layer}/N{node.neuron}{star} {_token(graph, node.position)}"


def _token(graph: CircuitGraph, position: int) -> str:
    return json.dumps(graph.tokens[position], ensure_ascii=False)


def _ends(graph: CircuitGraph, edges: Sequence[Edge]) -> list[NeuronScore]:
    wanted = {end for edge in edges for end in (edge.source, edge.target)}
    return [node for node in graph.nodes if Neuron(*node[:3]) in wanted]


def _across(nodes: Sequence[NeuronScore]) -> dict[tuple[int, int, int], float]:
    """Where a neuron stands from left to right: around its token, beside those of its layer there."""
    cells: dict[tuple[int, int], list[NeuronScore]] = {}
    for node in nodes:
        cells.setdefault((node.layer, node.position), []).append(node)
    places = {}
    for (_, position), members in cells.items():
        for rank, node in enumerate(sorted(members, key=lambda one: one.neuron)):
            places[node[:3]] = position + 0.8 * ((rank + 0.5) / len(members) - 0.5)
    return places


def _lines(
    edges: Sequence[Edge], across: dict[tuple[int, int, int], float]
) -> list[tuple[str, float, list[float | None], list[float | None]]]:
    """The edges by colour and width, each group one line with gaps: a trace for every edge would be slow to draw."""
    if not edges:
        return []
    widest = abs(edges[0].weight)
    groups: dict[tuple[str, float], tuple[list[float | None], list[float | None]]] = {}
    for source, target, weight in reversed(edges):
        strength = max(1, round(_STRENGTHS * abs(weight) / widest))
        x, y = groups.setdefault((_colour(weight), float(strength)), ([], []))
        x += [across[source], across[target], None]
        y += [source.layer, target.layer, None]
    return [(colour, width, x, y) for (colour, width), (x, y) in groups.items()]


def _colour(value: float) -> str:
    return _POSITIVE if value >= 0 else _NEGATIVE


def _id(node: Neuron | NeuronScore) -> str:
    return f"L{node.layer}_P{node.position}_N{node.neuron}"


def _escaped(text: str) -> str:
    """Plotly reads some tags in its texts, and shows quotes that are escaped as they are."""
    return html.escape(text, quote=False)


def _quoted(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, line ends as \\n."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
