"""Intervals: that they cover what they say, by simulation, and that they agree with slow ones."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from neurosteer.evaluation import intervals
from neurosteer.evaluation.intervals import difference_interval, mean_interval, share_interval

SHARES = (0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95)
TRIALS = 1000


def prompts_and_texts(share: float, n_prompts: int, n_samples: int, alike: float, seed: int) -> np.ndarray:
    """Verdicts `[TRIALS, n_prompts, n_samples]`: each prompt has a share of its own, so that two texts of a prompt
    correlate by `alike`; over all prompts it is `share`."""
    rng = np.random.default_rng(seed)
    if alike == 0:
        own = np.full((TRIALS, n_prompts, 1), share)
    else:
        strength = (1 - alike) / alike
        own = rng.beta(share * strength, (1 - share) * strength, size=(TRIALS, n_prompts, 1))
    return (rng.random((TRIALS, n_prompts, n_samples)) < own).astype(float)


def in_turn(n_prompts: int, n_samples: int, n_twins: int) -> np.ndarray:
    return (np.arange(n_prompts)[:, None] + np.arange(n_samples)) % n_twins


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("n_prompts", "n_samples", "alike"), [(16, 1, 0.0), (16, 6, 0.1), (16, 6, 0.3), (16, 6, 0.5), (32, 1, 0.0)]
)
def test_a_nominal_95_percent_interval_of_a_share_covers_it_at_least_92_times_in_100(
    share: float, n_prompts: int, n_samples: int, alike: float
) -> None:
    trials = np.sort(prompts_and_texts(share, n_prompts, n_samples, alike, seed=1).sum(2), 1)  # order says nothing
    kinds, counts = np.unique(trials, axis=0, return_counts=True)
    verdicts = (np.arange(n_samples) < kinds[:, :, None]).astype(float)
    found = [share_interval(one) for one in verdicts]
    covered = np.average([one.low <= share <= one.high for one in found], weights=counts)
    assert covered >= 0.92
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in found)


def test_the_interval_of_a_mean_score_covers_it() -> None:
    rng = np.random.default_rng(3)
    level = rng.beta(4, 1, size=(TRIALS, 16, 1))
    scores = np.clip(level + rng.normal(0, 0.05, size=(TRIALS, 16, 4)), 0, 1)
    truth = float(np.clip(rng.beta(4, 1, size=200_000) + rng.normal(0, 0.05, size=200_000), 0, 1).mean())
    found = [mean_interval(one) for one in scores]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.92
    assert np.mean([one.high - one.low for one in found]) < 0.3, "no wider than it must be"


@pytest.mark.parametrize(
    ("steered", "other", "n_prompts", "n_samples", "spread"),
    [(0.5, 0.5, 16, 1, 0.0), (0.9, 0.5, 16, 1, 0.2), (0.9, 0.5, 16, 6, 0.2), (0.95, 0.7, 32, 1, 0.2)],
)
def test_the_interval_of_a_difference_from_twins_covers_what_other_twins_and_prompts_would_give(
    steered: float, other: float, n_prompts: int, n_samples: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "N_RESAMPLES", 400)
    rng = np.random.default_rng(4)
    turns = in_turn(n_prompts, n_samples, 10)
    covered = []
    for trial in range(200):
        away = spread * (rng.random(10) < 0.5) * 2 - spread
        shares = np.clip(other + away, other - (1 - other), 1.0)
        own = (rng.random((n_prompts, n_samples)) < steered).astype(float)
        twins = (rng.random((n_prompts, n_samples)) < shares[turns]).astype(float)
        found = difference_interval(own - twins, trial, turns)
        covered.append(found.low <= steered - other <= found.high)
    assert np.mean(covered) >= 0.92


def test_paired_differences_are_known_better_than_the_two_intervals_apart() -> None:
    rng = np.random.default_rng(5)
    prompts = rng.random((32, 1)) < 0.5  # half of the prompts show it anyway
    before = prompts.astype(float)
    after = np.maximum(before, (rng.random((32, 1)) < 0.3).astype(float))
    found = difference_interval(after - before, 0)
    apart = share_interval(after).low - share_interval(before).high
    assert found.low > 0 > apart


def test_the_bootstrap_of_a_difference_agrees_with_a_slow_one() -> None:
    rng = np.random.default_rng(6)
    values = rng.uniform(-0.5, 1.0, size=(17, 2))
    means = values.mean(1)
    drawn = [np.mean([means[rng.integers(17)] for _ in range(17)]) for _ in range(4000)]
    tail = NormalDist().cdf(-math.sqrt(17 / 16) * 2.1199)  # the quantile of t with 16 degrees of freedom
    found = difference_interval(values, 0)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(np.quantile(drawn, tail), abs=0.03)
    assert found.high == pytest.approx(np.quantile(drawn, 1 - tail), abs=0.03)
    assert difference_interval(values, 0) == found != difference_interval(values, 1)


def test_wilsons_interval_is_the_one_of_the_books() -> None:
    verdicts = np.array([1.0] * 13 + [0.0] * 3)[:, None]
    found, z = share_interval(verdicts), 1.959963984540054
    for end in (found.low, found.high):  # where the distance from 13/16 is z standard errors of the end itself
        assert abs(13 / 16 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 16))


def test_where_all_texts_are_alike_the_interval_is_not_a_point() -> None:
    for shape in ((16, 1), (16, 6)):
        ones = share_interval(np.ones(shape))
        assert (ones.value, ones.high) == (1.0, 1.0) and 0.7 < ones.low < 0.85
        nothing = difference_interval(np.zeros(shape), 0)
        assert nothing.low == pytest.approx(-nothing.high) and 0.2 < nothing.high < 0.6
    alone = difference_interval(np.ones((1, 1)), 0)
    assert alone.low < 0.5
