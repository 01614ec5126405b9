"""Figures against naive re-implementations, one text and one number at a time."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import Tiny, Writes, naive_logits, texts

from neurosteer.evaluation import CallableJudge
from neurosteer.evaluation.intervals import Estimate, share_interval
from neurosteer.evaluation.metrics import (
    Sampled,
    corrected,
    difference_from_twins,
    distinct,
    figures_of,
    is_off_script,
    quality,
    wrong_way_rate,
)
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.measuring.preference import surprises


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two values that lie around it, as a ruler would."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    ordered = sorted(values)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def test_wrong_way_is_a_move_against_the_sign_and_no_move_is_none() -> None:
    plain, scores = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.6, 0.4, 0.5, 0.9])
    assert wrong_way_rate(scores, plain, 1.0) == 0.25
    assert wrong_way_rate(scores, plain, -2.0) == 0.5


def test_quality_and_distinct_by_hand() -> None:
    once, loop = "one two three four five", "a b a b a b a"  # 2 of 2 and 2 of 4 four-grams are different
    one, other = ([sum(map(ord, word)) for word in text.split()] for text in (once, loop))
    assert quality([one, other, [1, 2], []]) == pytest.approx((1.0 + 0.5) / 2)
    assert quality([[], [1]]) == 1.0
    assert distinct([one, other]) == pytest.approx((4 + 2) / (4 + 6))
    assert distinct([[1, 2], [1, 2]]) == 0.5 and distinct([[], [1]]) == 0.0


@pytest.mark.parametrize("text", ["好" * 16, "ดี" * 16, "la" * 16, "no " * 16])
def test_repetition_shows_in_every_script_with_or_without_spaces(llama: Tiny, text: str) -> None:
    assert quality([llama.lm.token_ids(text)]) < 0.5
    assert quality([llama.lm.token_ids("the quick brown fox jumps over a lazy dog")]) > 0.9


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


class Known:
    """A judge who finds 90% of what shows the behaviour, and takes 20% of the rest for it."""

    name, accuracy, n_accuracy, is_weak, sensitivity, specificity = "known", 0.85, 100, False, 0.9, 0.8

    def scores(self, texts: Sequence[str]) -> list[float]:
        return [0.5 for _ in texts]


def test_figures_are_those_computed_one_text_at_a_time() -> None:
    group, plain = sampled(1, 6, 3), sampled(3, 6, 2)
    found = figures_of(group, plain, -1.0, Known(), seed=9)
    shares, means, changes, wrong = [], [], [], 0
    for prompt in range(6):
        scores = [float(group.scores[prompt, sample]) for sample in range(3)]
        before = [float(plain.scores[prompt, sample]) for sample in range(2)]
        share, share_before = (sum(score >= 0.5 for score in some) / len(some) for some in (scores, before))
        shares.append(share)
        means.append(sum(scores) / 3)
        changes.append(share - share_before)
        wrong += sum(scores) / 3 > sum(before) / 2
    assert found.share == share_interval(group.verdicts) and found.share.value == pytest.approx(sum(shares) / 6)
    assert found.mean.value == pytest.approx(sum(means) / 6)
    assert found.change is not None and found.change.value == pytest.approx(sum(changes) / 6)
    assert found.wrong_way == pytest.approx(wrong / 6)
    assert group.kl is not None
    assert found.kl_p95 == pytest.approx(percentile(group.kl.ravel().tolist(), 0.95))
    surprise = float(group.nats.sum()) / sum(map(len, group.ids))
    before = float(plain.nats.sum()) / sum(map(len, plain.ids))
    assert found.perplexity == pytest.approx(math.exp(surprise - before))
    assert (found.n_texts, found.quality, found.distinct_2) == (18, quality(group.ids), distinct(group.ids))
    assert found.tokens == pytest.approx(sum(map(len, group.ids)) / 18)


def test_the_unsteered_texts_are_compared_with_nothing() -> None:
    plain = sampled(3, 4, 1)
    found = figures_of(plain, plain, 0.0, Known(), seed=0)
    assert (found.change, found.wrong_way, found.kl_p95, found.perplexity) == (None, None, 0.0, 1.0)


def test_figures_that_left_what_floats_hold_are_none() -> None:
    plain, steered = sampled(3, 4, 1), sampled(4, 4, 1)
    assert steered.kl is not None
    steered.kl[0, 0:2] = np.inf
    assert figures_of(steered, plain, 1.0, Known(), seed=0).kl_p95 is None
    silent = Sampled(plain.prompts, ("",) * 4, ((),) * 4, plain.scores, np.zeros((4, 1)))
    found = figures_of(silent, plain, 1.0, Known(), seed=0)
    assert found.perplexity is None and found.off_script == 1.0 and found.tokens == 0.0


def test_a_share_is_corrected_to_what_a_judge_who_is_always_right_would_find() -> None:
    rng = np.random.default_rng(0)
    shows = rng.random(100_000) < 0.3
    called = np.where(shows, rng.random(100_000) < 0.9, rng.random(100_000) < 0.2).mean()
    found = corrected(Estimate(float(called), 0.1, 0.95), Known())
    assert found is not None and found.value == pytest.approx(0.3, abs=0.01)
    assert (found.low, found.high) == (0.0, 1.0)
    unknown = CallableJudge("any", lambda text: True)
    assert corrected(Estimate(0.5, 0.4, 0.6), unknown) is None
    guessing = CallableJudge("yes", lambda text: True, ContrastSet(("a b", "c d"), ("e f", "g h")))
    assert (guessing.sensitivity, guessing.specificity) == (1.0, 0.0)
    assert corrected(Estimate(0.5, 0.4, 0.6), guessing) is None


def test_the_effect_is_told_in_standard_deviations_of_the_twins_own() -> None:
    plain, steered, twins = (sampled(seed, 6, 2) for seed in (1, 2, 3))
    turns = np.arange(6)[:, None] % 3 * np.ones((1, 2), dtype=int)
    taken = Sampled(twins.prompts, twins.texts, twins.ids, twins.scores, twins.nats, twins.kl, turns)
    effects = []
    for twin in range(3):
        cells = [(prompt, sample) for prompt in range(6) for sample in range(2) if prompt % 3 == twin]
        moved = [float(twins.scores[at] >= 0.5) - float(plain.scores[at] >= 0.5) for at in cells]
        effects.append(sum(moved) / len(moved))
    mean = sum(effects) / 3
    sd = math.sqrt(sum((effect - mean) ** 2 for effect in effects) / 2)
    own = float(((steered.scores >= 0.5) * 1.0 - (plain.scores >= 0.5)).mean())
    found = difference_from_twins(steered, taken, plain, -1.0, seed=0)
    assert (found.twin_mean, found.twin_sd) == (pytest.approx(mean), pytest.approx(sd))
    assert found.z == pytest.approx(-(own - mean) / sd)


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
