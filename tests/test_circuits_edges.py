"""Edges by definition; what a graph tells; its pictures."""

import json
import re
import threading
import warnings

import pytest
import torch
from checks import refused
from naive_circuits import naive_pass
from test_circuits_linearised import some_ids
from tiny import D_MLP, N_LAYERS, Tiny, hook_count, make_tiny
from torch import Tensor

from neurosteer.circuits import (
    Attribution,
    CircuitGraph,
    Edge,
    Neuron,
    NeuronScore,
    NextToken,
    Selection,
    attribute,
    dot,
    edge_weights,
    figure,
    figure_html,
    find_edges,
    linear_pass,
    text_diagram,
)
from neurosteer.circuits.relp.linearised import ATTENTIONS, Attention
from neurosteer.circuits.relp.weights import _taken_by_row, _taken_together, super_weights
from neurosteer.errors import Cancelled, MismatchError, UsageError

PROMPT, TARGET = "we never thank the dog, always the bright river", " again"


def some_neurons(count: int, seed: int, length: int) -> list[Neuron]:
    generator = torch.Generator().manual_seed(seed)
    highs = (N_LAYERS, length, D_MLP)
    columns = [torch.randint(0, high, (count,), generator=generator).tolist() for high in highs]
    return [Neuron(*row) for row in zip(*columns, strict=True)]


def naive_weights(this: Tiny, ids: list[int], sources: list[Neuron], targets: list[Neuron], frozen: bool) -> Tensor:
    """One fresh pass forth and back for each target."""
    weights = torch.zeros(len(targets), len(sources), dtype=torch.float64)
    for row, target in enumerate(targets):
        naive = naive_pass(this, ids, frozen=frozen)
        value = naive.neurons[target.layer][target.position, target.neuron]
        below = naive.neurons[: target.layer]
        gradients = torch.autograd.grad(value, below) if below else []
        for column, source in enumerate(sources):
            if source.layer < target.layer:
                slope = gradients[source.layer][source.position, source.neuron]
                weights[row, column] = slope * below[source.layer][source.position, source.neuron].detach()
    return weights


@pytest.fixture(scope="module")
def found() -> tuple[Tiny, Attribution]:
    this = make_tiny("llama")
    return this, attribute(this.lm, PROMPT, TARGET, raw=True, keep_universal=True)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_edges_are_slope_times_source_as_one_fresh_pass_for_each_target_finds(each: Tiny, attention: Attention) -> None:
    ids = some_ids(1, 11)
    sources, targets = some_neurons(40, 2, len(ids)), some_neurons(12, 3, len(ids))
    ours = edge_weights(each.lm, ids, sources, targets, attention)
    theirs = naive_weights(each, ids, sources, targets, attention == "frozen")
    assert float(theirs.abs().max()) > 0
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    for row, target in enumerate(targets):
        for column, source in enumerate(sources):
            if source.layer >= target.layer or source.position > target.position:
                assert ours[row, column] == 0


