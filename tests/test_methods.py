"""The methods as pure functions: from activations made up here to artifacts, against numpy, scipy and sklearn."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, UsageError
from neurosteer.methods import METHODS, find_method
from neurosteer.methods.base import Given
from neurosteer.models.reference import ModelReference
from neurosteer.reading.statistics import Activations, ClassMeans, ClassMoments, ClassRows

N_LAYERS, D_MODEL, D_MLP, N = 4, 12, 10, 40
REFERENCE = ModelReference("made/up", None, N_LAYERS, D_MODEL, D_MLP, "ffff")
Rows = dict[int, tuple[np.ndarray, np.ndarray]]


def rows_of(seed: int, width: int, *, shift: float = 1.0, n: tuple[int, int] = (N, N)) -> Rows:
    """Per layer rows of both classes, whose means differ in a direction of the layer's own."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(N_LAYERS):
        spread = rng.uniform(0.3, 3.0, width)
        offset = shift * rng.normal(size=width)
        found[layer] = (rng.normal(size=(n[0], width)) * spread + offset, rng.normal(size=(n[1], width)) * spread)
    return found


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()


def activations(residual: Rows, neurons: Rows, *, paired: bool = False) -> Activations:
    return Activations(
        model=REFERENCE,
        residual={layer: ClassMeans(*(tensor(side.mean(0)) for side in sides)) for layer, sides in residual.items()},
        neurons={
            layer: ClassMoments(*(tensor(side.mean(0)) for side in sides), *(tensor(side.var(0)) for side in sides))
            for layer, sides in neurons.items()
        },
        rows={layer: ClassRows(*(tensor(side) for side in sides)) for layer, sides in residual.items()},
        held_out={},
        norms={layer: 2.0 + layer for layer in residual},
        n_texts=2 * N,
        n_tokens=0,
        n_cut=0,
        paired=paired,
    )


RESIDUAL, NEURONS = rows_of(0, D_MODEL), rows_of(1, D_MLP)
COLUMNS = {layer: np.random.default_rng(10 + layer).normal(size=(D_MLP, D_MODEL)) for layer in range(N_LAYERS)}


def run(method: str, layers: tuple[int, ...], read: Activations | None = None, **given: Any) -> Any:
    entry = find_method(method)
    found = read if read is not None else activations(RESIDUAL, NEURONS)
    return entry.function(
        Given(found, layers, "made", entry.parameters(given), columns=lambda layer: tensor(COLUMNS[layer]))
    )


def cosine(one: Tensor, other: np.ndarray) -> float:
    return float(np.dot(one.numpy(), other) / np.linalg.norm(one.numpy()) / np.linalg.norm(other))


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_caa_is_the_difference_of_class_means() -> None:
    vector = run("caa", (0, 2, 3))
    assert isinstance(vector, SteeringVector)
    assert (vector.layers, vector.method, vector.operation, vector.model) == ([0, 2, 3], "caa", "add", REFERENCE)
    assert vector.norms == {0: 2.0, 2: 4.0, 3: 5.0}
    for layer in (0, 2, 3):
        wanted = RESIDUAL[layer][0].mean(0) - RESIDUAL[layer][1].mean(0)
        assert np.allclose(vector.directions[layer].numpy(), wanted, atol=1e-5)


def test_caa_of_classes_that_do_not_differ_is_refused() -> None:
    same = {layer: (sides[0], sides[0]) for layer, sides in RESIDUAL.items()}
    with pytest.raises(ArtifactError, match="zero at layer 1"):
        run("caa", (1,), activations(same, NEURONS))


@pytest.mark.parametrize("n", [4, N], ids=["fewer texts than dimensions", "more texts than dimensions"])
def test_pca_of_pairs_is_the_first_singular_vector_of_their_differences(n: int) -> None:
    rows = rows_of(3, D_MODEL, n=(n, n))
    vector = run("pca", (1, 2), activations(rows, NEURONS, paired=True))
    for layer in (1, 2):
        positive, negative = rows[layer]
        first = np.linalg.svd(positive - negative, full_matrices=False)[2][0]
        wanted = first * np.sign(first @ (positive.mean(0) - negative.mean(0)))
        assert np.allclose(vector.directions[layer].numpy(), wanted, atol=1e-4)
    assert vector.parameters["paired"] is True


