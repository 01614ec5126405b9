"""Steering vectors in terms of neurons: whose down-projection columns lie along a vector, and how a circuit compares.

A neuron adds its activation times its column to the residual stream, so the neurons whose columns have a large cosine
with a direction at layer L, in blocks up to L, are the ones that can write it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import check_model
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.provenance import Provenance
from neurosteer.artifacts.strength import default_calibration
from neurosteer.artifacts.vector import SteeringVector, unit
from neurosteer.circuits.parts import random_like
from neurosteer.errors import UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.validation import check_count
from neurosteer.version import VERSION

_DRAWS = 5


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A vector's direction at `layer` by neurons.

    `cosines` is float32 `[layer + 1, d_mlp]`: of each neuron's down-projection column with the direction. `circuit`
    holds the strongest, scored by their cosines. `variance_explained` is the share of the direction's squared length
    within the span of their columns, `variance_by_chance` that of as many random neurons of the same layers.
    """

    vector: str
    layer: int
    cosines: Tensor
    circuit: NeuronCircuit
    variance_explained: float
    variance_by_chance: float


@dataclass(frozen=True)
class CircuitComparison:
    """How a circuit compares with a vector's direction at `layer`.

    `neurons` of the circuit's lie in blocks up to `layer`, and only those count. `shared` of them are among the as many
    neurons whose columns have the largest |cosine| with the direction, `expected` would be by chance.
    `rank_correlation` is Spearman's between the circuit's |scores| and those |cosines|; None where it is not defined.
    """

    vector: str
    circuit: str
    layer: int
    neurons: int
    shared: int
    expected: float
    variance_explained: float
    variance_by_chance: float
    rank_correlation: float | None


def decompose(
    lm: LanguageModel,
    vector: SteeringVector,
    k: int = 200,
    *,
    layer: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Decomposition:
    """The `k` neurons whose columns lie most along `vector` at `layer` (by default its last), in blocks up to it.

    Raises `UsageError` for a `k` out of range or a layer that the vector has not, `MismatchError` for a vector of
    another model.
    """
    at, direction = _direction(lm, vector, layer)
    cosines = _cosines(lm, direction, at)
    check_count("k", k, 1, cosines.numel())
    chosen = cosines.flatten().abs().argsort(descending=True, stable=True)[:k]
    circuit = NeuronCircuit(
        name=safe_name(name or f"{vector.name[:70]}-neurons"),
        model=lm.reference,
        method="decomposition",
        parameters={"vector": vector.name, "layer": at},
        neuron_layers=(chosen // lm.shape.d_mlp).int(),
        neurons=(chosen % lm.shape.d_mlp).int(),
        scores=cosines.flatten()[chosen],
        differences=torch.zeros(k),
        operation="scale",
        calibration=default_calibration("scale"),
        provenance=Provenance(version=VERSION, parents=(vector.name,)),
    )
    explained, by_chance = _explained(lm, circuit, direction, seed)
    return Decomposition(vector.name, at, cosines, circuit, explained, by_chance)


def compare_with_circuit(
    lm: LanguageModel, vector: SteeringVector, circuit: NeuronCircuit, *, layer: int | None = None, seed: int = 0
) -> CircuitComparison:
    """How much `circuit` has to do with `vector` at `layer` (by default its last).

    Raises `UsageError` for a layer that the vector has not, or where none of the circuit's neurons lies in the blocks
    up to it; `MismatchError` for a vector or circuit of another model.
    """
    at, direction = _direction(lm, vector, layer)
    check_model(circuit, lm.reference)
    writing = (circuit.neuron_layers <= at).nonzero()[:, 0]
    if not len(writing):
        raise UsageError(
            f"All neurons of {circuit.name!r} lie above layer {at}, where {vector.name!r} is; they cannot write it."
        )
    cosines = _cosines(lm, direction, at).abs().flatten()
    keys = circuit.neuron_layers[writing].long() * lm.shape.d_mlp + circuit.neurons[writing].long()
    nearest = cosines.argsort(descending=True, stable=True)[: len(keys)]
    explained, by_chance = _explained(lm, circuit, direction, seed, at)
    return CircuitComparison(
        vector=vector.name,
        circuit=circuit.name,
        layer=at,
        neurons=len(keys),
        shared=int(torch.isin(keys, nearest).sum()),
        expected=len(keys) ** 2 / cosines.numel(),
        variance_explained=explained,
        variance_by_chance=by_chance,
        rank_correlation=_rank_correlation(circuit.scores[writing].abs(), cosines[keys]),
    )


def _direction(lm: LanguageModel, vector: SteeringVector, layer: int | None) -> tuple[int, Tensor]:
    check_model(vector, lm.reference)
    at = vector.layers[-1] if layer is None else layer
    if at not in vector.directions:
        layers = ", ".join(map(str, vector.layers))
        raise UsageError(f"{vector.name!r} has no layer {at!r:.40}; it has {layers:.200}.")
    return at, unit(vector.directions[at])


def _cosines(lm: LanguageModel, direction: Tensor, layer: int) -> Tensor:
    """Of every column in blocks up to `layer` with a unit direction, float32 `[layer + 1, d_mlp]`, on the CPU."""
    found = []
    for block in range(layer + 1):
        columns = lm.write_columns(block)
        lengths = columns.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        found.append((columns @ direction.to(columns.device) / lengths).cpu())
    return torch.stack(found)


def _explained(
    lm: LanguageModel, circuit: NeuronCircuit, direction: Tensor, seed: int, at: int | None = None
) -> tuple[float, float]:
    """The share of a unit direction within the span of the circuit's columns (in blocks up to `at`), and of random
    neurons', the mean over draws."""
    draws = [random_like(circuit, seed * 1_000_003 + draw) for draw in range(_DRAWS)]
    columns: list[list[Tensor]] = [[] for _ in range(1 + _DRAWS)]
    for layer in circuit.layers:
        if at is None or layer <= at:
            written = lm.write_columns(layer)
            for place, one in enumerate((circuit, *draws)):
                neurons = one.neurons[one.neuron_layers == layer].long()
                columns[place].append(written[neurons.to(written.device)].cpu())
    shares = [_share_within(torch.cat(parts), direction) for parts in columns]
    return shares[0], sum(shares[1:]) / _DRAWS


def _share_within(columns: Tensor, direction: Tensor) -> float:
    """Squared length of a unit direction's projection on the span of `columns` `[n, d_model]`."""
    basis, sizes, _ = torch.linalg.svd(columns.double().T, full_matrices=False)
    basis = basis[:, sizes > sizes.max() * 1e-9]
    return float((basis.T @ direction.double()).square().sum().clamp(max=1.0))


def _rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's, `[n]` with `[n]`; None where all values of one are equal."""
    from scipy.stats import spearmanr

    if any(len(values.unique()) < 2 for values in (one, other)):
        return None
    found: Any = spearmanr(one.numpy(), other.numpy())
    return float(found.statistic)
