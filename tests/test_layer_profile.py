"""The view by layer, against log-likelihoods of one unpadded row at a time under hooks of our own."""

import csv
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file
from tiny import (
    D_MODEL,
    N_LAYERS,
    Tiny,
    Writes,
    build,
    make_circuit,
    make_tiny,
    make_vector,
    naive_logits,
    texts,
    writes_of,
)

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Use
from neurosteer.artifacts.vector import SteeringVector, unit
from neurosteer.building import layer_profile
from neurosteer.building.layer_choice import TOLERANCE
from neurosteer.building.layer_plot import profile_figure, write_profile
from neurosteer.building.layer_profile import (
    LayerFigures,
    LayerProfile,
    profile_data,
    random_twin,
)
from neurosteer.errors import Cancelled, ExamplesError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import calibration_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.measuring import preference
from neurosteer.measuring.calibration import calibrate_each
from neurosteer.measuring.preference import Preference
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering import forcing


def contrast(count: int = 15, *, longest: int = 12) -> ContrastSet:
    """`count` texts of each class, told apart by a word in their middle."""
    found = texts(2 * count, seed=21, longest=longest)
    positive, negative = found[:count], found[count:]
    return ContrastSet(
        tuple(f"{text} happy {text[:9]}" for text in positive), tuple(f"{text} sad {text[:9]}" for text in negative)
    )


EXAMPLES = contrast()
TARGET = 0.1


def profile_layers(*given: Any, **named: Any) -> LayerProfile:
    """At a KL that the tiny random models can be brought to."""
    return layer_profile.profile_layers(*given, **{"target_kl": TARGET, **named})


def parts(examples: ContrastSet) -> tuple[ContrastSet, list[str], list[str]]:
    """What is built from, and the positive and negative texts held out."""
    split = examples.split(0.2, at_most=32)
    train = ContrastSet(
        tuple(examples.positive[place] for place in split.train_positive),
        tuple(examples.negative[place] for place in split.train_negative),
        examples.name,
    )
    held_positive = [examples.positive[place] for place in split.held_out_positive]
    return train, held_positive, [examples.negative[place] for place in split.held_out_negative]


def row_of(lm: LanguageModel, text: str, framing: str) -> tuple[list[int], range]:
    """Ids of a text and the places of its own tokens, spelled out for the tests' chat template."""

    def ids(part: str) -> list[int]:
        return lm.tokenizer(part, add_special_tokens=False)["input_ids"]

    own = ids(text)
    if framing == "raw":
        whole = lm.tokenizer(text)["input_ids"]
        return whole, range(max(1, len(whole) - len(own)), len(whole))
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    start, end = (ids(before), ids(after)) if framing == "prompt" else (ids(before + after), [])
    return start + own + end, range(len(start), len(start) + len(own))


def naive_scores(this: Tiny, text: str, framing: str, writes: Writes) -> tuple[float, int]:
    """The log-likelihood of a text's own tokens, one after the other, and how many they are."""
    ids, places = row_of(this.lm, text, framing)
    probabilities = naive_logits(this, ids, writes).double().log_softmax(-1)
    return sum(float(probabilities[place - 1, ids[place]]) for place in places), len(places)


def naive_effect_and_damage(
    this: Tiny, artifact: Any, positive: list[str], negative: list[str], framing: str
) -> tuple[float, float]:
    """Every text weighs the same, and so does every class."""
    preference, likelihood = {}, {}
    for strength in (0.0, 1.0, -1.0):
        writes = writes_of([Use(artifact, strength)]) if strength else Writes()
        sides = [[naive_scores(this, text, framing, writes) for text in side] for side in (positive, negative)]
        up, down = (sum(score / count for score, count in side) / len(side) for side in sides)
        preference[strength] = up - down
        likelihood[strength] = (up + down) / 2
    effect = (preference[1.0] - preference[-1.0]) / 2
    return effect, likelihood[0.0] - (likelihood[1.0] + likelihood[-1.0]) / 2


