"""`sae`: features of a sparse autoencoder that fire more often on one class (NeuroSteer, OpenReview 2Jhf3xjaok)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosteer.artifacts.features import Feature
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import UsageError
from neurosteer.methods.base import Given, Layers, Method, Places, single_layers, together
from neurosteer.reading.request import Request
from neurosteer.reading.statistics import FeatureStatistics
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.validation import check_count, check_option

RANKS = ("rate", "dprime", "probe")
WEIGHTS = ("difference", "target")
SIDES = ("positive", "both")
CANDIDATES_PER_FEATURE = 4  # of which the output score keeps those that move the output
_PENALTIES = tuple(4.0**power / 100 for power in range(-3, 5))  # sklearn's C
_FOLDS = 5


def feature_direction(given: Given) -> SteeringVector:
    """Directions `[d_model]`: Σ weight × decoder row over the `top_k` features of each layer's SAE.

    Features are ranked by `rank`: `rate`, the share of tokens at which they fire on positives minus the same on
    negatives (the paper's); `dprime`, the difference of mean activations over the pooled standard deviation; `probe`,
    the weights of an L1 logistic regression on every text's mean features. `sides` says whether those on the
    negatives' side count too. The weight is the `difference` of the class means, or the mean activation on the
    `target`: positives, and with a minus sign negatives for features on their side.
    """
    directions: dict[int, Tensor] = {}
    features: list[Feature] = []
    for layer in given.layers:
        found = _features_of(given, layer)
        decoder = given.decoders[layer].cpu()
        weights = torch.tensor([feature.weight for feature in found])
        direction = weights @ decoder[[feature.index for feature in found]]
        directions[layer] = direction / direction.norm() if given.parameters["unit_norm"] else direction
        features += found
    return given.vector("sae", directions, features=tuple(features))


def _features_of(given: Given, layer: int) -> list[Feature]:
    activations, parameters = given.activations, given.parameters
    statistics, decoder = activations.features[layer], given.decoders[layer].cpu()
    scores = _scores(statistics, parameters["rank"], activations.n_positive, activations.paired)
    chosen = _strongest(scores, parameters)
    output: list[float | None] = [None] * len(chosen)
    least = parameters["min_output_score"]
    if least is not None:
        assert given.output_scores is not None
        signs = scores[chosen].sign().float()[:, None]
        moved = given.output_scores(layer, decoder[chosen] * signs)
        kept = (moved >= least).nonzero().flatten()[: parameters["top_k"]]
        if not len(kept):
            raise UsageError(
                f"No feature at layer {layer} has an output score of {least:g} or more (the highest is "
                f"{float(moved.max()):.3g}); lower min_output_score."
            )
        chosen, output = chosen[kept], moved[kept].tolist()
    weights = _weights(statistics, scores, parameters["weight"])
    return [
        Feature(
            layer=layer,
            index=index,
            weight=float(weights[index]),
            score=float(scores[index]),
            rates=_pair(statistics.rates, index),
            means_active=_pair(statistics.means_active, index),
            output_score=moves,
        )
        for index, moves in zip(chosen.tolist(), output, strict=True)
        if weights[index] != 0
    ]


def _scores(statistics: FeatureStatistics, rank: str, n_positive: int, paired: bool) -> Tensor:
    """One number per feature, positive where it belongs to the positives, float64 `[n_features]`."""
    if rank == "rate":
        return statistics.rates[0] - statistics.rates[1]
    if rank == "dprime":
        spread = (statistics.variances.sum(0) / 2).sqrt()
        difference = statistics.means[0] - statistics.means[1]
        return difference / spread.clamp(min=float(spread.mean()) * 1e-3 + 1e-30)
    return _probe_weights(statistics, n_positive, paired)


def _probe_weights(statistics: FeatureStatistics, n_positive: int, paired: bool) -> Tensor:
    """Weights of the L1 logistic regression on texts' mean features, each scaled by its standard deviation (so that a
    weight is an effect), under the strongest penalty that tells a held-out fifth of the texts apart best."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    rows = statistics.rows
    assert rows is not None
    width = statistics.sums.shape[1]
    matrix = csr_matrix(
        (rows.values.numpy(), rows.features.numpy(), rows.starts.numpy()), shape=(len(rows.starts) - 1, width)
    )
    labels = np.arange(len(rows.starts) - 1) < n_positive
    mean, mean_square = (np.asarray(m.mean(0)).ravel() for m in (matrix, matrix.multiply(matrix)))
    spread = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    scaled = matrix.multiply(1 / np.maximum(spread, spread.mean() * 1e-3 + 1e-12)).tocsr()
    others, held_out = _held_out_fifth(labels, paired)
    probes = [LogisticRegression(l1_ratio=1.0, solver="liblinear", C=penalty, random_state=0) for penalty in _PENALTIES]
    right = [probe.fit(scaled[others], labels[others]).score(scaled[held_out], labels[held_out]) for probe in probes]
    for place in sorted(range(len(probes)), key=lambda place: -right[place]):
        found = probes[place].fit(scaled, labels).coef_[0]
        if found.any():  # a penalty that leaves no feature can be right by chance
            return torch.from_numpy(found.astype(np.float64))
    return torch.zeros(width, dtype=torch.float64)


