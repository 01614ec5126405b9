"""95% intervals of means over prompts, and of differences between two groups of texts of the same prompts.

Values are `[n_prompts, n_samples]`. Texts of one prompt are alike, so prompts are what counts, and not texts; where
random twins wrote the texts, `twins` of the same shape says which one, and another set of twins would have given other
figures too.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

N_RESAMPLES = 2000
LEVEL = 0.95
_TAIL = (1 - LEVEL) / 2
_NORMAL_QUANTILE = float(stats.norm.ppf(1 - _TAIL))
_UNSEEN = 0.05
"""The likeness of texts of one prompt shows too little in few prompts: by such a part of the way from what is found to
its largest value, texts are taken to be more alike."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval of 95%."""

    value: float
    low: float
    high: float


def share_interval(verdicts: np.ndarray, twins: np.ndarray | None = None) -> Estimate:
    """The share of texts that are true (1, else 0), with Wilson's interval for as many independent texts as tell as
    much. With one text a prompt that is their number. With several it is divided by the design effect, which is how
    much larger the variance between prompts (or twins) is than that of independent texts."""
    share, n_texts, n_clusters = float(verdicts.mean()), verdicts.size, _fewest(verdicts, twins)
    largest = n_texts / n_clusters
    independent = share * (1 - share) / n_texts
    effect = largest if independent == 0 else min(max(_variance(verdicts, twins) / independent, 1.0), largest)
    effect += _UNSEEN * (largest - effect)
    quantile = _NORMAL_QUANTILE if largest == 1 else _t_quantile(n_clusters)
    return _wilson(share, n_texts / effect, quantile)


def mean_interval(scores: np.ndarray, twins: np.ndarray | None = None) -> Estimate:
    """The mean of `scores` from 0 to 1, with Wilson's interval for as many yes-or-no texts as have its variance."""
    mean, variance = float(scores.mean()), _variance(scores, twins)
    if variance == 0:
        return Estimate(mean, mean, mean)
    return _wilson(mean, mean * (1 - mean) / variance, _t_quantile(_fewest(scores, twins)))


def difference_interval(differences: np.ndarray, seed: int, twins: np.ndarray | None = None) -> Estimate:
    """The mean of `differences` from −1 to 1, each between two texts of one prompt and sample, with a bootstrap
    interval: 2,000 sets of as many prompts are drawn with replacement, and as many twins.

    Quantiles lie further out than those of 95%, as far as t is wider than the normal distribution and n wider than
    n − 1: without that, intervals from few prompts are too narrow. What differs at random from text to text shows both
    between prompts and between twins, but is counted once. Where all differ alike nothing can be drawn, and the
    interval is Wilson's for the number of prompts (or twins).
    """
    mean, fewest = float(differences.mean()), _fewest(differences, twins)
    if fewest < 2 or np.ptp(differences) == 0:
        found = _wilson((mean + 1) / 2, fewest, _NORMAL_QUANTILE)
        return Estimate(mean, 2 * found.low - 1, 2 * found.high - 1)
    moved = _drawn(differences, np.indices(differences.shape)[0], seed)
    if twins is not None:
        by_twin = _drawn(differences, twins, seed + 1)
        parts = moved.var(), by_twin.var()
        once = max(*parts, sum(parts) - differences.var() / differences.size)
        moved = (moved + by_twin) * math.sqrt(once / max(sum(parts), 1e-300))
    tail = stats.norm.cdf(-math.sqrt(fewest / (fewest - 1)) * _t_quantile(fewest))
    low, high = mean + np.quantile(moved, [tail, 1 - tail])
    return Estimate(mean, max(float(low), -1.0), min(float(high), 1.0))


def _drawn(values: np.ndarray, clusters: np.ndarray, seed: int) -> np.ndarray:
    """By how much the means of sets of clusters drawn with replacement differ from the mean of all, `[N_RESAMPLES]`.
    The same seed draws the same sets."""
    sums = np.bincount(clusters.ravel(), values.ravel())
    counts = np.bincount(clusters.ravel())
    there = counts > 0
    drawn = np.random.default_rng(seed).multinomial(there.sum(), np.full(there.sum(), 1 / there.sum()), N_RESAMPLES)
    return (drawn @ sums[there]) / (drawn @ counts[there]) - values.mean()


def _variance(values: np.ndarray, twins: np.ndarray | None) -> float:
    """Of the mean, from the differences between prompts; with twins, between prompts and between twins, where what
    differs from text to text is counted once."""
    between = _between(values, np.indices(values.shape)[0])
    if twins is None:
        return between
    other = _between(values, twins)
    return max(between, other, between + other - float(values.var()) / values.size)


def _between(values: np.ndarray, clusters: np.ndarray) -> float:
    """The variance of the mean from the differences between clusters."""
    off = np.bincount(clusters.ravel(), (values - values.mean()).ravel())
    n_clusters = len(np.unique(clusters))
    if n_clusters < 2:
        return 0.0
    return float((off**2).sum()) / values.size**2 * n_clusters / (n_clusters - 1)


def _fewest(values: np.ndarray, twins: np.ndarray | None) -> int:
    return len(values) if twins is None else min(len(values), len(np.unique(twins)))


def _t_quantile(n_clusters: int) -> float:
    return float(stats.t.ppf(1 - _TAIL, max(1, n_clusters - 1)))


def _wilson(mean: float, n: float, quantile: float) -> Estimate:
    """Wilson's score interval of a share `mean` of `n` (which need not be whole)."""
    wide = quantile**2 / n
    middle = (mean + wide / 2) / (1 + wide)
    half = math.sqrt(wide * mean * (1 - mean) + wide**2 / 4) / (1 + wide)
    return Estimate(mean, min(max(middle - half, 0.0), mean), max(min(middle + half, 1.0), mean))