def at_the_kl(this: Tiny, artifact: Any) -> Any:
    """`artifact` by itself at `TARGET` nats on every third of the calibration prompts."""
    prompts = calibration_prompts()[::3]
    return calibrate_each(this.lm, [artifact], target_kl=TARGET, prompts=prompts, tolerance=TOLERANCE)[0]


def assert_as_naive(
    this: Tiny, figures: LayerFigures, artifact: Any, examples: ContrastSet, framing: str, seed: int = 0
) -> None:
    _, positive, negative = parts(examples)
    own, twin = at_the_kl(this, artifact), at_the_kl(this, random_twin(artifact, seed))
    effect, damage = naive_effect_and_damage(this, own, positive, negative, framing)
    other, spoilt = naive_effect_and_damage(this, twin, positive, negative, framing)
    found = (figures.effect, figures.damage, figures.random_effect, figures.random_damage)
    assert found == pytest.approx((effect, damage, other, spoilt), rel=1e-3, abs=2e-5)
    assert abs(effect) > 1e-5 and abs(damage) > 1e-5
    kls = (figures.kl, figures.kl_down, figures.random_kl, figures.random_kl_down)
    wanted = [kl for one in (own, twin) for kl in (one.calibration.kl, one.calibration.kl_down)]
    assert kls == pytest.approx(wanted, rel=1e-3)


# --- the figures -----------------------------------------------------------------------------------------------------


def test_effect_and_damage_equal_the_naive_ones_on_every_architecture(each: Tiny) -> None:
    profile = profile_layers(each.lm, EXAMPLES, layers=[1], framing="answer", seed=3)
    artifact = build(each.lm, parts(EXAMPLES)[0], layers=1, framing="answer")
    (figures,) = profile.layers
    assert_as_naive(each, figures, artifact, EXAMPLES, "answer", seed=3)
    assert figures.separation == artifact.provenance.separation[1]


@pytest.mark.parametrize(
    "framing", [pytest.param("raw", marks=pytest.mark.slow), pytest.param("prompt", marks=pytest.mark.slow), "answer"]
)
def test_every_layer_is_measured_under_the_framing_it_was_built_with(llama: Tiny, framing: Any) -> None:
    profile = profile_layers(llama.lm, EXAMPLES, framing=framing)
    assert [figures.layer for figures in profile.layers] == list(range(N_LAYERS))
    assert profile.framing == framing
    for figures in profile.layers:
        artifact = build(llama.lm, parts(EXAMPLES)[0], layers=figures.layer, framing=framing)
        assert_as_naive(llama, figures, artifact, EXAMPLES, framing)
        assert figures.separation == artifact.provenance.separation[figures.layer]


def test_a_base_model_with_a_bos_counts_the_first_word_and_one_without_cannot() -> None:
    for bos in (True, False):
        this = make_tiny("llama", chat=False, bos=bos)
        (figures,) = profile_layers(this.lm, EXAMPLES, layers=2).layers
        assert_as_naive(this, figures, build(this.lm, parts(EXAMPLES)[0], layers=2), EXAMPLES, "raw")


