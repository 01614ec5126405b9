"""`probe`: the direction of a logistic regression that tells the classes apart (linear probing)."""

import numpy as np
import torch
from torch import Tensor

from neurosteer.artifacts.vector import SteeringVector
from neurosteer.methods.base import Given, Method
from neurosteer.reading.statistics import ClassRows
from neurosteer.validation import check_number


def probe_direction(given: Given) -> SteeringVector:
    """Directions `[d_model]`: the regression's weights, in units of the residual stream."""
    penalty, rows = float(given.parameters["penalty"]), given.activations.rows
    return given.vector("probe", {layer: _regression(rows[layer], penalty) for layer in given.layers})


def _regression(rows: ClassRows, penalty: float) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([rows.positive, rows.negative]).double().numpy()
    labels = np.repeat([1, 0], [len(rows.positive), len(rows.negative)])
    centre = features.mean(0)
    # One scale for all dimensions: per-dimension scaling would blow up the ones that hardly vary.
    scale = float(np.sqrt(((features - centre) ** 2).sum(1).mean())) or 1.0
    regression = LogisticRegression(C=1.0 / penalty, class_weight="balanced", max_iter=1000)
    regression.fit((features - centre) / scale, labels)
    return torch.from_numpy(regression.coef_[0] / scale).float()


METHOD = Method(
    name="probe",
    function=probe_direction,
    explanation="The direction by which a trained classifier (logistic regression) tells them apart.",
    source="linear probing, arXiv 1610.01644",
    kind=SteeringVector.kind,
    needs_rows=True,
    defaults={"penalty": 0.01},
    check=lambda parameters: check_number("penalty", parameters["penalty"], 1e-12, 1e12),
)
