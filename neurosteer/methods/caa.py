"""`caa`: the difference of class means per layer (Contrastive Activation Addition, arXiv 2312.06681)."""

from collections.abc import Mapping
from typing import Any

from neurosteer.artifacts.vector import SteeringVector
from neurosteer.methods.base import Method, Tensors
from neurosteer.reading.statistics import Activations


def mean_difference(
    activations: Activations,
    layers: tuple[int, ...],
    *,
    name: str,
    tensors: Tensors,
    parameters: Mapping[str, Any],
) -> SteeringVector:
    """Directions `[d_model]`: mean over positive texts minus mean over negative texts."""
    return SteeringVector(
        name=name,
        model=activations.model,
        method="caa",
        parameters=dict(parameters),
        directions={layer: activations.residual[layer].difference for layer in layers},
        norms={layer: activations.norms[layer] for layer in layers},
    )


METHOD = Method(
    name="caa",
    function=mean_difference,
    explanation="The average difference between the two kinds of text inside the model: fast, and hard to beat.",
    source="Contrastive Activation Addition, arXiv 2312.06681",
    kind=SteeringVector.kind,
)
