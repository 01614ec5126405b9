"""Random twins: artifacts of the same make and dose that were built from nothing, to compare the real ones with."""

import random
from dataclasses import replace

import torch

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.vector import SteeringVector

_BETWEEN_USES = 1_000_003  # so that two artifacts of one recipe, at the same layers, get different twins


def random_twin(artifact: Artifact, seed: int) -> Artifact:
    """`artifact` with random directions of the same length, or as many random neurons of each layer, at its dose."""
    seeds = {layer: random.Random(f"{seed}/{layer}").getrandbits(63) for layer in artifact.layers}
    draws = {layer: torch.Generator().manual_seed(number) for layer, number in seeds.items()}
    if isinstance(artifact, SteeringVector):
        found = {layer: torch.randn(artifact.model.d_model, generator=draw) for layer, draw in draws.items()}
        directions = {
            layer: direction * (artifact.directions[layer].norm() / direction.norm())
            for layer, direction in found.items()
        }
        return replace(artifact, directions=directions, receipts=(), features=())
    neurons = artifact.neurons.clone()
    for layer, draw in draws.items():
        here = artifact.neuron_layers == layer
        neurons[here] = torch.randperm(artifact.model.d_mlp, generator=draw)[: int(here.sum())].int()
    return replace(artifact, neurons=neurons, receipts=())


def random_recipe(recipe: Recipe, seed: int) -> Recipe:
    """`recipe` with a random twin in each artifact's place, at the same strengths."""
    uses = enumerate(recipe.uses)
    return Recipe(
        tuple(replace(use, artifact=random_twin(use.artifact, seed + place * _BETWEEN_USES)) for place, use in uses)
    )
