"""Figures against naive re-implementations, one text and one number at a time."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import Tiny, Writes, naive_logits, texts

from neurosteer.evaluation.damage import surprises
from neurosteer.evaluation.metrics import (
    Sampled,
    bootstrap,
    distinct,
    figures,
    is_off_script,
    quality,
    wrong_way_rate,
)


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two values that lie around it, as a ruler would."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    ordered = sorted(values)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def test_the_bootstrap_agrees_with_a_slow_one() -> None:
    rng = random.Random(0)
    values = [rng.random() ** 2 for _ in range(17)]
    draws = np.random.default_rng(5).integers(0, 17, size=(2000, 17)).tolist()
    means = [sum(values[place] for place in draw) / 17 for draw in draws]
    found = bootstrap(np.array(values), 5)
    assert found.value == pytest.approx(sum(values) / 17)
    assert found.low == pytest.approx(percentile(means, 0.025))
    assert found.high == pytest.approx(percentile(means, 0.975))


def test_another_generators_bootstrap_finds_nearly_the_same_interval() -> None:
    rng = random.Random(1)
    values = [float(rng.random() < 0.4) for _ in range(40)]
    means = [sum(rng.choice(values) for _ in values) / 40 for _ in range(4000)]
    found = bootstrap(np.array(values), 0)
    assert found.low == pytest.approx(percentile(means, 0.025), abs=0.03)
    assert found.high == pytest.approx(percentile(means, 0.975), abs=0.03)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(300):
        found = bootstrap(rng.normal(0.3, 0.2, size=50), trial)
        held += found.low <= 0.3 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_wrong_way_is_a_move_against_the_sign_and_no_move_is_none() -> None:
    plain, scores = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.6, 0.4, 0.5, 0.9])
    assert wrong_way_rate(scores, plain, 1.0) == 0.25
    assert wrong_way_rate(scores, plain, -2.0) == 0.5


def test_quality_and_distinct_by_hand() -> None:
    once, loop = "one two three four five", "a b a b a b a"  # 2 of 2 and 2 of 4 four-grams are different
    assert quality([once, loop, "too short", ""]) == pytest.approx((1.0 + 0.5) / 2)
    assert quality(["", "short"]) == 1.0
    assert distinct([once, loop]) == pytest.approx((4 + 2) / (4 + 6))
    assert distinct(["a b", "a b"]) == 0.5 and distinct(["", "one"]) == 0.0


@pytest.mark.parametrize(
    ("prompt", "text", "ids", "off"),
    [
        ("Describe a street.", "The street is long.", range(9), False),
        ("Describe a street.", " \n\t", [1], True),
        ("Describe a street.", "", [], True),
        ("Describe a street.", "?!?! ... a", range(5), True),
        ("Describe a street.", "1, 2, 3", range(5), False),
        ("Describe a street.", "Это длинная улица.", range(9), True),
        ("Describe a street.", "日本の通りです", range(9), True),
        ("Опиши улицу.", "Это длинная улица.", range(9), False),
        ("通りについて", "日本の通りです", range(9), False),
        ("Describe a street.", "A rue naïve, où l’été dure.", range(9), False),
        ("Describe a street.", "la la la la la la la la", [5] * 8, True),
        ("Describe a street.", "la la la la la la la", [5] * 7, False),
        ("Describe a street.", "la lu la li la le la lo", [5, 6, 5, 7, 5, 8, 5, 9], False),
        ("1 + 1 =", "two", [3], False),
    ],
)
def test_off_script_is_what_its_definition_says(prompt: str, text: str, ids: Sequence[int], off: bool) -> None:
    assert is_off_script(prompt, text, list(ids)) is off


def sampled(seed: int, n_prompts: int, n_samples: int) -> Sampled:
    rng = random.Random(seed)
    words = texts(200, seed=seed)
    chosen = tuple(rng.choice(words) for _ in range(n_prompts * n_samples))
    shape = (n_prompts, n_samples)
    ids = tuple(tuple(rng.randrange(50) for _ in range(rng.randrange(12))) for _ in chosen)
    return Sampled(
        tuple(f"prompt {place}" for place in range(n_prompts)),
        chosen,
        ids,
        np.array([rng.random() for _ in chosen]).reshape(shape),
        np.array([rng.random() * len(tokens) for tokens in ids]).reshape(shape),
        np.array([[rng.random() for _ in range(5)] for _ in range(n_prompts)]),
    )


def test_figures_are_those_computed_one_text_at_a_time() -> None:
    group, plain = sampled(1, 6, 3), sampled(3, 6, 2)
    found = figures(group, plain, -1.0, seed=9)
    shares, means, changes, wrong = [], [], [], 0
    for prompt in range(6):
        scores = [float(group.scores[prompt, sample]) for sample in range(3)]
        before = [float(plain.scores[prompt, sample]) for sample in range(2)]
        share, share_before = (sum(score >= 0.5 for score in some) / len(some) for some in (scores, before))
        shares.append(share)
        means.append(sum(scores) / 3)
        changes.append(share - share_before)
        wrong += sum(scores) / 3 > sum(before) / 2
    assert found.share == bootstrap(np.array(shares), 9)
    assert found.mean.value == pytest.approx(sum(means) / 6)
    assert found.change is not None and found.change.value == pytest.approx(sum(changes) / 6)
    assert found.wrong_way == pytest.approx(wrong / 6)
    assert group.kl is not None
    assert found.kl_p95 == pytest.approx(percentile(group.kl.ravel().tolist(), 0.95))
    surprise = float(group.nats.sum()) / sum(map(len, group.ids))
    before = float(plain.nats.sum()) / sum(map(len, plain.ids))
    assert found.perplexity == pytest.approx(math.exp(surprise - before))
    assert (found.n_texts, found.quality, found.distinct_2) == (18, quality(group.texts), distinct(group.texts))
    assert found.tokens == pytest.approx(sum(map(len, group.ids)) / 18)


def test_the_unsteered_texts_are_compared_with_nothing() -> None:
    plain = sampled(3, 4, 1)
    found = figures(plain, plain, 0.0, seed=0)
    assert (found.change, found.wrong_way, found.kl_p95, found.perplexity) == (None, None, 0.0, 1.0)


def test_figures_that_left_what_floats_hold_are_none() -> None:
    plain, steered = sampled(3, 4, 1), sampled(4, 4, 1)
    assert steered.kl is not None
    steered.kl[0, 0:2] = np.inf
    assert figures(steered, plain, 1.0, seed=0).kl_p95 is None
    silent = Sampled(plain.prompts, ("",) * 4, ((),) * 4, plain.scores, np.zeros((4, 1)))
    found = figures(silent, plain, 1.0, seed=0)
    assert found.perplexity is None and found.off_script == 1.0 and found.tokens == 0.0


def test_surprise_is_what_the_unsteered_model_alone_says_of_each_token(each: Tiny) -> None:
    prompts = ["the cat runs", "a dog", "the cat runs", "we"]
    ids = [[5, 70, 260], [], [41], list(range(100, 117))]
    found = surprises(each.lm, prompts, ids)
    for prompt, tokens, nats in zip(prompts, ids, found.tolist(), strict=True):
        start = each.lm.prompt_ids(prompt)
        logits = naive_logits(each, [*start, *tokens], Writes()).double()
        expected = 0.0
        for place, token in enumerate(tokens):
            expected -= float(torch.log_softmax(logits[len(start) + place - 1], -1)[token])
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-6)