@pytest.mark.parametrize("method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("pca", "probe")), "cna"])
def test_other_methods_are_measured_too_and_circuits_against_random_neurons(llama: Tiny, method: str) -> None:
    extra: dict[str, Any] = {"top_k": 5} if method == "cna" else {}
    profile = profile_layers(llama.lm, EXAMPLES, method=method, layers="2-3", framing="answer", **extra)
    assert profile.kind == (NeuronCircuit.kind if method == "cna" else SteeringVector.kind)
    for figures in profile.layers:
        named = {"skip_layers": tuple(range(figures.layer)), **extra} if method == "cna" else {}
        artifact = build(llama.lm, parts(EXAMPLES)[0], method=method, layers=figures.layer, framing="answer", **named)
        assert_as_naive(llama, figures, artifact, EXAMPLES, "answer")


def test_sae_is_measured_at_the_layers_that_have_one(llama: Tiny, tmp_path: Path) -> None:
    folders = [str(tiny_sae(tmp_path / str(layer), layer)) for layer in (1, 3)]
    profile = profile_layers(llama.lm, EXAMPLES, method="sae", sae=folders, framing="answer")
    assert [figures.layer for figures in profile.layers] == [1, 3]
    artifact = build(llama.lm, parts(EXAMPLES)[0], method="sae", sae=folders[1], layers=3, framing="answer", contexts=0)
    assert_as_naive(llama, profile.layers[1], artifact, EXAMPLES, "answer")


def tiny_sae(folder: Path, layer: int, n_features: int = 48) -> Path:
    generator = torch.Generator().manual_seed(layer)
    encoder = torch.randn(D_MODEL, n_features, generator=generator)
    folder.mkdir()
    weights = {"W_enc": encoder, "W_dec": encoder.T.contiguous(), "b_enc": torch.zeros(n_features)}
    save_file({**weights, "b_dec": torch.zeros(D_MODEL)}, folder / "sae_weights.safetensors")
    metadata = {"model_name": "tiny/llama", "hook_name": f"blocks.{layer}.hook_resid_post"}
    config = {"architecture": "standard", "d_in": D_MODEL, "d_sae": n_features, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_how_texts_fall_into_batches_changes_nothing(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = profile_layers(llama.lm, EXAMPLES, layers="0-1")
    monkeypatch.setattr(forcing, "_BATCH_TOKENS", {"cpu": 1})
    singly = profile_layers(llama.lm, EXAMPLES, layers="0-1")
    for one, other in zip(whole.layers, singly.layers, strict=True):
        named = [(getattr(one, key), getattr(other, key)) for key in ("effect", "damage", "random_effect")]
        assert all(first == pytest.approx(second, abs=1e-5) for first, second in named)


def test_the_texts_measured_on_take_no_part_in_building_and_are_at_most_32_a_class(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(name: str, original: Any) -> None:
        def call(*arguments: Any, **named: Any) -> Any:
            seen[name] = arguments
            return original(*arguments, **named)

        monkeypatch.setattr(layer_profile, name, call)

    spy("build_each", layer_profile.build_each)
    spy("_measure", layer_profile._measure)
    examples = contrast(170, longest=4)
    profile = profile_layers(llama.lm, examples, layers=0, framing="raw")
    train, positive, negative = parts(examples)
    assert seen["build_each"][1] == train
    assert len(positive) == len(negative) == 32
    assert not {*positive, *negative} & {*train.positive, *train.negative}
    measured = [(text.ids, text.positive) for text in seen["_measure"][2]]
    expected = [(text, True) for text in positive] + [(text, False) for text in negative]
    assert measured == [(row_of(llama.lm, text, "raw")[0], side) for text, side in expected]
    assert profile.n_train == (138, 138) and profile.n_held_out == (32, 32)


def test_long_texts_are_cut_and_of_one_token_left_out(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "MAX_TEXT_TOKENS", 6)
    with_short = ContrastSet((*EXAMPLES.positive, *"bcdefghijk"), (*EXAMPLES.negative, *"lmnopqrstu"))
    _, held_positive, held_negative = parts(with_short)
    assert any(len(text) == 1 for text in (*held_positive, *held_negative))
    profile = profile_layers(llama.lm, with_short, layers=1, framing="raw")
    artifact = build(llama.lm, parts(with_short)[0], layers=1, framing="raw")
    cut_positive, cut_negative = (
        [llama.lm.tokenizer.decode(llama.lm.tokenizer(text)["input_ids"][:6]) for text in side if len(text) > 1]
        for side in (held_positive, held_negative)
    )
    artifact = at_the_kl(llama, artifact)
    effect, damage = naive_effect_and_damage(llama, artifact, cut_positive, cut_negative, "raw")
    (figures,) = profile.layers
    assert (figures.effect, figures.damage) == pytest.approx((effect, damage), rel=1e-3, abs=2e-5)


def test_the_same_seed_gives_the_same_figures_and_another_changes_only_the_control(llama: Tiny) -> None:
    one, again, other = (profile_layers(llama.lm, EXAMPLES, layers=1, seed=seed) for seed in (0, 0, 1))
    assert one == again
    control: Any = {key: 0 for key in vars(one.layers[0]) if key.startswith("random_")}
    assert replace(other.layers[0], **control) == replace(one.layers[0], **control)
    assert other.layers[0].random_effect != one.layers[0].random_effect


# --- the control -----------------------------------------------------------------------------------------------------


def test_the_random_twin_of_a_vector_has_its_dose_and_another_direction() -> None:
    vector = make_vector((1, 2), seed=1)
    twin = random_twin(vector, 0)
    assert isinstance(twin, SteeringVector)
    assert (twin.norms, twin.calibration, twin.layers) == (vector.norms, vector.calibration, vector.layers)
    for layer in (1, 2):
        assert abs(float(unit(twin.directions[layer]) @ unit(vector.directions[layer]))) < 0.6
    one, other = (random_twin(make_vector((layer,), seed=5), 0) for layer in (1, 2))  # each layer by itself
    assert isinstance(one, SteeringVector) and isinstance(other, SteeringVector)
    assert abs(float(unit(one.directions[1]) @ unit(other.directions[2]))) < 0.6


def test_the_random_twin_of_a_circuit_has_as_many_different_neurons_a_layer_with_the_same_differences() -> None:
    circuit = make_circuit([(0, 3), (2, 5), (0, 60), (2, 0), (2, 1)], seed=3, operation="shift")
    twin = random_twin(circuit, 7)
    assert isinstance(twin, NeuronCircuit)
    assert torch.equal(twin.neuron_layers, circuit.neuron_layers)
    assert torch.equal(twin.differences, circuit.differences) and twin.calibration == circuit.calibration
    assert not torch.equal(twin.neurons, circuit.neurons)
    assert random_twin(circuit, 7).neurons.tolist() == twin.neurons.tolist()  # type: ignore[union-attr]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_mistakes_are_named(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="77"):
        profile_layers(llama.lm, EXAMPLES, layers=77)
    with pytest.raises(UsageError, match=r"'auto'.*'all'"):
        profile_layers(llama.lm, EXAMPLES, layers="auto")
    with pytest.raises(UsageError, match="magic"):
        profile_layers(llama.lm, EXAMPLES, method="magic")
    with pytest.raises(UsageError, match="odd"):
        profile_layers(llama.lm, EXAMPLES, framing="odd")  # type: ignore[arg-type]
    with pytest.raises(ExamplesError, match="at least 2"):  # one is kept back, and one is left
        profile_layers(llama.lm, ContrastSet(("good", "fine"), ("bad", "poor")))
    with pytest.raises(ExamplesError, match="of one token none is"):
        profile_layers(llama.lm, ContrastSet(tuple("abcdef"), tuple("ghijkl")), framing="raw", layers=1)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        profile_layers(llama.lm, EXAMPLES, cancel=cancel)


# --- what is written -------------------------------------------------------------------------------------------------

PROFILE = LayerProfile(
    model="tiny/llama",
    method="caa",
    kind=SteeringVector.kind,
    examples="mood",
    framing="raw",
    n_train=(12, 12),
    n_held_out=(3, 4),
    seed=0,
    target_kl=1.0,
    layers=(
        LayerFigures(0, 0.75, 0.0125, 0.01, 0.5, 1.125, 0.875, -0.0625, 0.02, 0.25, 1.0, 1.0),
        LayerFigures(1, 0.96875, 0.21875, 0.03, 0.375, 0.9375, 1.0625, 0.03125, 0.02, 0.3125, 1.0, 1.0),
        LayerFigures(3, 0.96875, 0.28125, 0.04, 0.4375, 1.0, 1.0, 0.015625, 0.02, 0.34375, 1.0, 1.0),
    ),
)


def test_the_best_layers_are_marked_in_the_data() -> None:
    data = profile_data(PROFILE)
    assert data["best"] == {"separation": 1, "effect": 3}
    assert data["layers"][1]["effect"] == 0.21875
    assert json.loads(json.dumps(data)) == {
        **data,
        "n_train": [12, 12],
        "n_held_out": [3, 4],
        "layers": list(data["layers"]),
    }


def test_a_layer_beyond_the_kl_is_not_the_best_and_is_a_cross_in_the_plot() -> None:
    for kl in (1.16, None):
        jumping = replace(PROFILE.layers[2], kl_down=kl)
        profile = replace(PROFILE, layers=(*PROFILE.layers[:2], jumping))
        assert PROFILE.best_effect == 3 and profile.best_effect == 1
        effect = next(one for one in profile_figure(profile).to_dict()["data"] if one["name"] == "effect of caa")
        assert list(effect["marker"]["symbol"]) == ["circle", "circle", "x"]
        assert list(effect["error_y"]["array"]) == [0.01, 0.03, 0.04]
    everywhere = replace(PROFILE, layers=tuple(replace(one, kl=9.0) for one in PROFILE.layers))
    assert everywhere.best_effect == 3


def test_all_layers_and_their_random_controls_come_to_the_kl(llama: Tiny) -> None:
    profile = profile_layers(llama.lm, EXAMPLES, method="caa", layers="1-3")
    for one in profile.layers:
        for kl in (one.kl, one.kl_down, one.random_kl, one.random_kl_down):
            assert kl == pytest.approx(TARGET, rel=TOLERANCE)
        assert one.effect_error > 0 and one.random_effect_error > 0


def test_the_standard_error_is_that_of_two_means_of_texts() -> None:
    draw = torch.Generator().manual_seed(0)
    positive = torch.tensor([True] * 9 + [False] * 5)
    shifts, losses = torch.randn(2, 14, generator=draw, dtype=torch.float64)
    one, other = Preference(shifts, losses, positive), Preference(shifts / 2, losses, positive)
    mine, theirs = (shifts.numpy()[side.numpy()] for side in (positive, ~positive))
    assert one.effect == pytest.approx(mine.mean() - theirs.mean())
    assert one.error == pytest.approx(np.hypot(scipy.stats.sem(mine), scipy.stats.sem(theirs)))
    assert one.error_of_difference(other) == pytest.approx(one.error / 2)
    assert one.error_of_difference(one) == 0
    assert Preference(shifts[8:10], losses[8:10], positive[8:10]).error == 0  # one text of each: nothing is known


def test_the_table_and_the_page_hold_every_figure_and_need_no_network(tmp_path: Path) -> None:
    table, page = write_profile(PROFILE, tmp_path / "new" / "folder")
    with table.open(newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == [row | {"layer": float(row["layer"])} for row in profile_data(PROFILE)["layers"]]
    html = page.read_text(encoding="utf-8")
    for key in ("separation", "effect", "effect_error", "damage", "random_effect", "random_damage"):
        assert json.dumps([row[key] for row in rows], separators=(",", ":")) in html.replace(", ", ",")
    assert not re.search(r"<script[^>]*\ssrc=", html)
    for words in (
        "ROC AUC",
        "nats per token",
        "layer (block of the model)",
        "at equal KL, 1 nats",
        "best of 3",
        "tiny\\u002fllama",
        "random direction",
    ):
        assert words in html, words


def test_the_plot_has_two_panels_and_speaks_of_random_neurons_for_a_circuit() -> None:
    figure = profile_figure(replace(PROFILE, kind=NeuronCircuit.kind, method="cna")).to_dict()
    assert [(trace["yaxis"], trace["name"]) for trace in figure["data"]] == [
        ("y", "separation"),
        ("y2", "effect of cna"),
        ("y2", "damage of cna"),
        ("y2", "effect of random neurons"),
        ("y2", "damage of random neurons"),
    ]
    assert all(list(trace["x"]) == [0, 1, 3] for trace in figure["data"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file"):
        write_profile(PROFILE, tmp_path / "file")


@pytest.mark.embedded
def test_on_the_embedded_model_sentiment_has_more_effect_than_a_random_direction(embedded_lm: LanguageModel) -> None:
    (figures,) = profile_layers(embedded_lm, read_examples("sentiment"), layers=14, target_kl=1.0).layers
    assert figures.kl == pytest.approx(1.0, rel=TOLERANCE) and figures.random_kl == pytest.approx(1.0, rel=TOLERANCE)
    assert figures.effect > 0.05 and figures.effect > 3 * abs(figures.random_effect)
