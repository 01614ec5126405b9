"""Several vectors at once: how much they overlap, and the same vectors without that overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.vector import SteeringVector, unit
from neurosteer.errors import UsageError

MIN_EIGENVALUE = 0.01
"""Of the cosines' matrix. Two directions fall below it from |cosine| 0.99 on: what is left of them without their
overlap would be mostly the noise in which they differ."""


@dataclass(frozen=True)
class Overlap:
    """The cosine between the directions of two vectors, given by name, at a layer that both have."""

    first: str
    second: str
    layer: int
    cosine: float


def cosines(vectors: Recipe | Sequence[Artifact]) -> list[Overlap]:
    """How much each two of the vectors (or of a recipe's) overlap at each layer they share, pair by pair.

    Signs are those of the vectors, whatever strength a recipe gives them. Circuits have no direction and are left out.

    Raises:
        MismatchError: the vectors belong to models of different shape.
    """
    artifacts = [use.artifact for use in vectors.uses] if isinstance(vectors, Recipe) else vectors
    found = [artifact for artifact in artifacts if isinstance(artifact, SteeringVector)]
    _check_shapes(found)
    return [
        Overlap(one.name, other.name, layer, _cosine(one.directions[layer], other.directions[layer]))
        for one, other in combinations(found, 2)
        for layer in sorted(set(one.directions) & set(other.directions))
    ]


def orthogonalise(vectors: Sequence[SteeringVector]) -> list[SteeringVector]:
    """The vectors without the overlap between them, in the order given.

    At a layer that several have, their unit directions, the columns of U `[d_model, k]`, become U (UᵀU)^(-1/2): of all
    orthonormal sets the one nearest to them, in which no vector comes first (Löwdin, J. Chem. Phys. 18, 365 (1950)).
    Each direction keeps its length, and each vector its other layers, norms and amounts. Whose direction changed says
    so in its parameters (`orthogonalised_against`); it has no receipts and no features there any more, and its amounts
    count as unmeasured: those were of the old direction. Only vectors that are added change; what is projected out or
    clamped is returned as it is (projecting several directions out takes nothing out twice, and a clamp reads one
    particular feature).

    Raises:
        UsageError: directions lie in nearly one line, or in the space of fewer directions than they are.
        MismatchError: the vectors belong to models of different shape.
    """
    _check_shapes(vectors)
    adding = [place for place, vector in enumerate(vectors) if vector.operation == "add"]
    changed: dict[int, dict[int, Tensor]] = {place: {} for place in adding}
    partners: dict[int, set[int]] = {place: set() for place in adding}
    for layer in sorted({layer for place in adding for layer in vectors[place].directions}):
        here = [place for place in adding if layer in vectors[place].directions]
        if len(here) < 2:
            continue
        for place, direction in zip(here, _nearest_orthogonal([vectors[p] for p in here], layer), strict=True):
            changed[place][layer] = direction
            partners[place] |= set(here) - {place}
    return [
        _with_directions(vector, changed[place], [vectors[other].name for other in sorted(partners[place])])
        if changed.get(place)
        else vector
        for place, vector in enumerate(vectors)
    ]


def orthogonalised(recipe: Recipe) -> Recipe:
    """The recipe with the overlap between the vectors it adds taken out; see `orthogonalise`.

    Strengths stay, and do not count: a vector at strength 0 is one of them too, so that nothing jumps as a strength
    passes 0. Ablations and circuits stay as they are.
    """
    vectors = [use.artifact for use in recipe.uses if isinstance(use.artifact, SteeringVector)]
    found = iter(orthogonalise(vectors))
    return Recipe(
        tuple(
            replace(use, artifact=next(found)) if isinstance(use.artifact, SteeringVector) else use
            for use in recipe.uses
        )
    )


def _nearest_orthogonal(vectors: Sequence[SteeringVector], layer: int) -> list[Tensor]:
    """The vectors' directions at `layer`, each `[d_model]` of its old length, orthogonal to one another."""
    given = [vector.directions[layer].double() for vector in vectors]
    units = torch.stack([unit(direction) for direction in given], dim=1)
    overlaps = units.T @ units
    values, bases = torch.linalg.eigh(overlaps)
    if values[0] < MIN_EIGENVALUE:
        raise UsageError(_dependence(vectors, layer, overlaps, bases[:, 0]))
    free = units @ (bases * values.rsqrt()) @ bases.T
    return [(column * direction.norm()).float() for column, direction in zip(free.T, given, strict=True)]


def _dependence(vectors: Sequence[SteeringVector], layer: int, overlaps: Tensor, weights: Tensor) -> str:
    """Which vectors nearly cancel at `layer`: `weights` `[k]` are of the sum of unit directions that is almost zero."""
    pairs = list(combinations(range(len(vectors)), 2))
    one, other = max(pairs, key=lambda pair: float(overlaps[pair].abs()))
    cosine = float(overlaps[one, other])
    closest = f"{vectors[one].name!r} and {vectors[other].name!r}"
    if abs(cosine) > 1 - MIN_EIGENVALUE:
        return (
            f"{closest} have nearly the same direction at layer {layer} (cosine {cosine:+.4f}); nothing of use would "
            "be left of them without their overlap. Use only one of the two."
        )
    involved = [vector.name for vector, weight in zip(vectors, weights.tolist(), strict=True) if abs(weight) > 0.1]
    return (
        f"At layer {layer} one of {', '.join(map(repr, involved))} is nearly a sum of the others (the closest are "
        f"{closest}, cosine {cosine:+.4f}); nothing of use would be left of it. Leave one of them out."
    )


def _with_directions(vector: SteeringVector, directions: Mapping[int, Tensor], others: Sequence[str]) -> SteeringVector:
    return replace(
        vector,
        directions={**vector.directions, **directions},
        parameters={**vector.parameters, "orthogonalised_against": list(others)},
        calibration=vector.calibration.unmeasured(),
        receipts=(),
        features=tuple(feature for feature in vector.features if feature.layer not in directions),
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    return max(-1.0, min(1.0, float(unit(one.double()) @ unit(other.double()))))


def _check_shapes(vectors: Sequence[SteeringVector]) -> None:
    for vector in vectors[1:]:
        check_model(vector, vectors[0].model)