@pytest.mark.parametrize("n", [(4, 4), (40, 40)], ids=["fewer texts than dimensions", "more texts than dimensions"])
def test_pca_of_unpaired_classes_of_one_size_is_that_of_all_rows_centred(n: tuple[int, int]) -> None:
    rows = rows_of(4, D_MODEL, n=n)
    vector = run("pca", (0, 3), activations(rows, NEURONS))
    for layer in (0, 3):
        positive, negative = rows[layer]
        first = np.asarray(PCA(1, svd_solver="full").fit(np.concatenate([positive, negative])).components_)[0]
        wanted = first * np.sign(first @ (positive.mean(0) - negative.mean(0)))
        assert np.allclose(vector.directions[layer].numpy(), wanted, atol=1e-4)
    assert vector.parameters["paired"] is False


def test_pca_of_unpaired_classes_of_different_size_is_centred_between_the_two_means() -> None:
    rows = rows_of(5, D_MODEL, n=(30, 8))
    vector = run("pca", (2,), activations(rows, NEURONS))
    positive, negative = rows[2]
    middle = (positive.mean(0) + negative.mean(0)) / 2
    first = np.linalg.svd(np.concatenate([positive, negative]) - middle)[2][0]
    assert np.allclose(
        vector.directions[2].numpy(), first * np.sign(first @ (positive.mean(0) - negative.mean(0))), atol=1e-4
    )


def test_pca_points_the_other_way_when_the_classes_change_places() -> None:
    turned = {layer: (negative, positive) for layer, (positive, negative) in RESIDUAL.items()}
    there, back = run("pca", (1,)), run("pca", (1,), activations(turned, NEURONS))
    assert torch.allclose(there.directions[1], -back.directions[1], atol=1e-5)


def naive_regression(rows: tuple[np.ndarray, np.ndarray], penalty: float) -> np.ndarray:
    """Balanced logistic loss with penalty/2 |w|^2, features centred and divided by one scale, minimised by scipy."""
    features = np.concatenate(rows)
    signs = np.repeat([1.0, -1.0], [len(rows[0]), len(rows[1])])
    weights = np.repeat(
        [len(features) / (2 * len(rows[0])), len(features) / (2 * len(rows[1]))], [len(rows[0]), len(rows[1])]
    )
    centred = features - features.mean(0)
    centred = centred / np.sqrt((centred**2).sum(1).mean())

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (centred @ at[:-1] + at[-1])
        slope = -weights * signs / (1 + np.exp(margins))
        value = (weights * np.logaddexp(0, -margins)).sum() + penalty / 2 * (at[:-1] ** 2).sum()
        return value, np.append(centred.T @ slope + penalty * at[:-1], slope.sum())

    start = np.zeros(features.shape[1] + 1)
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9}).x[
        :-1
    ]


@pytest.mark.parametrize(("n", "penalty"), [((N, N), 0.01), ((N, N), 10.0), ((30, 9), 1.0)])
def test_the_probe_is_the_logistic_regression_that_scipy_finds(n: tuple[int, int], penalty: float) -> None:
    rows = rows_of(6, D_MODEL, shift=0.3, n=n)
    vector = run("probe", (0, 1), activations(rows, NEURONS), penalty=penalty)
    for layer in (0, 1):
        assert cosine(vector.directions[layer], naive_regression(rows[layer], penalty)) > 0.999
    assert vector.parameters == {"penalty": penalty}


def test_the_probe_separates_what_can_be_separated_as_sklearn_does() -> None:
    rng = np.random.default_rng(7)
    direction = rng.normal(size=D_MODEL)
    direction /= np.linalg.norm(direction)
    noise = rng.normal(size=(2 * N, D_MODEL))
    noise -= np.outer(noise @ direction, direction)
    rows = (noise[:N] * 5 + 1.0 * direction, noise[N:] * 5 - 1.0 * direction)
    vector = run("probe", (0,), activations({0: rows}, NEURONS))
    along = [side @ vector.directions[0].double().numpy() for side in rows]
    assert along[0].min() > along[1].max()
    labels = np.repeat([1, 0], N)
    fitted = LogisticRegression(C=1e4, max_iter=10_000).fit(np.concatenate(rows), labels).coef_[0]
    assert cosine(vector.directions[0], fitted) > 0.99
    assert cosine(vector.directions[0], direction) > 0.99


# --- circuits --------------------------------------------------------------------------------------------------------


