"""`caa`: the difference of class means per layer (Contrastive Activation Addition, arXiv 2312.06681)."""

from neurosteer.artifacts.vector import SteeringVector
from neurosteer.methods.base import Given, Method


def mean_difference(given: Given) -> SteeringVector:
    """Directions `[d_model]`: mean over positive texts minus mean over negative texts."""
    return given.vector("caa", {layer: given.activations.residual[layer].difference for layer in given.layers})


METHOD = Method(
    name="caa",
    function=mean_difference,
    explanation="The average difference between the two kinds of text inside the model: fast, and hard to beat.",
    source="Contrastive Activation Addition, arXiv 2312.06681",
    kind=SteeringVector.kind,
)
