"""What strength 1 means: KL held against one row at a time, amounts that reach it, and layers chosen at equal KL."""

import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from checks import Run
from tiny import (
    Tiny,
    Writes,
    ablating,
    clamping,
    make_circuit,
    make_vector,
    naive_greedy,
    naive_logits,
    texts,
    writes_of,
)

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import strength_meaning
from neurosteer.artifacts.recipes import UNSTEERED, Recipe, Use
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building import layer_choice
from neurosteer.building.build import build
from neurosteer.building.layer_choice import Candidate, Compared, pick, reason
from neurosteer.errors import ArtifactError, Cancelled, MismatchError, UsageError
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import calibration_prompts, neutral_prompts
from neurosteer.measuring import calibration
from neurosteer.measuring.calibration import TOLERANCE, calibrate, calibrate_each, kl_interval
from neurosteer.measuring.divergence import divergences, kl_percentile, unsteered_texts
from neurosteer.measuring.preference import Preference, preferences
from neurosteer.models.language_model import LanguageModel

PROMPTS = ["the cat sings", "we", "bread and cheese under the dark mountain, again. Why?", "日本 😀", "they never"]
N_TOKENS = 6
TEXTS = texts(110, seed=21)
EXAMPLES = ContrastSet(tuple(TEXTS[:55]), tuple(TEXTS[55:]), name="moods")


def naive_divergences(this: Tiny, prompt: str, use: Use, n_tokens: int = N_TOKENS) -> list[float]:
    ids = this.lm.prompt_ids(prompt)
    whole = ids + naive_greedy(this, ids, Writes(), n_tokens, stop=())
    rows = [naive_logits(this, whole, writes_of(uses)).double().log_softmax(-1) for uses in ([use], [])]
    steered, plain = (row[len(ids) - 1 : len(whole) - 1] for row in rows)
    return (steered.exp() * (steered - plain)).sum(-1).tolist()


def of(this: Tiny, artifact: Any) -> Any:
    return replace(artifact, model=this.lm.reference)


def naive_percentile(this: Tiny, artifact: Artifact, strength: float, percentile: float = 95.0) -> float:
    values = [value for prompt in PROMPTS for value in naive_divergences(this, prompt, Use(artifact, strength))]
    return float(torch.tensor(values, dtype=torch.float64).quantile(percentile / 100))


# --- KL --------------------------------------------------------------------------------------------------------------


def test_divergences_are_those_of_one_row_at_a_time_on_every_architecture(each: Tiny) -> None:
    uses = [Use(of(each, artifact)) for artifact in (make_vector(), ablating((1,), seed=2), make_circuit())]
    found = divergences(each.lm, unsteered_texts(each.lm, PROMPTS, N_TOKENS), [Recipe.of(use) for use in uses])
    wanted = torch.tensor([[naive_divergences(each, prompt, use) for prompt in PROMPTS] for use in uses])
    assert found.shape == (3, len(PROMPTS), N_TOKENS)
    torch.testing.assert_close(found, wanted.float(), rtol=2e-3, atol=2e-5)
    assert float(found.min(-1).values.max()) > 1e-4


def test_without_steering_there_is_no_divergence(llama: Tiny) -> None:
    found = divergences(llama.lm, unsteered_texts(llama.lm, PROMPTS, N_TOKENS), [UNSTEERED])
    assert float(found.abs().max()) < 1e-6


def test_a_push_beyond_what_numbers_hold_counts_as_infinite(llama: Tiny) -> None:
    huge = replace(of(llama, make_vector()), calibration=Calibration(1e38))
    found = divergences(llama.lm, unsteered_texts(llama.lm, PROMPTS[:1], 2), [Recipe.of(huge)])
    assert not found.isnan().any()


@pytest.mark.parametrize("percentile", [5.0, 50.0, 95.0, 100.0])
def test_the_percentile_is_numpys(percentile: float) -> None:
    values = torch.rand(37, generator=torch.Generator().manual_seed(0)).tolist()
    wanted = float(torch.tensor(values, dtype=torch.float64).quantile(percentile / 100))
    assert kl_percentile(values, percentile) == pytest.approx(wanted)
    assert kl_percentile([*values, math.inf], 100.0) == math.inf