def naive_scores(rank: str, layers: list[int], reference: int) -> dict[tuple[int, int], float]:
    scores = {}
    target = RESIDUAL[reference][0].mean(0) - RESIDUAL[reference][1].mean(0)
    for layer in layers:
        positive, negative = NEURONS[layer]
        for neuron in range(D_MLP):
            difference = positive[:, neuron].mean() - negative[:, neuron].mean()
            if rank == "difference":
                scores[layer, neuron] = difference
            elif rank == "dprime":
                pooled = np.sqrt((positive[:, neuron].var() + negative[:, neuron].var()) / 2)
                scores[layer, neuron] = difference / pooled
            else:
                scores[layer, neuron] = difference * COLUMNS[layer][neuron] @ target / np.linalg.norm(target)
    return scores


def pairs(circuit: NeuronCircuit) -> list[tuple[int, int]]:
    return list(zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True))


@pytest.mark.parametrize("rank", ["difference", "dprime", "write"])
@pytest.mark.parametrize("skipped", [(), (0, 1), (2,)])
def test_cna_finds_the_neurons_that_a_naive_ranking_finds(rank: str, skipped: tuple[int, ...]) -> None:
    circuit = run("cna", (0, 1, 2), rank=rank, top_k=7, skip_layers=skipped)
    scores = naive_scores(rank, [layer for layer in (0, 1, 2) if layer not in skipped], reference=2)
    if rank == "write":
        scores = {key: value for key, value in scores.items() if value > 0}
    wanted = sorted(scores, key=lambda key: -abs(scores[key]))[:7]
    assert pairs(circuit) == wanted
    assert np.allclose(circuit.scores.numpy(), [scores[key] for key in wanted], rtol=1e-4)
    differences = [NEURONS[layer][0][:, n].mean() - NEURONS[layer][1][:, n].mean() for layer, n in wanted]
    assert np.allclose(circuit.differences.numpy(), differences, rtol=1e-4, atol=1e-6)
    assert circuit.neuron_layers.dtype == circuit.neurons.dtype == torch.int32
    assert circuit.parameters["searched_layers"] == [layer for layer in (0, 1, 2) if layer not in skipped]


def test_write_ranks_towards_the_last_layer_given_even_when_that_one_is_skipped() -> None:
    circuit = run("cna", (0, 1, 2), rank="write", top_k=3, skip_layers=(2,))
    scores = naive_scores("write", [0, 1], reference=2)
    assert pairs(circuit) == sorted(scores, key=lambda key: -scores[key])[:3]


@pytest.mark.parametrize("rank", ["difference", "dprime", "write"])
def test_planted_neurons_are_found(rank: str) -> None:
    rng = np.random.default_rng(8)
    neurons = {layer: (rng.normal(size=(N, D_MLP)), rng.normal(size=(N, D_MLP))) for layer in range(N_LAYERS)}
    target = RESIDUAL[3][0].mean(0) - RESIDUAL[3][1].mean(0)
    planted = {(1, 4): 6.0, (2, 9): -5.0, (3, 0): 4.0}
    columns = {layer: COLUMNS[layer].copy() for layer in COLUMNS}
    for (layer, neuron), size in planted.items():
        neurons[layer][0][:, neuron] += size
        columns[layer][neuron] = 5 * np.sign(size) * target / np.linalg.norm(target)
    entry = find_method("cna")
    parameters = entry.parameters({"rank": rank, "top_k": 3, "skip_layers": ()})
    read = activations(RESIDUAL, neurons)
    circuit = entry.function(
        Given(read, (0, 1, 2, 3), "made", parameters, columns=lambda layer: tensor(columns[layer]))
    )
    assert isinstance(circuit, NeuronCircuit)
    assert set(pairs(circuit)) == set(planted)
    signs = {key: np.sign(float(value)) for key, value in zip(pairs(circuit), circuit.differences, strict=True)}
    assert signs == {key: np.sign(size) for key, size in planted.items()}


def test_a_neuron_that_never_varies_does_not_win_by_dprime() -> None:
    neurons = {layer: (positive.copy(), negative.copy()) for layer, (positive, negative) in NEURONS.items()}
    for side in neurons[1]:
        side[:, 2] = 0.0
    circuit = run("cna", (1,), activations(RESIDUAL, neurons), rank="dprime", top_k=9, skip_layers=())
    assert (1, 2) not in pairs(circuit)
    assert torch.isfinite(circuit.scores).all()


