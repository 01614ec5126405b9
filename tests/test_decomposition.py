"""Vectors by neurons on tiny models, against explicit loops over down-projection columns."""

import pytest
import torch
from checks import refused
from tiny import D_MLP, D_MODEL, Tiny, make_circuit, make_vector
from torch import Tensor

from neurosteer.circuits import compare_with_circuit, decompose
from neurosteer.errors import MismatchError, UsageError
from neurosteer.models.reference import ModelReference


def naive_columns(this: Tiny, layer: int) -> Tensor:
    """What each neuron adds to the residual stream, `[d_mlp, d_model]`, by running the MLP's end on unit vectors."""
    down = this.downs[layer]
    zero = torch.zeros(1, 1, D_MLP)
    with torch.no_grad():
        columns = torch.stack(
            [(down(zero.clone().index_fill_(2, torch.tensor([n]), 1.0)) - down(zero))[0, 0] for n in range(D_MLP)]
        )
    norm = getattr(this.blocks[layer], "post_feedforward_layernorm", None)
    return columns if norm is None else columns * (1.0 + norm.weight)


def naive_cosines(this: Tiny, direction: Tensor, layer: int) -> dict[tuple[int, int], float]:
    return {
        (block, neuron): float(torch.nn.functional.cosine_similarity(column, direction, dim=0))
        for block in range(layer + 1)
        for neuron, column in enumerate(naive_columns(this, block))
    }


def test_the_neurons_of_a_vector_are_those_whose_columns_lie_along_it(each: Tiny) -> None:
    vector = make_vector((1, 2), model=each.lm.reference)
    for layer in (None, 1):
        at = layer or 2
        wanted = naive_cosines(each, vector.directions[at], at)
        found = decompose(each.lm, vector, 9, layer=layer)
        assert found.layer == at and found.cosines.shape == (at + 1, D_MLP)
        for (block, neuron), cosine in wanted.items():
            assert float(found.cosines[block, neuron]) == pytest.approx(cosine, abs=1e-4)
        top = sorted(wanted, key=lambda pair: -abs(wanted[pair]))[:9]
        circuit = found.circuit
        assert list(zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True)) == top
        assert circuit.scores.tolist() == pytest.approx([wanted[pair] for pair in top], abs=1e-4)


def test_the_variance_explained_is_that_of_least_squares(each: Tiny) -> None:
    vector = make_vector((2,), model=each.lm.reference)
    found = decompose(each.lm, vector, 6)
    pairs = zip(found.circuit.neuron_layers.tolist(), found.circuit.neurons.tolist(), strict=True)
    columns = torch.stack([naive_columns(each, layer)[neuron] for layer, neuron in pairs], dim=1).double()
    direction = vector.directions[2].double()
    rest = direction - columns @ torch.linalg.pinv(columns) @ direction
    assert found.variance_explained == pytest.approx(
        1 - float(rest.square().sum() / direction.square().sum()), abs=1e-4
    )
    assert 0 < found.variance_by_chance < found.variance_explained


def test_as_many_neurons_as_dimensions_explain_all(llama: Tiny) -> None:
    vector = make_vector((3,), model=llama.lm.reference)
    assert decompose(llama.lm, vector, 3 * D_MODEL).variance_explained == pytest.approx(1.0)


def test_a_vectors_own_neurons_compare_perfectly_and_others_do_not(each: Tiny) -> None:
    vector = make_vector((2,), model=each.lm.reference)
    own = decompose(each.lm, vector, 12).circuit
    same = compare_with_circuit(each.lm, vector, own)
    assert (same.neurons, same.shared) == (12, 12)
    assert same.rank_correlation == pytest.approx(1.0)
    assert same.expected == pytest.approx(144 / (3 * D_MLP))
    others = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])
    wanted = naive_cosines(each, vector.directions[2], 2)
    nearest = sorted(wanted, key=lambda pair: -abs(wanted[pair]))[:3]
    pairs = [(int(layer), int(neuron)) for layer, neuron in others]
    found = compare_with_circuit(each.lm, vector, make_circuit(pairs, model=each.lm.reference))
    assert found.neurons == 3  # the one above the vector's layer cannot write it
    assert found.shared == len(set(pairs) & set(nearest))


def test_the_rank_correlation_is_spearmans_ties_included(llama: Tiny) -> None:
    stats = pytest.importorskip("scipy.stats")
    vector = make_vector((2,), model=llama.lm.reference)
    pairs = [(0, neuron) for neuron in range(12)] + [(2, neuron) for neuron in range(8)]
    scores = torch.randint(-4, 5, (20,), generator=torch.Generator().manual_seed(1)).float()
    found = compare_with_circuit(llama.lm, vector, make_circuit(pairs, model=llama.lm.reference, scores=scores))
    cosines = naive_cosines(llama, vector.directions[2], 2)
    wanted = stats.spearmanr(scores.abs().numpy(), [abs(cosines[pair]) for pair in pairs]).statistic
    assert found.rank_correlation == pytest.approx(wanted, abs=1e-6)
    alike = make_circuit(pairs, model=llama.lm.reference, scores=torch.ones(20))
    assert compare_with_circuit(llama.lm, vector, alike).rank_correlation is None


def test_what_does_not_fit_is_refused_in_one_line(llama: Tiny) -> None:
    vector = make_vector((1, 2), model=llama.lm.reference)
    refused(lambda: decompose(llama.lm, vector, layer=3), UsageError, "no layer 3", "1, 2")
    refused(lambda: decompose(llama.lm, vector, 0), UsageError, "k is 0")
    refused(lambda: decompose(llama.lm, vector, 10_000), UsageError, "10000", str(3 * D_MLP))
    above = make_circuit([(3, 1)], model=llama.lm.reference)
    refused(lambda: compare_with_circuit(llama.lm, vector, above), UsageError, "above layer 2")
    other = ModelReference("other", None, 5, 32, 128, "f")
    refused(lambda: decompose(llama.lm, make_vector((1,), model=other)), MismatchError, "other")
    refused(lambda: compare_with_circuit(llama.lm, vector, make_circuit(model=other)), MismatchError, "other")
