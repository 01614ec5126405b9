"""`pca`: the first principal component of class differences (Representation Engineering, arXiv 2310.01405)."""

import torch
from torch import Tensor

from neurosteer.artifacts.vector import SteeringVector
from neurosteer.methods.base import Given, Method
from neurosteer.reading.statistics import ClassRows


def principal_component(given: Given) -> SteeringVector:
    """Unit directions `[d_model]`, pointing from the negative to the positive class mean.

    Paired texts: the component of the differences positive_i − negative_i. Otherwise: of all rows centred on the
    midpoint of the two class means.
    """
    directions, activations = {}, given.activations
    for layer in given.layers:
        component = first_component(_differences(activations.rows[layer], activations.paired))
        sign = torch.sign(component @ activations.residual[layer].difference)
        directions[layer] = component * (sign if sign != 0 else 1.0)
    return given.vector("pca", directions, parameters={**given.parameters, "paired": activations.paired})


def first_component(rows: Tensor) -> Tensor:
    """The unit vector along which `rows` `[n, d]`, taken about 0, vary most: `[d]`."""
    matrix = rows.double()
    if matrix.shape[0] >= matrix.shape[1]:
        return torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -1].float()
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    component = matrix.T @ vectors[:, -1]
    return (component / component.norm().clamp(min=1e-30)).float()


def _differences(rows: ClassRows, paired: bool) -> Tensor:
    if paired:
        return rows.positive - rows.negative
    middle = (rows.positive.mean(0) + rows.negative.mean(0)) / 2
    return torch.cat([rows.positive, rows.negative]) - middle


METHOD = Method(
    name="pca",
    function=principal_component,
    explanation="The direction along which the examples differ most: for paired examples. Of others it may find "
    "something else than the difference you mean.",
    source="Representation Engineering, arXiv 2310.01405",
    kind=SteeringVector.kind,
    needs_rows=True,
    unpaired="The examples are not paired: pca takes the direction along which all texts vary most, which need not be "
    "the difference between the two kinds. Pair them, or use caa.",
)