@pytest.mark.parametrize(
    ("top_k", "count"), [(5, 5), (5.0, 5), (0.1, 4), (0.0045, 1), (0.25, 10), (10_000, 30), (1, 1)]
)
def test_top_k_is_a_count_or_a_share_of_all_the_models_neurons(top_k: float, count: int) -> None:
    circuit = run("cna", (0, 1, 2), rank="difference", top_k=top_k, skip_layers=())
    assert circuit.size == count  # of 4 x 10 neurons, of which 30 are searched
    assert circuit.share == count / 40


@pytest.mark.parametrize(("operation", "amount"), [("scale", 2.0), ("shift", 6.0)])
def test_a_circuit_scales_or_shifts_with_that_operations_default(operation: str, amount: float) -> None:
    circuit = run("cna", (0, 1), operation=operation, skip_layers=())
    assert circuit.operation == operation
    assert circuit.calibration.amount == amount and circuit.calibration.measured is False


def test_cna_of_classes_that_do_not_differ_is_refused() -> None:
    same = {layer: (sides[0], sides[0]) for layer, sides in NEURONS.items()}
    with pytest.raises(UsageError, match="two classes"):
        run("cna", (2, 3), activations(RESIDUAL, same), rank="difference")


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("cna", {"rank": "best"}, ["'best'", "difference", "dprime", "write"]),
        ("cna", {"rank": None}, ["difference", "dprime", "write"]),
        ("cna", {"operation": "add"}, ["'add'", "scale", "shift"]),
        ("cna", {"top_k": 0}, ["top_k", "count", "share"]),
        ("cna", {"top_k": -3}, ["top_k", "-3"]),
        ("cna", {"top_k": float("nan")}, ["top_k", "nan"]),
        ("cna", {"top_k": float("inf")}, ["top_k", "inf"]),
        ("cna", {"top_k": True}, ["top_k", "True"]),
        ("cna", {"top_k": "many"}, ["top_k", "'many'"]),
        ("cna", {"skip_layers": 1}, ["skip_layers", "list"]),
        ("cna", {"skip_layers": "0,1"}, ["skip_layers", "list"]),
        ("cna", {"skip_layers": [0.5]}, ["skip_layers", "list"]),
        ("cna", {"skip_layers": [0, 1, 2, 3]}, ["skip_layers", "no layer"]),
        ("cna", {"penalty": 1.0}, ["penalty", "rank", "operation", "top_k", "skip_layers"]),
        ("probe", {"penalty": 0}, ["penalty", "from 1e-12"]),
        ("probe", {"penalty": -1.0}, ["penalty", "-1.0"]),
        ("probe", {"penalty": float("nan")}, ["penalty", "nan"]),
        ("probe", {"penalty": float("inf")}, ["penalty", "inf"]),
        ("probe", {"penalty": "x"}, ["penalty", "'x'"]),
        ("probe", {"C": 1.0}, ["'C'", "penalty"]),
        ("caa", {"top_k": 3}, ["top_k", "none"]),
        ("pca", {"rank": "write"}, ["rank", "none"]),
    ],
)
def test_a_wrong_parameter_is_refused_naming_what_is_allowed(
    method: str, given: Mapping[str, Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        run(method, (0, 1, 2, 3), **given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_unknown_method_is_refused_naming_those_there_are() -> None:
    with pytest.raises(UsageError) as error:
        find_method("magic")
    assert all(name in str(error.value) for name in ("magic", "caa", "pca", "probe", "cna"))


def test_the_registry_describes_every_method() -> None:
    assert {"caa", "pca", "probe", "cna"} <= set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name and method.explanation and method.source
        assert method.kind in (SteeringVector.kind, NeuronCircuit.kind)


def test_a_method_leaves_the_activations_as_they_were() -> None:
    read = activations(RESIDUAL, NEURONS)
    before = {layer: (read.rows[layer].positive.clone(), read.residual[layer].difference.clone()) for layer in range(4)}
    for method in ("caa", "pca", "probe", "cna"):
        run(method, (0, 1, 2, 3), read)
    for layer, (rows, difference) in before.items():
        assert torch.equal(read.rows[layer].positive, rows)
        assert torch.equal(read.residual[layer].difference, difference)