def _held_out_fifth(labels: np.ndarray, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Places of the other texts and of the fifth held out: drawn by chance, alike from both classes (positives first),
    both texts of a pair or none."""
    from sklearn.model_selection import StratifiedGroupKFold

    places, n_positive = np.arange(len(labels)), int(labels.sum())
    n_folds = max(2, min(_FOLDS, n_positive, len(labels) - n_positive))
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    return next(folds.split(places, labels, places % n_positive if paired else places))


def _strongest(scores: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Features by score, strongest first."""
    ranked = scores.clamp(min=0) if parameters["sides"] == "positive" else scores.abs()
    count = parameters["top_k"] * (1 if parameters["min_output_score"] is None else CANDIDATES_PER_FEATURE)
    values, places = ranked.topk(min(count, len(ranked)))
    places = places[values > 0]
    if not len(places):
        one_sided = parameters["sides"] == "positive"
        sides = "the positive texts than on the negative" if one_sided else "one class than the other"
        raise UsageError(f"No feature fires more on {sides}; are the two sets of examples different?")
    return places


def _weights(statistics: FeatureStatistics, scores: Tensor, weight: str) -> Tensor:
    means = statistics.means
    if weight == "difference":
        return means[0] - means[1]
    return torch.where(scores > 0, means[0], -means[1])


def _pair(values: Tensor, index: int) -> tuple[float, float]:
    return float(values[0, index]), float(values[1, index])


def _check(parameters: Mapping[str, Any]) -> None:
    for key, allowed in (("rank", RANKS), ("weight", WEIGHTS), ("sides", SIDES)):
        check_option(key, parameters[key], allowed)
    check_count("top_k", parameters["top_k"], 1, 10_000)
    least = parameters["min_output_score"]
    if least is not None and (not isinstance(least, (int, float)) or not math.isfinite(least)):
        raise UsageError(f"min_output_score is {least!r}; give a number, or leave it out.")
    if not isinstance(parameters["unit_norm"], bool):
        raise UsageError(f"unit_norm is {parameters['unit_norm']!r}; it must be true or false.")
    check_count("contexts", parameters["contexts"], 0, 3)


class _Features(Method):
    """Reads the features of SAEs, and works at any of their layers, or at all of them together."""

    needs_features = True
    spreads = False

    def request(self, parameters: Mapping[str, Any], places: Places, saes: Mapping[int, SparseAutoencoder]) -> Request:
        return Request(
            residual=places.chosen or places.candidates,
            encoders=saes,
            feature_rows=parameters["rank"] == "probe",
            prepend_bos=all(sae.prepend_bos for sae in saes.values()),
        )

    def layer_choices(self, candidates: Layers, everywhere: Layers, best: Sequence[int]) -> list[tuple[str, Layers]]:
        return [*single_layers(candidates), *together(candidates)]


METHOD = _Features(
    name="sae",
    function=feature_direction,
    explanation="Readable features of a sparse autoencoder that fire more on one kind of text, added up.",
    source="NeuroSteer, OpenReview 2Jhf3xjaok",
    kind=SteeringVector.kind,
    defaults={
        "sae": None,
        "rank": "rate",
        "top_k": 64,
        "weight": "difference",
        "sides": "both",
        "unit_norm": False,
        "min_output_score": None,
        "contexts": 3,
    },
    check=_check,
)