def test_what_a_model_would_write_after_its_own_end_does_not_count(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = unsteered_texts(llama.lm, PROMPTS, N_TOKENS)
    written = [text.ids[text.first :] for text in whole.texts]
    end = written[0][2]
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", end)
    kept = [own.index(end) + 1 if end in own else N_TOKENS for own in written]  # the end itself is foretold, and counts
    assert min(kept) < N_TOKENS == max(kept)
    found = unsteered_texts(llama.lm, PROMPTS, N_TOKENS)
    assert found.counted.sum(1).tolist() == kept
    assert [text.ids[text.first :] for text in found.texts] == [own[:n] for own, n in zip(written, kept, strict=True)]
    use = Use(of(llama, make_vector()))
    (nats,) = divergences(llama.lm, found, [Recipe.of(use)])
    naive = [naive_divergences(llama, prompt, use)[:n] for prompt, n in zip(PROMPTS, kept, strict=True)]
    for row, wanted in zip(nats, naive, strict=True):
        assert row[: len(wanted)].tolist() == pytest.approx(wanted, rel=2e-3, abs=2e-5)
        assert row[len(wanted) :].isnan().all()
    flat = torch.tensor([value for row in naive for value in row], dtype=torch.float64)
    assert kl_percentile(nats.flatten().tolist(), 90.0) == pytest.approx(float(flat.quantile(0.9)), rel=2e-3)
    known = calibrate(llama.lm, use.artifact, target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS).calibration
    assert known.kl == pytest.approx(0.1, rel=TOLERANCE + 0.01) and known.kl_interval is not None


def test_the_interval_is_scipys_bootstrap_over_prompts() -> None:
    draw = np.random.default_rng(3)
    nats = draw.gamma(0.4, size=(24, 20)) * draw.gamma(2.0, size=(24, 1))  # prompts differ
    nats[5, 7:] = np.nan
    wanted = scipy.stats.bootstrap(
        (np.arange(24),), lambda rows: np.nanpercentile(nats[rows], 95.0), vectorized=False, method="percentile",
        n_resamples=2000, rng=draw,
    ).confidence_interval  # fmt: skip
    assert kl_interval(nats, 95.0) == pytest.approx(wanted, rel=0.1)
    assert kl_interval(nats, 95.0) == kl_interval(nats, 95.0)
    assert kl_interval(np.full((4, 6), 2.0), 95.0) == (2.0, 2.0)
    assert kl_interval(nats[:1], 95.0) is None and kl_interval(np.full((4, 6), np.inf), 95.0) is None


# --- amounts that reach it -------------------------------------------------------------------------------------------

KINDS: dict[str, Artifact] = {
    "add": make_vector(),
    "add at one layer": make_vector((3,), seed=4),
    "shift": make_circuit(operation="shift"),
    "clamp": clamping((2,), seed=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [0.02, 0.5])
def test_both_signs_come_to_the_target(llama: Tiny, kind: str, target: float) -> None:
    found = calibrate(llama.lm, of(llama, KINDS[kind]), target_kl=target, prompts=PROMPTS, n_tokens=N_TOKENS)
    known = found.calibration
    if known.note:
        assert kind == "clamp" and "Strength" in known.note
        return
    assert known.measured and known.kl is not None and known.kl_down is not None
    for strength, said in ((1.0, known.kl), (-1.0, known.kl_down)):
        measured = naive_percentile(llama, found, strength)
        assert measured == pytest.approx(said, rel=1e-2) and measured == pytest.approx(target, rel=TOLERANCE + 0.01)


def test_another_percentile_is_met_too(llama: Tiny) -> None:
    vector = of(llama, make_vector())
    found = calibrate(llama.lm, vector, target_kl=0.1, percentile=50.0, prompts=PROMPTS, n_tokens=N_TOKENS)
    assert naive_percentile(llama, found, 1.0, 50.0) == pytest.approx(0.1, rel=TOLERANCE + 0.01)
    assert found.calibration.percentile == 50.0


def test_what_was_done_is_recorded_and_survives_saving(llama: Tiny, tmp_path: Path) -> None:
    found = calibrate(llama.lm, of(llama, make_vector()), target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS)
    known = found.calibration
    assert (known.target_kl, known.percentile, known.n_tokens, known.n_prompts) == (0.1, 95.0, N_TOKENS, len(PROMPTS))
    other = calibrate(llama.lm, of(llama, make_vector()), target_kl=0.1, prompts=PROMPTS[1:], n_tokens=N_TOKENS)
    assert len(known.prompts_sha256) == 64 and other.calibration.prompts_sha256 != known.prompts_sha256
    for kl, ends in ((known.kl, known.kl_interval), (known.kl_down, known.kl_down_interval)):
        assert kl is not None and ends is not None and ends[0] < kl * 1.01 and kl * 0.99 < ends[1]
        assert f"{ends[0]:.2f} to {ends[1]:.2f}" in strength_meaning(found)
    assert load(save(found, tmp_path / "one")).calibration == known
    assert "calibrated: the 95th percentile" in strength_meaning(found) and "default" not in strength_meaning(found)


def test_an_ablation_that_takes_all_there_is_says_that_it_saturates(llama: Tiny) -> None:
    found = calibrate(llama.lm, of(llama, ablating((1,), seed=2)), target_kl=5.0, prompts=PROMPTS, n_tokens=N_TOKENS)
    assert found.calibration.amount == 1.0 and found.calibration.measured
    assert "Strength +1 saturates" in found.calibration.note


def test_neurons_that_are_scaled_go_down_to_off_and_up_beyond(llama: Tiny) -> None:
    found = calibrate(llama.lm, of(llama, make_circuit()), target_kl=0.05, prompts=PROMPTS, n_tokens=N_TOKENS)
    known = found.calibration
    assert known.amount > 1.0 and known.amount_down is not None and 0.0 <= known.amount_down < 1.0
    assert Use(found, -1.0).amount == pytest.approx(known.amount_down)
    assert known.kl is not None and naive_percentile(llama, found, 1.0) == pytest.approx(known.kl, rel=1e-2)
    assert known.kl_down is not None and naive_percentile(llama, found, -1.0) == pytest.approx(known.kl_down, rel=1e-2)


LAWS: dict[str, Callable[[float], float]] = {
    **{
        f"{scale:g} × amount^{power:g}": lambda amount, scale=scale, power=power: scale * amount**power
        for scale in (0.04, 1.0, 40.0, 1e3)
        for power in (1.0, 2.0, 3.5)
    },
    "slow, then saturating": lambda amount: 3.0 * amount**2 / (0.4 + amount**2),
    "steep at the end": lambda amount: 0.3 * amount + (10 * amount) ** 8 / 1e6,
    "beyond all numbers soon": lambda amount: math.inf if amount > 0.15 else 8 * amount,
}


@pytest.mark.parametrize("law", LAWS)
def test_whatever_way_kl_grows_a_few_amounts_find_the_target(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, law: str
) -> None:
    asked = made_up_kl(monkeypatch, LAWS[law])
    known = calibrate(llama.lm, of(llama, make_vector()), prompts=PROMPTS[:2], n_tokens=3).calibration
    for amount in (known.amount, known.amount_down or 0.0):
        assert LAWS[law](amount) == pytest.approx(1.0, rel=TOLERANCE + 1e-6), asked
    assert len(asked) < calibration.MAX_ROUNDS, asked
    if "amount^" in law:
        assert len(asked) <= 4, asked


def test_where_kl_jumps_over_the_target_the_search_ends_and_says_between_which_amounts(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = made_up_kl(monkeypatch, lambda amount: 0.05 if amount < 0.7 else 30.0)
    known = calibrate(llama.lm, of(llama, make_vector()), prompts=PROMPTS[:2], n_tokens=3).calibration
    assert len(asked) == calibration.MAX_ROUNDS and known.amount == pytest.approx(0.7, rel=0.3)
    low, high = map(float, re.findall(r"between (\S+) and (\S+)\.", known.note)[0])
    assert low < 0.7 <= high and high / low < 1.3


def made_up_kl(monkeypatch: pytest.MonkeyPatch, law: Callable[[float], float]) -> list[list[float]]:
    """KL as a function of the amount alone; returns the amounts asked for, a list for each round."""
    asked: list[list[float]] = []

    def divergences(lm: LanguageModel, texts: Any, recipes: Any, **_: Any) -> torch.Tensor:
        asked.append([abs(recipe.uses[0].amount) for recipe in recipes])
        return torch.tensor([law(amount) for amount in asked[-1]])[:, None, None].expand(-1, 2, 3)

    monkeypatch.setattr(calibration, "divergences", divergences)
    return asked


def test_what_has_no_effect_is_said_and_never_nan(llama: Tiny) -> None:
    still = replace(of(llama, make_circuit(operation="shift")), differences=torch.zeros(make_circuit().size))
    known = calibrate(llama.lm, still, prompts=PROMPTS[:2], n_tokens=3).calibration
    assert math.isfinite(known.amount) and known.kl == 0.0
    assert "does not reach 1 nats" in known.note


def test_doses_of_both_signs_and_of_several_artifacts_share_their_batches(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def count(lm: LanguageModel, texts: Any, recipes: Any, **named: Any) -> Any:
        asked.append(len(recipes))
        return divergences(lm, texts, recipes, **named)

    monkeypatch.setattr(calibration, "divergences", count)
    artifacts = [of(llama, make_vector(seed=seed)) for seed in range(3)]
    together = calibrate_each(llama.lm, artifacts, target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS)
    assert asked[0] == 6 and len(asked) <= 5
    for one, other in zip(together, artifacts, strict=True):
        alone = calibrate(llama.lm, other, target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS)
        assert one.calibration.amount == pytest.approx(alone.calibration.amount, rel=1e-3)


def test_amounts_found_before_are_where_the_search_begins(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = calibrate(llama.lm, of(llama, make_vector()), target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS)
    asked: list[int] = []
    original = calibration.divergences
    monkeypatch.setattr(
        calibration,
        "divergences",
        lambda lm, texts, recipes, **named: asked.append(len(recipes)) or original(lm, texts, recipes, **named),
    )
    again = calibrate(llama.lm, vector, target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS)
    assert asked == [2] and again.calibration.amount == vector.calibration.amount


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"target_kl": float("nan")}, "target_kl is nan"),
        ({"percentile": 101}, "percentile is 101"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"prompts": []}, "at least one"),
        ({"prompts": ["a", ""]}, "not empty"),
    ],
)
def test_what_cannot_be_meant_is_one_line(llama: Tiny, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(llama.lm, of(llama, make_vector()), **given)


def test_another_model_is_refused_and_a_cancelled_search_stops(llama: Tiny) -> None:
    reference = replace(llama.lm.reference, n_layers=7)
    with pytest.raises(MismatchError):
        calibrate(llama.lm, replace(make_vector(), model=reference), prompts=PROMPTS)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        calibrate(llama.lm, of(llama, make_vector()), prompts=PROMPTS, cancel=cancel)


# --- both signs in recipes and artifacts -----------------------------------------------------------------------------


def test_strengths_below_0_go_by_their_own_amount() -> None:
    vector = replace(make_vector(), calibration=Calibration(0.2, True, amount_down=0.1))
    assert [Use(vector, strength).amount for strength in (2.0, 0.0, -2.0)] == pytest.approx([0.4, 0.0, -0.2])
    circuit = replace(make_circuit(), calibration=Calibration(3.0, True, amount_down=0.4))
    assert [Use(circuit, strength).amount for strength in (1.0, 0.5, 0.0, -0.5, -1.0)] == pytest.approx(
        [3.0, 2.0, 1.0, 0.7, 0.4]
    )
    assert Use(circuit, multiplier=0.0).amount == 0.0


def test_a_vector_that_is_turned_round_takes_its_amounts_with_it() -> None:
    known = Calibration(0.2, True, amount_down=0.1, kl=1.0, kl_down=0.9, kl_interval=(0.8, 1.2))
    vector = replace(make_vector(), calibration=known)
    turned = (-vector).calibration
    assert (turned.amount, turned.amount_down, turned.kl, turned.kl_down) == (0.1, 0.2, 0.9, 1.0)
    assert (turned.kl_interval, turned.kl_down_interval) == (None, (0.8, 1.2))
    assert (2.0 * vector).calibration == vector.calibration
    assert not (vector + vector).calibration.measured


@pytest.mark.parametrize("key", ["amount_down", "kl", "target_kl"])
def test_amounts_that_are_no_numbers_are_refused(key: str) -> None:
    given: dict[str, Any] = {key: float("nan")}
    with pytest.raises(ArtifactError, match=key):
        Calibration(0.3, **given)


@pytest.mark.parametrize("ends", [[1.0], [2.0, 1.0], [0.0, float("inf")], "ab", [True, 2.0], 3.0])
def test_an_interval_is_two_numbers_in_order(ends: Any) -> None:
    with pytest.raises(ArtifactError, match="kl_down_interval"):
        Calibration(0.3, kl_down_interval=ends)


def test_an_artifact_written_without_intervals_is_read(tmp_path: Path) -> None:
    known = Calibration(0.2, True, amount_down=0.1, target_kl=1.0, percentile=95.0, kl=1.0, kl_down=0.9)
    folder = save(replace(make_vector(), calibration=known), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    for key in ("kl_interval", "kl_down_interval"):
        del config["calibration"][key]
    (folder / "config.json").write_text(json.dumps(config))
    found = load(folder)
    assert found.calibration == known and "interval" not in strength_meaning(found)


# --- layers ----------------------------------------------------------------------------------------------------------


def compared(name: str, layers: int, shifts: list[float], *, kl: float | None = 1.0) -> Compared:
    """A choice of layers that moves four positive and four negative texts by `shifts` each way."""
    artifact = replace(make_vector(), calibration=Calibration(0.2, True, target_kl=1.0, kl=kl, kl_down=1.0))
    both = torch.tensor([*shifts, *(-shift for shift in shifts)], dtype=torch.float64)
    preference = Preference(both, torch.zeros(8), torch.tensor([True] * 4 + [False] * 4))
    return Compared(Candidate(name, tuple(range(layers)), artifact), artifact, preference, None)


def test_of_choices_within_one_standard_error_the_simplest_is_taken() -> None:
    spread = compared("spread", 4, [1.1, 1.2, 1.3, 1.4])
    # Both lie as far below on average: one on every text, the other on some, above on others, which may be chance.
    always = compared("always", 1, [1.05, 1.15, 1.25, 1.35])
    at_times = compared("at times", 1, [0.9, 1.3, 1.1, 1.5])
    assert always.effect == pytest.approx(at_times.effect) and spread.effect - always.effect == pytest.approx(0.1)
    assert pick([spread, always]) is spread and pick([always, spread]) is spread
    assert pick([spread, at_times]) is at_times and pick([at_times, spread, always]) is at_times
    better = compared("better", 1, [0.9, 1.35, 1.15, 1.5])
    assert pick([spread, at_times, better]) is better  # as simple, and does more
    said = reason([at_times, spread, always])
    assert "at times: the fewest layers that do as much, within a standard error and 5%, at equal KL" in said
    assert "+2.400 ± " in said and "spread +2.500" in said and "chosen by it" in said
    assert "spread: the largest effect at equal KL" in reason([spread, always])


def test_what_texts_cannot_tell_apart_is_not_given_away() -> None:
    spread = compared("spread", 4, [0.1, 0.2, 0.3, 0.4])
    one = compared("one", 1, [-0.8, 1.1, -0.9, 1.2])  # two fifths less on average, and as uncertain as can be
    assert spread.preference.error_of_difference(one.preference) > spread.effect - one.effect > 0.05 * spread.effect
    assert pick([spread, one]) is spread


@pytest.mark.parametrize("kl", [1.16, None])
def test_a_choice_beyond_the_kl_does_not_win_by_overshooting(kl: float | None) -> None:
    fair, over = compared("fair", 3, [0.1, 0.1, 0.1, 0.2]), compared("over", 1, [0.9, 0.9, 0.9, 0.8], kl=kl)
    assert pick([over, fair]) is fair and "over +1.750 beyond that KL" in reason([fair, over])
    assert fair.figures({})["beyond_kl"] is False and over.figures({})["beyond_kl"] is True
    saturated = compared("saturated", 1, [0.4, 0.4, 0.4, 0.5], kl=0.3)  # does more with less
    assert pick([fair, saturated]) is saturated
    assert pick([over]) is over
    broken = compared("broken", 1, [math.nan] * 4, kl=None)
    assert pick([broken, fair]) is fair and broken.figures({})["effect"] is None


def test_figures_have_three_decimals_at_most() -> None:
    one = compared("one", 2, [0.123456, 0.2, 0.3, 0.4], kl=0.98765).figures({0: 0.61234, 1: 0.7})
    assert one["effect"] == 0.512 and one["separation"] == 0.656 and one["kl"] == [0.988, 1.0]
    assert 0 < one["effect_error"] < 0.5 and json.dumps(one)


def test_auto_takes_the_choice_that_does_most_at_equal_kl_on_texts_kept_out(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(lm: LanguageModel, texts: Any, pairs: Any, **named: Any) -> Any:
        seen["texts"], seen["pairs"] = texts, pairs
        seen["found"] = preferences(lm, texts, pairs, **named)
        return seen["found"]

    monkeypatch.setattr(layer_choice, "preferences", spy)
    artifact = build(llama.lm, EXAMPLES, target_kl=0.1)
    source = artifact.provenance
    effects = [one["effect"] for one in source.candidates]
    assert len(effects) >= 3 and effects[1:] == sorted(effects[1:], reverse=True)
    assert sorted(effects) == sorted(round(one.effect, 3) for one in seen["found"])
    assert artifact.layers == source.candidates[0]["layers"]
    best = max(seen["found"], key=lambda one: one.effect)
    lacking = {one: best.effect - one.effect <= best.error_of_difference(one) for one in seen["found"]}
    as_good = [round(one.effect, 3) for one, close in lacking.items() if close]
    fewest = min(len(one["layers"]) for one in source.candidates if one["effect"] in as_good)
    assert effects[0] in as_good and len(artifact.layers) == fewest
    assert source.candidates[0]["label"] in source.layer_choice and "equal KL" in source.layer_choice
    assert all(abs(kl / 0.1 - 1) < 0.16 for one in source.candidates for kl in one["kl"])
    kept, held = EXAMPLES.parts(0.2, seed=HOLD_OUT_SEED, at_most=12)
    assert (source.n_positive, source.n_negative) == (len(kept.positive), len(kept.negative)) == (44, 44)
    own = [llama.lm.frame([text], "answer", max_tokens=128)[0].ids for text in (*held.positive, *held.negative)]
    assert [text.ids for text in seen["texts"]] == own
    assert source.examples_sha256 == EXAMPLES.sha256
    assert artifact.calibration.kl == pytest.approx(0.1, rel=TOLERANCE + 0.01)


@pytest.mark.parametrize(("method", "spreads"), [("caa", 3), ("pca", 1), ("probe", 1)])
def test_single_layers_and_spreads_are_compared(llama: Tiny, method: str, spreads: int) -> None:
    source = build(llama.lm, EXAMPLES, method=method, target_kl=0.1).provenance
    labels = [one["label"] for one in source.candidates]
    assert sum("together" in label for label in labels) == spreads and any("together" not in label for label in labels)


def test_circuits_compare_where_their_neurons_write_to(llama: Tiny) -> None:
    source = build(llama.lm, EXAMPLES, method="cna", target_kl=0.02, skip_layers=[]).provenance
    assert all(one["label"].startswith("neurons up to layer") for one in source.candidates)


def test_few_examples_and_layers_that_are_named_leave_nothing_to_compare(llama: Tiny) -> None:
    few = ContrastSet(EXAMPLES.positive[:8], EXAMPLES.negative[:8])
    for artifact in (build(llama.lm, few, target_kl=0.1), build(llama.lm, EXAMPLES, layers=2, target_kl=0.1)):
        assert artifact.provenance.candidates == () and artifact.calibration.measured


def test_what_is_held_out_takes_no_part(llama: Tiny) -> None:
    half = build(llama.lm, EXAMPLES, layers=2, hold_out=0.5, calibrate=False)
    kept, held = EXAMPLES.parts(0.5, seed=HOLD_OUT_SEED)
    alone = build(llama.lm, kept, layers=2, calibrate=False)
    assert isinstance(half, SteeringVector) and isinstance(alone, SteeringVector)
    assert torch.equal(half.directions[2], alone.directions[2])
    assert (half.provenance.hold_out, half.provenance.n_positive) == (0.5, 27)
    assert not {*kept.positive, *kept.negative} & {*held.positive, *held.negative}
    with pytest.raises(ArtifactError, match="hold_out"):
        replace(half.provenance, hold_out=1.0)


def test_the_prompts_calibrated_on_are_none_of_those_measured_on() -> None:
    assert len(calibration_prompts()) == 24 and not {*calibration_prompts()} & {*neutral_prompts()}


# --- command line, and the embedded model ----------------------------------------------------------------------------


def test_the_command_line_builds_calibrated_and_calibrates_anew(
    run: Run, model_folder: Path, tmp_path: Path, llama: Tiny
) -> None:
    table = tmp_path / "moods.csv"
    rows = [f'"{text}",{label}' for label, side in (("pos", TEXTS[:12]), ("neg", TEXTS[12:24])) for text in side]
    table.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    out, model = tmp_path / "mood", str(model_folder)
    built = run("build", table, "--model", model, "--layers", 2, "--target-kl", 0.1, "--out", out, "--json")
    assert built.code == 0, built.err
    known = json.loads(built.out)["calibration"]
    assert known["measured"] and known["kl"] == pytest.approx(0.1, rel=TOLERANCE + 0.01)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    again = run("calibrate", out, "--model", model, "--target-kl", 0.2, "--prompts", prompts, "--tokens", 5, "--json")
    assert again.code == 0, again.err
    assert load(out).calibration.n_prompts == len(PROMPTS) and load(out).calibration.target_kl == 0.2
    plain = run("build", table, "--model", model, "--no-calibrate", "--out", tmp_path / "plain", "--json")
    assert plain.code == 0 and not json.loads(plain.out)["calibration"]["measured"]
    wrong = run("calibrate", out, "--model", model, "--target-kl", -1)
    assert wrong.code == 2 and "target_kl is -1.0" in wrong.err and load(out).calibration.target_kl == 0.2


@pytest.mark.embedded
def test_strength_1_means_as_much_on_prompts_it_was_not_calibrated_on(embedded_lm: LanguageModel) -> None:
    circuit = build(embedded_lm, _half_of_sentiment(), method="cna", layers="0-16", calibrate=False)
    circuit = calibrate(embedded_lm, circuit, prompts=calibration_prompts()[::2])
    texts_read = unsteered_texts(embedded_lm, neutral_prompts()[::5], 20)
    for values in divergences(embedded_lm, texts_read, [Recipe.of((circuit, 1.0)), Recipe.of((circuit, -1.0))]):
        assert 0.5 < kl_percentile(values.flatten().tolist(), 95.0) < 2.0


def _half_of_sentiment() -> ContrastSet:
    from neurosteer.examples.reading import read_examples

    return read_examples("sentiment").parts(0.5, seed=0)[0]
