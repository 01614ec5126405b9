"""Random twins: artifacts of the same make that were built from nothing, to compare the real ones with.

The twin of a vector is the vector rotated: one random rotation for all its layers (and for all vectors of a recipe)
keeps their lengths and the angles between them, so that its pushes add up over the layers as the vector's own do.
The twin of a circuit has as many other neurons of each layer. A shift that is one neuron's class difference may be
nothing or far too much for another: where `spreads` are given (by layer, the standard deviation of each neuron's
activation, `[d_mlp]`), a shift is as many standard deviations of the neuron drawn as it was of the neuron it stands
for; without them it is the same number.

A twin so made need not move the model as far as its artifact: `measuring.equal_kl` brings it there.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import UsageError

_LEAST_SPREAD = 1e-3
"""As a share of the layer's median spread: no neuron is taken to be stiller than that."""


def random_twin(artifact: Artifact, seed: int, *, spreads: Mapping[int, Tensor] | None = None) -> Artifact:
    """`artifact` rotated at random, or with other neurons, at its amounts."""
    return random_recipe(Recipe.of(artifact), seed, spreads=spreads).uses[0].artifact


def random_recipe(recipe: Recipe, seed: int, *, spreads: Mapping[int, Tensor] | None = None) -> Recipe:
    """`recipe` with a random twin in each artifact's place, at the same strengths; for a recipe of one artifact it is
    `random_twin` of that."""
    turned = iter(_rotated([use.artifact for use in recipe.uses if isinstance(use.artifact, SteeringVector)], seed))

    def twin(artifact: Artifact, place: int) -> Artifact:
        if isinstance(artifact, SteeringVector):
            return next(turned)
        return _scaled_shifts(artifact, other_neurons(artifact, _seed(seed, place) if place else seed), spreads)

    return Recipe(tuple(replace(use, artifact=twin(use.artifact, at)) for at, use in enumerate(recipe.uses)))


def other_neurons(circuit: NeuronCircuit, seed: int, *, leave_out: Collection[tuple[int, int]] = ()) -> Tensor:
    """As many neurons of each layer as the circuit has, int32 `[n]` beside its `neuron_layers`, drawn by chance from
    all of that layer's but those in `leave_out`, (layer, neuron). Raises `UsageError` where too few are left."""
    allowed = torch.ones(circuit.model.n_layers, circuit.model.d_mlp, dtype=torch.bool)
    for layer, neuron in leave_out:
        allowed[layer, neuron] = False
    neurons = torch.empty_like(circuit.neurons)
    for layer in circuit.layers:
        here = circuit.neuron_layers == layer
        generator = torch.Generator().manual_seed(_seed(seed, layer))
        neurons[here] = draw_neurons(allowed[layer], int(here.sum()), generator).int()
    return neurons


def draw_neurons(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different places at which `allowed` (bool `[d_mlp]`) is true. Raises `UsageError` if there are fewer."""
    places = allowed.nonzero()[:, 0]
    if len(places) < count:
        raise UsageError(f"A layer has {len(places)} neurons to draw from and {count} are needed; leave out fewer.")
    return places[torch.randperm(len(places), generator=generator)[:count]]


def _rotated(vectors: Sequence[SteeringVector], seed: int) -> list[SteeringVector]:
    """All `vectors` under one random rotation, which is drawn only where it matters: directions are coordinates in an
    orthonormal frame `[d_model, rank]` of the space they span, and another such frame, drawn at random, takes its
    place."""
    if not vectors:
        return []
    places = [(number, layer) for number, vector in enumerate(vectors) for layer in vector.layers]
    rows = torch.stack([vectors[number].directions[layer] for number, layer in places]).double()
    lengths = rows.abs().amax(1, keepdim=True)  # some are so long that their squares leave what floats can hold
    _, coordinates = torch.linalg.qr((rows / lengths).T)
    draw = torch.Generator().manual_seed(_seed(seed, *(layer for _, layer in places)))
    noise = torch.randn(rows.shape[1], len(coordinates), generator=draw, dtype=torch.float64)
    frame, corner = torch.linalg.qr(noise)
    # A decomposition may choose signs as it likes: with these the frame is uniform, and the twin the same everywhere.
    frame = frame * torch.where((corner.diagonal() < 0) ^ (coordinates.diagonal() < 0), -1.0, 1.0)
    turned = ((coordinates.T @ frame.T) * lengths).float()
    found: list[dict[int, Tensor]] = [{} for _ in vectors]
    for (number, layer), row in zip(places, turned, strict=True):
        found[number][layer] = row.clone()
    return [
        replace(vector, directions=directions, receipts=(), features=())
        for vector, directions in zip(vectors, found, strict=True)
    ]


def _scaled_shifts(circuit: NeuronCircuit, neurons: Tensor, spreads: Mapping[int, Tensor] | None) -> NeuronCircuit:
    """The circuit with other `neurons`, each shifted by as much of its own spread."""
    differences = circuit.differences.clone()
    for layer in circuit.layers if spreads is not None and circuit.operation == "shift" else []:
        here, spread = circuit.neuron_layers == layer, spreads[layer].float().cpu()  # type: ignore[index]
        spread = spread.clamp(min=max(float(spread.median()) * _LEAST_SPREAD, 1e-12))
        differences[here] *= spread[neurons[here].long()] / spread[circuit.neurons[here].long()]
    return replace(circuit, neurons=neurons, differences=differences, receipts=())


def _seed(*parts: object) -> int:
    return random.Random("/".join(map(str, parts))).getrandbits(63)
