"""How the neurons of a circuit feed one another, and what that says about them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurosteer.circuits.relp.attribution import Attribution
from neurosteer.circuits.relp.choices import NextToken
from neurosteer.circuits.relp.linearised import Attention
from neurosteer.circuits.relp.scores import NeuronScore
from neurosteer.circuits.relp.selection import Selection
from neurosteer.circuits.relp.weights import Neuron, SuperWeight, edge_weights, super_weights
from neurosteer.errors import UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.validation import check_count

N_TARGETS = 30
BOTTLENECK_SHARE = 0.2


class Edge(NamedTuple):
    """d(target) / d(source) × source: what of the target's activation is owed to the source."""

    source: Neuron
    target: Neuron
    weight: float


@dataclass(frozen=True)
class HubNeuron:
    """A neuron, over all positions, with the number of its edges in the graph and the sums of their |weight|."""

    layer: int
    neuron: int
    n_in: int
    n_out: int
    weight_in: float
    weight_out: float

    @property
    def weight(self) -> float:
        return self.weight_in + self.weight_out


@dataclass(frozen=True, eq=False)
class CircuitGraph:
    """The neurons of one prompt's circuit, strongest first, and the edges between them, strongest first.

    `tokens` are the prompt's tokens as text; a neuron's score is its share in the metric (`metric`).
    """

    tokens: tuple[str, ...]
    target: NextToken
    counterfactual: NextToken | None
    metric: float
    nodes: tuple[NeuronScore, ...]
    edges: tuple[Edge, ...]

    def edges_from(self, layer: int, neuron: int) -> tuple[Edge, ...]:
        """The edges out of a neuron, at whatever position, strongest first."""
        return tuple(edge for edge in self.edges if (edge.source.layer, edge.source.neuron) == (layer, neuron))

    def edges_to(self, layer: int, neuron: int) -> tuple[Edge, ...]:
        """The edges into a neuron, at whatever position, strongest first."""
        return tuple(edge for edge in self.edges if (edge.target.layer, edge.target.neuron) == (layer, neuron))

    @cached_property
    def hubs(self) -> tuple[HubNeuron, ...]:
        """Every neuron that has edges, the one with the largest sum of |weight| first."""
        found: dict[tuple[int, int], list[float]] = {}
        for edge in self.edges:
            size = abs(edge.weight)
            for end, place in ((edge.target, 0), (edge.source, 1)):
                sums = found.setdefault((end.layer, end.neuron), [0, 0, 0.0, 0.0])
                sums[place] += 1
                sums[place + 2] += size
        hubs = (HubNeuron(*key, int(sums[0]), int(sums[1]), sums[2], sums[3]) for key, sums in found.items())
        return tuple(sorted(hubs, key=lambda hub: (-hub.weight, hub.layer, hub.neuron)))

    @cached_property
    def bottleneck(self) -> tuple[HubNeuron, ...]:
        """The waist of the hourglass: neurons in which many edges meet and from which many go out.

        Those whose sums of |weight|, in and out, are both at least a fifth of the largest of any neuron; the one whose
        smaller sum is largest first.
        """
        most_in = max((hub.weight_in for hub in self.hubs), default=0.0)
        most_out = max((hub.weight_out for hub in self.hubs), default=0.0)
        waist = (
            hub
            for hub in self.hubs
            if hub.n_in
            and hub.n_out
            and hub.weight_in >= BOTTLENECK_SHARE * most_in
            and hub.weight_out >= BOTTLENECK_SHARE * most_out
        )
        return tuple(sorted(waist, key=lambda hub: -min(hub.weight_in, hub.weight_out)))

    @cached_property
    def layer_flow(self) -> dict[tuple[int, int], float]:
        """The sum of |weight| from one layer to another, the largest first."""
        sums: dict[tuple[int, int], float] = {}
        for edge in self.edges:
            layers = (edge.source.layer, edge.target.layer)
            sums[layers] = sums.get(layers, 0.0) + abs(edge.weight)
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @cached_property
    def super_weights(self) -> tuple[SuperWeight, ...]:
        """The neurons whose edges are outliers in this graph, strongest first."""
        sources = sorted({edge.source for edge in self.edges})
        targets = sorted({edge.target for edge in self.edges})
        weights = torch.zeros(len(targets), len(sources))
        rows, columns = {one: at for at, one in enumerate(targets)}, {one: at for at, one in enumerate(sources)}
        for edge in self.edges:
            weights[rows[edge.target], columns[edge.source]] = edge.weight
        return super_weights(weights, sources)

    def without(self, neurons: Sequence[tuple[int, int]]) -> "CircuitGraph":
        """The graph without these (layer, neuron) and their edges, as for `super_weights`."""
        gone = set(neurons)
        return CircuitGraph(
            self.tokens,
            self.target,
            self.counterfactual,
            self.metric,
            tuple(node for node in self.nodes if (node.layer, node.neuron) not in gone),
            tuple(
                edge
                for edge in self.edges
                if not gone & {(edge.source.layer, edge.source.neuron), (edge.target.layer, edge.target.neuron)}
            ),
        )

    def data(self, count: int | None = None) -> dict[str, Any]:
        """The `count` strongest edges, or all, as JSON-ready data."""
        return {
            "edges": [[list(edge.source), list(edge.target), edge.weight] for edge in self.edges[:count]],
        }


def find_edges(
    lm: LanguageModel,
    attribution: Attribution,
    *,
    prompt: int = 0,
    select: Selection | None = None,
    n_targets: int = N_TARGETS,
    attention: Attention | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> CircuitGraph:
    """The edges into the `n_targets` strongest neurons of one prompt's circuit from all its other neurons.

    Args:
        prompt: which of the attribution's prompts.
        select: the circuit's neurons by position; by default the 200 strongest. Universal neurons are left out as in
            `attribution`.
        attention: as in `attribute`; by default what the attribution was made with.

    Raises:
        UsageError: a prompt the attribution does not have, `n_targets` below 1, or nothing selected.
        MismatchError: the attribution is of another model.
        Cancelled: `cancel` was set.
    """
    if not 0 <= prompt < len(attribution.prompts):
        raise UsageError(f"prompt is {prompt!r:.40}; the attribution has prompts 0 to {len(attribution.prompts) - 1}.")
    check_count("n_targets", n_targets, 1, 1_000_000)
    attribution.check_model(lm)
    nodes = attribution.rows(select or Selection(), prompt=prompt)
    if not nodes:
        raise UsageError("The circuit has no neurons to find edges between; select more.")
    one = attribution.prompts[prompt]
    places = [Neuron(*node[:3]) for node in nodes]
    chosen: Attention = attention or attribution.parameters.get("attention", "full")
    weights = edge_weights(lm, one.choice.ids, places, places[:n_targets], chosen, progress=progress, cancel=cancel)
    return CircuitGraph(
        tokens=attribution.tokens[prompt],
        target=one.target,
        counterfactual=one.counterfactual,
        metric=one.metric,
        nodes=tuple(nodes),
        edges=_edges(weights, places),
    )


def _edges(weights: Tensor, places: Sequence[Neuron]) -> tuple[Edge, ...]:
    """The edges that are not 0, strongest first; targets are the first of `places`."""
    flat = weights.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[: int(flat.count_nonzero())].tolist()
    values = flat.tolist()
    return tuple(Edge(places[at % len(places)], places[at // len(places)], values[at]) for at in order)
