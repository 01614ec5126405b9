"""What strength 1 means: KL held against one row at a time, amounts that reach it, and layers chosen at equal KL."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
from neurosteer.errors import ArtifactError, Cancelled, MismatchError, UsageError
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import calibration_prompts, neutral_prompts
from neurosteer.measuring import calibration
from neurosteer.measuring.calibration import calibrate, calibrate_each, kl_percentile
from neurosteer.measuring.divergence import divergences, unsteered_texts
from neurosteer.measuring.preference import preferences
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
        assert measured == pytest.approx(said, rel=1e-2) and measured == pytest.approx(target, rel=0.04)


def test_another_percentile_is_met_too(llama: Tiny) -> None:
    vector = of(llama, make_vector())
    found = calibrate(llama.lm, vector, target_kl=0.1, percentile=50.0, prompts=PROMPTS, n_tokens=N_TOKENS)
    assert naive_percentile(llama, found, 1.0, 50.0) == pytest.approx(0.1, rel=0.04)
    assert found.calibration.percentile == 50.0


def test_what_was_done_is_recorded_and_survives_saving(llama: Tiny, tmp_path: Path) -> None:
    found = calibrate(llama.lm, of(llama, make_vector()), target_kl=0.1, prompts=PROMPTS, n_tokens=N_TOKENS)
    known = found.calibration
    assert (known.target_kl, known.percentile, known.n_tokens, known.n_prompts) == (0.1, 95.0, N_TOKENS, len(PROMPTS))
    other = calibrate(llama.lm, of(llama, make_vector()), target_kl=0.1, prompts=PROMPTS[1:], n_tokens=N_TOKENS)
    assert len(known.prompts_sha256) == 64 and other.calibration.prompts_sha256 != known.prompts_sha256
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
    assert asked[0] == 18 and len(asked) <= 5
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
    vector = replace(make_vector(), calibration=Calibration(0.2, True, amount_down=0.1, kl=1.0, kl_down=0.9))
    turned = (-vector).calibration
    assert (turned.amount, turned.amount_down, turned.kl, turned.kl_down) == (0.1, 0.2, 0.9, 1.0)
    assert (2.0 * vector).calibration == vector.calibration
    assert not (vector + vector).calibration.measured


@pytest.mark.parametrize("key", ["amount_down", "kl", "target_kl"])
def test_amounts_that_are_no_numbers_are_refused(key: str) -> None:
    given: dict[str, Any] = {key: float("nan")}
    with pytest.raises(ArtifactError, match=key):
        Calibration(0.3, **given)


# --- layers ----------------------------------------------------------------------------------------------------------


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
    assert len(effects) >= 3 and effects == sorted(effects, reverse=True)
    assert max(one.effect for one in seen["found"]) == pytest.approx(effects[0], abs=1e-5)
    assert artifact.layers == source.candidates[0]["layers"]
    assert source.candidates[0]["label"] in source.layer_choice and "equal KL" in source.layer_choice
    assert all(abs(kl / 0.1 - 1) < 0.16 for one in source.candidates for kl in one["kl"])
    kept, held = EXAMPLES.parts(0.2, seed=HOLD_OUT_SEED, at_most=12)
    assert (source.n_positive, source.n_negative) == (len(kept.positive), len(kept.negative)) == (44, 44)
    own = [llama.lm.frame([text], "answer", max_tokens=128)[0].ids for text in (*held.positive, *held.negative)]
    assert [text.ids for text in seen["texts"]] == own
    assert source.examples_sha256 == EXAMPLES.sha256
    assert artifact.calibration.kl == pytest.approx(0.1, rel=0.04)


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
    assert known["measured"] and known["kl"] == pytest.approx(0.1, rel=0.04)
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