def test_gradients_taken_together_and_row_by_row_are_the_same(each: Tiny) -> None:
    """Together is how it goes on a CPU, with one forward pass; row by row elsewhere."""
    ids = some_ids(4, 11)
    targets = [target for target in some_neurons(12, 5, len(ids)) if target.layer == N_LAYERS - 1]
    layers = list(range(N_LAYERS - 1))
    assert len(targets) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = _taken_together(linear_pass(each.lm, [ids]), targets, layers)
    by_row = _taken_by_row(linear_pass(each.lm, [ids] * len(targets)), targets, layers)
    for one, other in zip(together, by_row, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_targets_that_do_not_fit_together_are_taken_in_parts(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(6, 11)
    sources, targets = some_neurons(40, 7, len(ids)), some_neurons(12, 8, len(ids))
    whole = edge_weights(llama.lm, ids, sources, targets)
    monkeypatch.setattr("neurosteer.circuits.relp.weights._GRADIENT_BYTES", 5 * N_LAYERS * D_MLP * len(ids) * 4)
    told: list[float | None] = []
    parts = edge_weights(llama.lm, ids, sources, targets, progress=lambda message, fraction=None: told.append(fraction))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    reached = sum(target.layer > 0 for target in targets)
    assert reached > 5 and told == pytest.approx([5 / reached, 1.0])


def test_super_weights_are_sources_far_above_the_median() -> None:
    sources = [Neuron(0, 1 + place % 2, place // 2) for place in range(20)]  # ten neurons at two positions each
    generator = torch.Generator().manual_seed(0)
    weights = 1 + torch.rand(6, 20, generator=generator)
    weights[:, 4] *= -30  # neuron 2, at one position of two
    weights[4:, 10] *= 1000  # neuron 5 has two edges only
    weights[:4, 10] = 0
    weights[:, 11] = 0
    (outlier,) = super_weights(weights, sources)
    assert (outlier.layer, outlier.neuron, outlier.n_targets) == (0, 2, 12)
    means = [float(weights[:, [2 * at, 2 * at + 1]].abs().mean()) for at in range(10) if at != 5]
    assert outlier.weight == pytest.approx(means[2])
    assert outlier.ratio == pytest.approx(means[2] / sorted(means)[4])
    assert super_weights(weights, sources, ratio=100.0) == ()
    assert {one.neuron for one in super_weights(weights, sources, min_targets=2)} == {2, 5}


# --- the graph -------------------------------------------------------------------------------------------------------


def test_a_prompt_s_graph_joins_its_strongest_neurons(found: tuple[Tiny, Attribution]) -> None:
    this, attribution = found
    graph = find_edges(this.lm, attribution, select=Selection("top_k", 60), n_targets=8)
    assert list(graph.nodes) == attribution.rows(Selection("top_k", 60))
    places = [Neuron(*node[:3]) for node in graph.nodes]
    ids = list(attribution.prompts[0].choice.ids)
    theirs = naive_weights(this, ids, places, places[:8], frozen=False)
    assert len(graph.edges) == int(theirs.count_nonzero())
    for edge in graph.edges:
        wanted = float(theirs[places.index(edge.target), places.index(edge.source)])
        assert edge.weight == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    sizes = [abs(edge.weight) for edge in graph.edges]
    assert sizes == sorted(sizes, reverse=True)
    assert graph.metric == attribution.prompts[0].metric and graph.target.given == TARGET


def test_the_graph_uses_the_attribution_s_kind_of_attention_unless_told(found: tuple[Tiny, Attribution]) -> None:
    this, _ = found
    frozen = attribute(this.lm, PROMPT, TARGET, raw=True, keep_universal=True, attention="frozen")
    one, other = find_edges(this.lm, frozen), find_edges(this.lm, frozen, attention="full")
    places = [Neuron(*node[:3]) for node in one.nodes]
    theirs = naive_weights(this, list(frozen.prompts[0].choice.ids), places, places[:30], frozen=True)
    assert float(sum(edge.weight for edge in one.edges)) == pytest.approx(float(theirs.sum()), rel=1e-3)
    assert one.edges[0].weight != pytest.approx(other.edges[0].weight, rel=1e-3)


A, B, C, D = Neuron(0, 1, 5), Neuron(1, 1, 6), Neuron(1, 2, 6), Neuron(3, 2, 9)
EDGES = (Edge(A, B, -4.0), Edge(B, D, 3.0), Edge(A, D, 2.0), Edge(C, D, -1.0))


def graph_of(edges: tuple[Edge, ...] = EDGES, tokens: tuple[str, ...] = ("we", " sing", " it")) -> CircuitGraph:
    ends = {end: None for edge in edges for end in (edge.source, edge.target)}
    nodes = tuple(NeuronScore(*end, score=1.0 / (1 + place)) for place, end in enumerate(ends))
    return CircuitGraph(tokens, NextToken(7, " again", " again"), NextToken(8, " never"), 1.5, nodes, edges)


def test_hubs_add_up_a_neuron_s_edges_over_its_positions() -> None:
    hubs = {(hub.layer, hub.neuron): hub for hub in graph_of().hubs}
    assert [(hub.layer, hub.neuron) for hub in graph_of().hubs] == [(1, 6), (0, 5), (3, 9)]
    middle = hubs[1, 6]
    assert (middle.n_in, middle.n_out, middle.weight_in, middle.weight_out) == (1, 2, 4.0, 4.0)
    assert (hubs[0, 5].n_in, hubs[0, 5].n_out, hubs[0, 5].weight) == (0, 2, 6.0)
    assert (hubs[3, 9].n_in, hubs[3, 9].n_out, hubs[3, 9].weight_in) == (3, 0, 6.0)


def test_the_bottleneck_is_where_much_meets_and_much_goes_out() -> None:
    assert [(hub.layer, hub.neuron) for hub in graph_of().bottleneck] == [(1, 6)]
    weak = graph_of((Edge(A, D, 9.0), Edge(A, B, 1.0), Edge(B, D, 1.0)))
    assert weak.bottleneck == ()  # a tenth of the largest sums is not much


def test_flow_adds_up_what_goes_from_layer_to_layer() -> None:
    assert list(graph_of().layer_flow.items()) == [((0, 1), 4.0), ((1, 3), 4.0), ((0, 3), 2.0)]


def test_edges_from_and_to_a_neuron() -> None:
    assert graph_of().edges_from(1, 6) == (EDGES[1], EDGES[3])
    assert graph_of().edges_to(3, 9) == (EDGES[1], EDGES[2], EDGES[3])
    assert graph_of().edges_to(0, 5) == ()


def test_a_graph_without_its_outliers_has_none_of_their_edges() -> None:
    weights = [Edge(Neuron(0, 1, at), Neuron(2, 1, to), 1.0 + at) for at in range(4) for to in range(6)]
    loud = [Edge(Neuron(1, 1, 9), Neuron(2, 1, to), 99.0) for to in range(6)]
    graph = graph_of((*loud, *weights))
    assert [(one.layer, one.neuron) for one in graph.super_weights] == [(1, 9)]
    rest = graph.without([(one.layer, one.neuron) for one in graph.super_weights])
    assert set(rest.edges) == set(weights)
    assert len(rest.nodes) == len(graph.nodes) - 1
    assert len(graph.edges) == 30  # the graph itself stays as it is


def test_the_data_are_json_of_the_strongest_edges() -> None:
    assert json.loads(json.dumps(graph_of().data(2))) == {
        "edges": [[[0, 1, 5], [1, 1, 6], -4.0], [[1, 1, 6], [3, 2, 9], 3.0]]
    }
    assert len(graph_of().data()["edges"]) == 4


# --- pictures --------------------------------------------------------------------------------------------------------

HOSTILE = ("we", ' <b>"sing"</b>', "</script><script>alert(1)</script>\\N")


def test_the_text_diagram_names_layers_flows_and_edges() -> None:
    text = text_diagram(graph_of(), edges=2)
    lines = text.splitlines()
    assert lines[0] == "' again' − ' never' = 1.500 logits; 4 neurons"
    by_layer = {int(line.split()[0]): line for line in lines if re.match(r"\s+\d", line)}
    assert list(by_layer) == [3, 1, 0]
    assert "█ 2 " in by_layer[1] and "4.00      4.00" in by_layer[1] and 'L1/N6* " sing"' in by_layer[1]
    assert lines[-2:] == ['  L0/N5 " sing" → L1/N6* " sing" -4.000', '  L1/N6* " sing" → L3/N9 " it" +3.000']


def test_dot_draws_every_edge_once_and_quotes_what_tokens_hold() -> None:
    text = dot(graph_of(tokens=HOSTILE))
    assert text.startswith("digraph circuit {") and text.endswith("}\n")
    assert re.findall(r"(L\S+) -> (L\S+) ", text) == [
        ("L0_P1_N5", "L1_P1_N6"),
        ("L1_P1_N6", "L3_P2_N9"),
        ("L0_P1_N5", "L3_P2_N9"),
        ("L1_P2_N6", "L3_P2_N9"),
    ]
    for line in text.splitlines():  # outside of quoted strings there is nothing but the language itself
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
        assert re.fullmatch(r"[\w\s{}\[\]=,;.>-]*", bare), line
    assert len(re.findall(" -> ", dot(graph_of(), edges=1))) == 1


def test_the_picture_shows_neurons_and_edges_and_runs_no_text_of_the_prompt() -> None:
    graph = graph_of(tokens=HOSTILE)
    drawn = figure(graph)
    *lines, dots = drawn.data
    assert sum(len([x for x in line.x if x is None]) for line in lines) == 4
    assert len(dots.x) == 4 and sorted(dots.y) == [0, 1, 1, 3]
    assert "&lt;b&gt;" in "".join(drawn.layout.xaxis.ticktext)
    page = figure_html(graph)
    assert "alert(1)" in page and "<script>alert(1)" not in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"?http", page)


def test_a_graph_without_edges_can_be_shown() -> None:
    bare = CircuitGraph(("we", " sing"), NextToken(7, " again"), None, 0.5, (NeuronScore(0, 1, 3, 0.5),), ())
    assert "no edges" in text_diagram(bare)
    assert "->" not in dot(bare)
    assert len(figure(bare).data[-1].x) == 1
    assert (bare.hubs, bare.bottleneck, bare.super_weights, bare.layer_flow) == ((), (), (), {})


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_is_wrong(found: tuple[Tiny, Attribution], llama: Tiny) -> None:
    this, attribution = found
    refused(lambda: find_edges(this.lm, attribution, prompt=1), UsageError, "prompt is 1", "0 to 0")
    refused(lambda: find_edges(this.lm, attribution, n_targets=0), UsageError, "n_targets is 0")
    refused(lambda: find_edges(this.lm, attribution, select=Selection("percent", 1e6)), UsageError, "no neurons")
    refused(lambda: find_edges(this.lm, attribution, attention="none"), UsageError, "'none'")  # type: ignore[arg-type]
    other = make_tiny("llama", seed=9)
    refused(lambda: find_edges(other.lm, attribution), MismatchError, "attribute again")
    assert hook_count(this.model) == 0


def test_it_can_be_cancelled(found: tuple[Tiny, Attribution]) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        find_edges(found[0].lm, found[1], cancel=cancel)
