"""Evaluations: figures that follow from the texts, controls beside them, work that goes on where it was cut."""

import copy
import csv
import io
import json
import math
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import Run, assert_one_clear_line, refused
from hub_server import FakeHub
from PIL import Image
from tiny import (
    D_MODEL,
    Tiny,
    Writes,
    clamping,
    make_circuit,
    make_vector,
    naive_greedy,
    naive_logits,
    naive_states,
    texts,
    writes_of,
)

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import render_card
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.plots import receipt_plot, receipt_points
from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.twins import random_recipe, random_twin
from neurosteer.artifacts.vector import SteeringVector, unit
from neurosteer.building.build import build
from neurosteer.errors import Cancelled, MismatchError, UsageError
from neurosteer.evaluation import CallableJudge, Evaluation, TextClassifier, evaluate, write_evaluation
from neurosteer.evaluation import texts as texts_module
from neurosteer.evaluation.controls import Group, TwinKind, control_strengths, default_instructions, groups, n_groups
from neurosteer.evaluation.matched_twins import permuted_twin, with_permuted_labels
from neurosteer.evaluation.receipts import receipt_text
from neurosteer.evaluation.texts import TextPlan
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.reading import read_examples
from neurosteer.hub import push
from neurosteer.measuring.divergence import divergences, unsteered_texts
from neurosteer.measuring.spreads import neuron_spreads
from neurosteer.models.loading import load_model
from neurosteer.progress import Job
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.ui.show import evaluation as on_page

VECTORS = Path(__file__).parent.parent / "vectors"
PROMPTS = ("the cat runs", "a dog sings slowly", "we never thank you", "bread and cheese", "under the river")
E_SHARE = CallableJudge("many e", lambda text: min(1.0, 8 * text.count("e") / max(1, len(text))))


def vector_for(this: Tiny, **changes: Any) -> SteeringVector:
    return make_vector(model=this.lm.reference, name="sentiment-vector", **changes)


def measured(this: Tiny, artifact: Artifact | Recipe, **options: Any) -> Evaluation:
    given: dict[str, Any] = {"prompts": PROMPTS, "strengths": (-2, -1, 1, 2), "samples": 2, "max_new_tokens": 12}
    return evaluate(this.lm, artifact, E_SHARE, **{**given, **options})


@pytest.fixture(scope="module")
def found(llama: Tiny) -> Evaluation:
    return measured(llama, vector_for(llama))


def row_of(found: Evaluation, kind: str, strength: float) -> dict[str, Any]:
    (row,) = [one for one in found.receipt.data["rows"] if (one["kind"], one["strength"]) == (kind, strength)]
    return row


def score_of(rows: Sequence[dict[str, str]], prompt: str) -> float:
    return float(np.mean(E_SHARE.scores([row["text"] for row in rows if row["prompt"] == prompt])))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_every_figure_of_a_share_follows_from_the_texts_as_written(found: Evaluation, tmp_path: Path) -> None:
    write_evaluation(found, tmp_path)
    with (tmp_path / "generations.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    plain = [row for row in written if row["kind"] == "unsteered"]
    before = {prompt: score_of(plain, prompt) for prompt in PROMPTS}
    receipt = json.loads((tmp_path / "receipt.json").read_text(encoding="utf-8"))
    assert len(receipt["rows"]) == 2 + 4 + 2 + 2
    for figures in receipt["rows"]:
        own = [
            row for row in written if (row["kind"], float(row["strength"])) == (figures["kind"], figures["strength"])
        ]
        assert len(own) == figures["n_texts"] == 10
        scores = [E_SHARE.scores([row["text"]])[0] for row in own]
        assert figures["share"] == pytest.approx(np.mean([score >= 0.5 for score in scores]), abs=1e-4)
        assert figures["mean"] == pytest.approx(np.mean(scores), abs=1e-4)
        assert figures["share_low"] <= figures["share"] <= figures["share_high"]
        assert figures["tokens"] == pytest.approx(np.mean([int(row["tokens"]) for row in own]), abs=1e-4)
        if figures["kind"] == "unsteered":
            continue
        moved = [score_of(own, prompt) - before[prompt] for prompt in PROMPTS]
        wrong = [change * (figures["strength"] or 1) < 0 for change in moved]
        assert figures["wrong_way"] == pytest.approx(np.mean(wrong), abs=1e-4)


def test_every_text_is_the_one_written_alone(llama: Tiny, found: Evaluation) -> None:
    session, vector = Session(llama.lm), vector_for(llama)
    for text in found.rows[:: len(found.rows) // 12]:
        recipe = Recipe.of((vector, text.strength)) if text.kind == "steered" else Recipe()
        if text.kind == "random":
            factor = row_of(found, "random", text.strength)["twins"][text.draw - 1]["factor"]
            recipe = Recipe.of((random_twin(vector, text.draw), factor * text.strength))
        prompt = text.prompt
        if text.kind == "instruction":
            prompt = f"{found.receipt.data['settings']['instructions'][text.strength < 0]} {prompt}"
        (alone,) = session.generate([Row(prompt, recipe, text.sample)], max_new_tokens=12)
        assert (alone.text, alone.ids) == (text.text, text.ids)


def test_kl_is_that_of_naive_passes_along_naive_greedy_continuations(llama: Tiny) -> None:
    vector = vector_for(llama)
    found = measured(llama, vector, prompts=PROMPTS[:2], strengths=(1,), samples=1)
    divergences = []
    for prompt in PROMPTS[:2]:
        start = llama.lm.prompt_ids(prompt)
        ids = [*start, *naive_greedy(llama, start, Writes(), 20, stop=())]
        steered, plain = (
            naive_logits(llama, ids, writes).log_softmax(-1)[len(start) - 1 : -1]
            for writes in (writes_of([Use(vector)]), Writes())
        )
        divergences += (steered.exp() * (steered - plain)).sum(-1).tolist()
    assert row_of(found, "steered", 1.0)["kl_p95"] == pytest.approx(np.quantile(divergences, 0.95), rel=1e-3)


# --- controls --------------------------------------------------------------------------------------------------------


def test_no_steering_random_twins_and_plain_words_stand_in_every_table(found: Evaluation) -> None:
    rows = found.receipt.data["table"]["rows"]
    assert [row[:2] for row in rows if row[1] in ("-1", "0", "+1")] == [
        ["sentiment-vector", "-1"],
        ["random directions (6)", "-1"],
        ["the instruction in plain words", "-1"],
        ["no steering", "0"],
        ["no steering, written again", "0"],
        ["sentiment-vector", "+1"],
        ["random directions (6)", "+1"],
        ["the instruction in plain words", "+1"],
    ]
    assert found.receipt.data["settings"]["instructions"][0].startswith("Write in a very positive")


def grams(vector: SteeringVector) -> torch.Tensor:
    rows = torch.stack([vector.directions[layer].double() for layer in vector.layers])
    return rows @ rows.T


def test_a_vectors_random_twin_is_the_vector_rotated_as_a_whole() -> None:
    spread = torch.randn(3, D_MODEL) * 0.3 + torch.randn(D_MODEL)  # layers that point nearly the same way
    vector = make_vector((0, 1, 2), directions=dict(enumerate(spread)))
    twin, other = random_twin(vector, 1), random_twin(vector, 2)
    assert isinstance(twin, SteeringVector) and isinstance(other, SteeringVector)
    assert (twin.norms, twin.calibration, twin.layers) == (vector.norms, vector.calibration, vector.layers)
    assert torch.allclose(grams(twin), grams(vector), rtol=1e-4, atol=1e-4), "lengths, and angles between layers"
    for layer in vector.layers:
        assert abs(float(unit(twin.directions[layer]) @ unit(vector.directions[layer]))) < 0.6
        assert not torch.equal(twin.directions[layer], other.directions[layer])
    again = random_twin(vector, 1)
    assert isinstance(again, SteeringVector) and torch.equal(again.directions[0], twin.directions[0])
    held = random_twin(clamping((1,), seed=0), 3)
    assert isinstance(held, SteeringVector) and held.encoders  # it still reads the feature, but writes elsewhere


def test_twins_point_everywhere_alike() -> None:
    vector = make_vector((0, 1))
    twins = [random_twin(vector, seed) for seed in range(400)]
    drawn = torch.stack([unit(twin.directions[1]) for twin in twins if isinstance(twin, SteeringVector)])
    assert float(drawn.mean(0).norm()) < 4 / math.sqrt(400)
    covariance = drawn.T @ drawn / 400 * D_MODEL
    assert float((covariance - torch.eye(D_MODEL)).abs().max()) < 0.5


def test_layers_that_point_the_very_same_way_and_more_layers_than_dimensions_have_twins_too() -> None:
    row = torch.randn(D_MODEL)
    same = make_vector((0, 1, 2), directions={0: row, 1: 2 * row, 2: -row})
    twin = random_twin(same, 0)
    assert isinstance(twin, SteeringVector) and torch.allclose(grams(twin), grams(same), rtol=1e-3, atol=1e-3)
    reference = replace(same.model, n_layers=8, d_model=4)
    many = make_vector(range(8), model=reference, directions={layer: torch.randn(4) for layer in range(8)})
    twin = random_twin(many, 0)
    assert isinstance(twin, SteeringVector) and torch.allclose(grams(twin), grams(many), rtol=1e-3, atol=1e-3)


def test_a_circuits_twin_has_other_neurons_shifted_by_as_much_of_their_own_spread() -> None:
    circuit = make_circuit([(0, 3), (0, 5), (2, 60)], seed=3, operation="shift")
    generator = torch.Generator().manual_seed(0)
    spreads = {layer: torch.rand(circuit.model.d_mlp, generator=generator) + 0.1 for layer in (0, 2)}
    twin = random_twin(circuit, 7, spreads=spreads)
    assert isinstance(twin, NeuronCircuit) and torch.equal(twin.neuron_layers, circuit.neuron_layers)
    assert not torch.equal(twin.neurons, circuit.neurons)
    for place, layer in enumerate(circuit.neuron_layers.tolist()):
        own, drawn = (float(spreads[layer][int(some.neurons[place])]) for some in (circuit, twin))
        assert float(twin.differences[place]) / drawn == pytest.approx(float(circuit.differences[place]) / own)
    as_it_was = random_twin(circuit, 7)
    assert isinstance(as_it_was, NeuronCircuit) and torch.equal(as_it_was.differences, circuit.differences)
    assert torch.equal(as_it_was.neurons, twin.neurons)


def test_spreads_are_standard_deviations_over_the_tokens_of_unsteered_texts(llama: Tiny) -> None:
    texts = unsteered_texts(llama.lm, PROMPTS[:2], 5)
    found = neuron_spreads(llama.lm, [1], texts)
    rows = torch.cat([naive_states(llama, text.ids)[1][1][1:] for text in texts.texts])
    assert torch.allclose(found[1], rows.std(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("operation", ["vector", "shift", "scale", "ablate"])
def test_twins_come_to_the_artifacts_kl_or_say_that_they_cannot(llama: Tiny, operation: str) -> None:
    if operation in ("vector", "ablate"):
        changes = {"operation": "ablate", "calibration": Calibration(0.5)} if operation == "ablate" else {}
        artifact: Artifact = vector_for(llama, **changes)
    else:
        places = [(layer, neuron) for layer in (1, 2) for neuron in range(0, 40, 4)]
        artifact = make_circuit(places, model=llama.lm.reference, operation=operation)
    found = measured(llama, artifact, strengths=(-1, 1), samples=1, max_new_tokens=2, n_random=3)
    texts = unsteered_texts(llama.lm, PROMPTS, 20)
    spreads = neuron_spreads(llama.lm, artifact.layers, texts) if operation == "shift" else None
    for strength in (-1.0, 1.0):
        (target,) = divergences(llama.lm, texts, [Recipe.of((artifact, strength))])
        row = row_of(found, "random", strength)
        assert row["n_random"] == 3
        for draw, twin in enumerate(row["twins"], start=1):
            recipe = Recipe.of((random_twin(artifact, draw, spreads=spreads), strength)).scaled(twin["factor"])
            (nats,) = divergences(llama.lm, texts, [recipe])
            assert float(nats.flatten().quantile(0.95)) == pytest.approx(twin["kl"], rel=1e-2)
            wanted = float(target.flatten().quantile(0.95))
            assert twin["reached"] == (abs(twin["kl"] / wanted - 1) <= 0.1 + 1e-3)
        missed = any(not twin["reached"] for twin in row["twins"])
        notes = [note for note in found.receipt.data["table"]["notes"] if "could not be brought" in note]
        assert missed == any(f"At strength {strength:+g}" in note for note in notes)
        if operation in ("vector", "shift"):
            assert not missed


def test_the_same_method_on_shuffled_labels_is_a_control_where_the_examples_are_given(llama: Tiny) -> None:
    examples = ContrastSet(tuple(texts(12, seed=1)), tuple(texts(12, seed=2)), "two kinds")
    built = build(llama.lm, examples, layers=[1, 2], calibrate=False)
    found = measured(llama, built, strengths=(-1, 1), samples=1, max_new_tokens=3, examples=examples, n_permuted=2)
    assert [row["n_random"] for row in found.receipt.data["rows"] if row["kind"] == "permuted"] == [2, 2]
    assert found.receipt.data["settings"]["permuted"] == {"n": 2, "why_not": ""}
    assert ["built from shuffled labels (2)", "+1"] in [row[:2] for row in found.receipt.data["table"]["rows"]]
    assert {one["from"] for one in found.receipt.data["differences"]} == {"steered", "random", "permuted"}
    mixed = with_permuted_labels(examples, 1)
    assert sorted([*mixed.positive, *mixed.negative]) == sorted([*examples.positive, *examples.negative])
    assert len(mixed.positive) == 12 and 0 < len(set(mixed.positive) & set(examples.positive)) < 12
    twin = permuted_twin(llama.lm, built, examples, 1, Job())
    other = build(llama.lm, mixed, layers=[1, 2], calibrate=False)
    assert isinstance(twin, SteeringVector) and isinstance(other, SteeringVector)
    assert all(torch.equal(twin.directions[layer], other.directions[layer]) for layer in (1, 2))


def test_without_the_examples_the_receipt_says_why_there_are_no_shuffled_labels(llama: Tiny, found: Evaluation) -> None:
    assert found.receipt.data["settings"]["permuted"]["why_not"] == "no labelled texts were given"
    assert not [row for row in found.receipt.data["rows"] if row["kind"] == "permuted"]
    examples = ContrastSet(tuple(texts(6, seed=1)), tuple(texts(6, seed=2)), "others")
    given = measured(llama, vector_for(llama), strengths=(1,), samples=1, max_new_tokens=2, examples=examples)
    assert "other texts than 'others'" in given.receipt.data["settings"]["permuted"]["why_not"]


def test_a_pair_that_is_shuffled_stays_a_pair() -> None:
    examples = ContrastSet(tuple(f"good {n}" for n in range(40)), tuple(f"bad {n}" for n in range(40)), paired=True)
    mixed = with_permuted_labels(examples, 0)
    assert mixed.paired and all(
        {one.split()[1]} == {other.split()[1]} for one, other in zip(mixed.positive, mixed.negative, strict=True)
    )
    assert 8 < sum(text.startswith("good") for text in mixed.positive) < 32


def test_no_steering_is_written_twice_to_show_what_chance_does(found: Evaluation) -> None:
    first, again = (
        {(row.prompt, place): row.text for place, row in enumerate(one for one in found.rows if one.kind == kind)}
        for kind in ("unsteered", "again")
    )
    assert first.keys() == again.keys() and first != again
    assert row_of(found, "again", 0.0)["wrong_way"] is not None


def test_differences_are_those_between_the_texts_as_written(found: Evaluation) -> None:
    def share(kind: str, strength: float) -> float:
        return float(np.mean([row.score >= 0.5 for row in found.rows if (row.kind, row.strength) == (kind, strength)]))

    said = {(one["from"], one["strength"]): one for one in found.receipt.data["differences"]}
    assert said.keys() == {("steered", 1.0), ("random", -1.0), ("random", 1.0)}
    between = share("steered", 1.0) - share("steered", -1.0)
    assert said["steered", 1.0]["share"] == pytest.approx(between, abs=1e-4)
    for strength in (-1.0, 1.0):
        one = said["random", strength]
        assert one["share"] == pytest.approx(share("steered", strength) - share("random", strength), abs=1e-4)
        assert one["share_low"] <= one["share"] <= one["share_high"]
        assert one["is_clear"] == (one["share_low"] > 0 if strength > 0 else one["share_high"] < 0)


@pytest.mark.parametrize("folder", sorted(path.name for path in VECTORS.iterdir()))
def test_receipts_on_released_artifacts_are_drawn_and_told_as_they_are(folder: str) -> None:
    artifact = load(VECTORS / folder)
    for receipt in artifact.receipts:
        card = render_card(artifact, plots=["evaluation.png"])
        assert receipt.data["table"]["rows"][0][2].split(" (")[0] in card
        assert receipt_plot(receipt.data) is not None
        page = on_page.summary(receipt, 10, 1.0) + on_page.table(receipt)
        assert "random twins" in page and on_page.effect_figure(receipt).data and on_page.damage_figure(receipt).data


def test_each_artifact_of_a_recipe_gets_a_twin_of_its_own() -> None:
    one, other = make_vector((1,), seed=0), make_vector((1,), seed=1)
    recipe = random_recipe(Recipe.of((one, 0.5), (other, -1.0), make_circuit()), 7)
    assert [use.strength for use in recipe.uses] == [0.5, -1.0, 1.0]
    first, second, third = (use.artifact for use in recipe.uses)
    assert isinstance(first, SteeringVector) and isinstance(second, SteeringVector)
    assert isinstance(third, NeuronCircuit)
    assert abs(float(unit(first.directions[1]) @ unit(second.directions[1]))) < 0.6


@pytest.mark.parametrize(
    ("strengths", "controls"),
    [((-2, -1, 0, 1, 2), [-1, 1]), ((0, 0.5, 3), [0.5]), ((-4, -3, 1), [-3, 1]), ((-1,), [-1])],
)
def test_random_twins_are_tried_at_plus_and_minus_1_or_the_weakest_there_is(
    strengths: tuple[float, ...], controls: list[float]
) -> None:
    assert control_strengths(sorted(strengths)) == controls
    twins: dict[tuple[TwinKind, float], tuple[Recipe, ...]] = {("random", at): (Recipe(),) * 2 for at in controls}
    found = groups(Recipe.of(make_vector()), strengths, ("up", "down"), twins)
    assert [group.strength for group in found if group.kind in ("unsteered", "again")] == [0.0, 0.0]
    assert [(len(one.recipes), one.strength) for one in found if one.kind == "random"] == [
        (2, strength) for strength in controls
    ]
    assert len(found) == n_groups(strengths)


@pytest.mark.parametrize(
    ("name", "strength", "start"),
    [
        ("politeness-cna", 1.0, "Be very polite"),
        ("politeness", -1.0, "Be blunt"),
        ("my_own-mood", 1.0, "Write in a my own mood way."),
        ("refusal", 1.0, "Refuse"),
    ],
)
def test_the_instruction_in_plain_words_has_a_default(name: str, strength: float, start: str) -> None:
    up, down = default_instructions(Recipe.of((make_vector(name=name), strength)))
    assert up.startswith(start) and up != down


# --- the same again --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files_byte_for_byte_and_another_one_others(
    llama: Tiny, found: Evaluation, tmp_path: Path
) -> None:
    again, other = measured(llama, vector_for(llama)), measured(llama, vector_for(llama), seed=1)
    for one, folder in ((found, "one"), (again, "two"), (other, "three")):
        write_evaluation(one, tmp_path / folder)
    for name in ("receipt.json", "generations.csv", "evaluation.html", "evaluation.png"):
        first, second, third = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two", "three"))
        assert first == second
        assert first != third


class Stopping:
    """Progress that cancels when the given part begins."""

    def __init__(self, part: int) -> None:
        self.cancel, self.left = threading.Event(), part

    def __call__(self, message: str, fraction: float | None = None) -> None:
        if message.startswith("Writing texts"):
            self.left -= 1
            if self.left < 0:
                self.cancel.set()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of 16 texts; and how many texts each call of `Session.generate` writes."""
    monkeypatch.setattr(texts_module, "PART_ROWS", 16)
    counts: list[int] = []
    generate = Session.generate

    def counted(self: Session, rows: Any, *arguments: Any, **options: Any) -> list[Row]:
        counts.append(len(rows))
        return generate(self, rows, *arguments, **options)

    monkeypatch.setattr(Session, "generate", counted)
    return counts


def test_what_was_cut_goes_on_where_it_was_and_writes_no_text_twice(
    llama: Tiny, tmp_path: Path, small_parts: list[int]
) -> None:
    vector, stopping = vector_for(llama), Stopping(4)
    whole = measured(llama, vector)
    total = sum(small_parts)
    small_parts.clear()
    with pytest.raises(Cancelled, match="64 of 100 texts are kept"):
        measured(llama, vector, out=tmp_path, progress=stopping, cancel=stopping.cancel)
    small_parts.clear()
    resumed = measured(llama, vector, out=tmp_path)
    assert sum(small_parts) == total - 64
    parts = [json.loads(file.read_bytes())["texts"] for file in sorted(tmp_path.glob("texts/*/*.json"))]
    assert [one["text"] for part in parts for one in part] == [row.text for row in whole.rows]
    assert receipt_text(resumed.receipt) == receipt_text(whole.receipt) and resumed.rows == whole.rows
    small_parts.clear()
    measured(llama, vector, out=tmp_path)
    assert small_parts == []


def test_a_part_that_was_cut_or_spoilt_is_written_anew(llama: Tiny, tmp_path: Path, small_parts: list[int]) -> None:
    vector = vector_for(llama)
    whole = measured(llama, vector, out=tmp_path)
    files = sorted(tmp_path.glob("texts/*/*.json"))
    assert len(files) == 7
    files[2].rename(files[2].with_name(f".{files[2].name}.new"))  # killed before the third part got its name
    files[4].write_bytes(files[4].read_bytes()[:25])
    files[5].write_text(json.dumps({**json.loads(files[5].read_bytes()), "settings": "of others"}))
    small_parts.clear()
    resumed = measured(llama, vector, out=tmp_path)
    assert small_parts == [16, 16, 16]
    assert receipt_text(resumed.receipt) == receipt_text(whole.receipt) and resumed.rows == whole.rows


def test_texts_of_other_settings_and_other_peoples_files_stay_in_the_folder(llama: Tiny, tmp_path: Path) -> None:
    mine = tmp_path / "texts" / "mine.json"
    mine.parent.mkdir()
    mine.write_bytes(b'{"mine": 1}')
    vector = vector_for(llama)
    measured(llama, vector, out=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    stronger = replace(vector, calibration=Calibration(0.6))
    assert row_of(measured(llama, stronger, out=tmp_path), "steered", 1.0)["n_texts"] == 10
    after = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    assert mine in before and after.items() > before.items()


def test_prompts_that_the_template_shows_otherwise_are_other_settings(llama: Tiny) -> None:
    plan = TextPlan((Group("unsteered", 0.0),), PROMPTS, 1, 4, Sampling())
    once = plan.sha256(llama.lm)
    assert plan.sha256(llama.lm) == once
    tokenizer = copy.deepcopy(llama.lm.tokenizer)
    tokenizer.chat_template = "today is friday " + (tokenizer.chat_template or "")
    dated = replace(llama.lm, tokenizer=tokenizer, chat=True)
    assert plan.sha256(dated) != replace(plan, prompts=PROMPTS[:2]).sha256(dated) != once
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("friday", "sunday")
    assert plan.sha256(replace(dated, tokenizer=other)) != plan.sha256(dated)


def test_another_judge_judges_the_same_texts(llama: Tiny, tmp_path: Path, small_parts: list[int]) -> None:
    vector = vector_for(llama)
    first = measured(llama, vector, out=tmp_path)
    small_parts.clear()
    options: dict[str, Any] = {"prompts": PROMPTS, "strengths": (-2, -1, 1, 2), "samples": 2, "max_new_tokens": 12}
    second = evaluate(llama.lm, vector, CallableJudge("all", lambda text: 1.0), out=tmp_path, **options)
    assert small_parts == [] and [row.text for row in second.rows] == [row.text for row in first.rows]
    assert row_of(second, "unsteered", 0.0)["share"] == 1.0


def test_a_receipt_takes_the_place_of_an_earlier_one_of_the_same_settings_and_judge(llama: Tiny) -> None:
    other = Receipt({"kind": "someone else's"})
    once = measured(llama, vector_for(llama, receipts=(other,))).artifact
    assert once is not None and once.receipts[0] is other and len(once.receipts) == 2
    twice = measured(llama, once).artifact
    assert twice is not None and len(twice.receipts) == 2
    more = measured(llama, once, seed=5).artifact
    assert more is not None and len(more.receipts) == 3
    assert measured(llama, Recipe.of((once, 0.5))).artifact is None


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, ("prompts",)),
        ({"prompts": ["fine", " "]}, ("prompts",)),
        ({"prompts": ["twice", "twice"]}, ("twice",)),
        ({"strengths": (0,)}, ("-1,0,1",)),
        ({"strengths": (1, float("nan"))}, ("nan", "finite")),
        ({"samples": 0}, ("samples", "0")),
        ({"max_new_tokens": 5000}, ("max_new_tokens", "5000")),
        ({"n_random": 0}, ("n_random",)),
        ({"instructions": ("up", " ")}, ("instructions",)),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    llama: Tiny, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(lambda: measured(llama, vector_for(llama), out=tmp_path / "out", **options), UsageError, *words)
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_another_model_an_empty_recipe_and_an_odd_judge_are_refused(llama: Tiny, tmp_path: Path) -> None:
    other = replace(llama.lm.reference, d_model=16)
    stranger = make_vector(model=other, directions={1: torch.ones(16)}, norms={1: 1.0})
    refused(lambda: measured(llama, stranger), MismatchError, "vector-0")
    refused(lambda: measured(llama, Recipe()), UsageError, "empty")
    (tmp_path / "file").write_text("")
    refused(lambda: measured(llama, vector_for(llama), out=tmp_path / "file"), UsageError, "another folder")

    class Short:
        name, accuracy, n_accuracy, is_weak = "short", None, 0, False

        def scores(self, texts: Sequence[str]) -> list[float]:
            return [0.5]

    refused(lambda: evaluate(llama.lm, vector_for(llama), Short(), prompts=PROMPTS[:1]), UsageError, "'short'")


# --- the harness cannot be fooled ------------------------------------------------------------------------------------


def test_a_weak_judge_is_marked_wherever_its_figures_are(llama: Tiny) -> None:
    rng = random.Random(0)
    words = [f"{rng.choice(['the', 'a'])} {rng.choice(['song', 'day'])} {place}" for place in range(100)]
    rng.shuffle(words)
    judge = TextClassifier.train(ContrastSet(tuple(words[:50]), tuple(words[50:]), "noise"))
    found = evaluate(llama.lm, vector_for(llama), judge, prompts=PROMPTS, max_new_tokens=6)
    assert found.receipt.data["judge"]["is_weak"] is True
    assert found.receipt.data["judge"]["accuracy"] == pytest.approx(judge.accuracy, abs=1e-4)
    assert found.artifact is not None
    for shown in (found.receipt.data["table"]["title"], render_card(found.artifact)):
        assert "too weak to conclude from" in shown and f"{judge.accuracy:.1%}"[:-1] in shown


def shuffled(examples: ContrastSet, seed: int) -> ContrastSet:
    texts = [*examples.positive, *examples.negative]
    random.Random(seed).shuffle(texts)
    return ContrastSet(tuple(texts[: len(texts) // 2]), tuple(texts[len(texts) // 2 :]), "shuffled")


def is_clear(found: Evaluation, kind: str, strength: float) -> bool:
    """Whether the interval of the change lies on the side that was meant."""
    row = row_of(found, kind, strength)
    return row["change_low"] > 0 if strength > 0 else row["change_high"] < 0


@pytest.mark.embedded
@pytest.mark.usefixtures("embedded_lm")  # or a skip
def test_shuffled_labels_and_random_directions_show_no_effect_where_the_real_labels_do() -> None:
    lm = load_model()  # as users have it, which writes faster
    kept, held = read_examples("formality").parts(0.5, seed=HOLD_OUT_SEED)
    judge = TextClassifier.train(held)
    assert judge.accuracy is not None and judge.accuracy > 0.9
    dose = Calibration(0.2)  # about 1 nat
    real, fake = (
        evaluate(
            lm,
            replace(build(lm, texts, layers=16, calibrate=False), calibration=dose),
            judge,
            strengths=(-1, 1),
            max_new_tokens=20,
        )
        for texts in (kept, shuffled(kept, 1))
    )

    def between(found: Evaluation, kind: str) -> float:
        return row_of(found, kind, 1.0)["share"] - row_of(found, kind, -1.0)["share"]

    for strength in (-1.0, 1.0):
        assert is_clear(real, "steered", strength)
        # A push of any kind may move what a judge sees in a text, so long as it is not the way that was meant.
        assert not is_clear(fake, "steered", strength) and not is_clear(real, "random", strength)
    assert max(between(fake, "steered"), between(real, "random")) < between(real, "steered") / 2


# --- shown -----------------------------------------------------------------------------------------------------------


def card_rows(card: str) -> list[list[str]]:
    """The cells of the card's first table of more than two columns, unescaped."""
    lines = card[card.index("## What it does") : card.index("## How to use it")].splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    return [[cell.strip().replace("\\", "") for cell in row[1:-1].split(" | ")] for row in rows]


def test_a_pushed_cards_table_and_plot_are_the_receipts(hub: FakeHub, found: Evaluation, tmp_path: Path) -> None:
    assert found.artifact is not None
    pushed = push(save(found.artifact, tmp_path / "mood"), "alice/mood")
    assert "evaluation.png" in pushed.files
    files = {path: file.data for path, file in hub.repos["alice/mood"].head.files.items()}
    table = found.receipt.data["table"]
    card = files["README.md"].decode()
    assert card_rows(card) == [table["columns"], *table["rows"]]
    assert "](evaluation.png)" in card and "many e" in card
    assert (
        files["evaluation.png"] == receipt_plot(found.receipt.data) == (tmp_path / "mood/evaluation.png").read_bytes()
    )
    assert Image.open(io.BytesIO(files["evaluation.png"])).size == (1200, 408)
    assert json.loads(files["config.json"])["receipts"] == [json.loads(receipt_text(found.receipt))]
    shares = [entry for entry in json.loads(receipt_text(found.receipt))["metrics"] if entry["type"] == "share"]
    assert [one["value"] for one in shares] == [
        row_of(found, kind, strength)["share"]
        for kind, strength in (("unsteered", 0.0), ("steered", -1.0), ("steered", 1.0))
    ]
    push(replace(found.artifact, receipts=()), "alice/mood")
    assert "evaluation.png" not in hub.repos["alice/mood"].head.files


def test_saving_without_receipts_leaves_no_picture_of_old_ones(found: Evaluation, tmp_path: Path) -> None:
    assert found.artifact is not None
    folder = save(found.artifact, tmp_path / "mood")
    assert "](evaluation.png)" in (folder / "README.md").read_text(encoding="utf-8")
    save(replace(load(folder), receipts=()), folder)
    assert not (folder / "evaluation.png").exists()
    assert "evaluation.png" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"rows": 5},
        {"rows": [None, {"kind": "steered"}, {"kind": ["steered"], "strength": 1, "share": 0.5}]},
        {"rows": [{"kind": "steered", "strength": "1", "share": 0.5}]},
        {"rows": [{"kind": "random", "strength": 1, "share": 0.5}]},
        {"rows": [{"kind": "steered", "strength": 1e300, "share": 0.5}]},
        {"rows": [{"kind": "steered", "strength": 10**400, "share": True}]},
    ],
)
def test_receipts_with_nothing_to_draw_are_passed_over(data: dict[str, Any], tmp_path: Path) -> None:
    assert receipt_plot(data) is None
    folder = save(make_vector(receipts=(Receipt(data),)), tmp_path / "odd")
    assert not (folder / "evaluation.png").exists()


def test_a_receipt_is_drawn_from_what_there_is_of_it() -> None:
    row = {"kind": "steered", "strength": 1, "share": 0.5, "share_low": "x", "kl_p95": None, "perplexity": 1e12}
    (point,) = receipt_points({"rows": [row, 7]})["steered"]
    assert (point.low, point.high, point.kl, point.perplexity) == (0.5, 0.5, None, None)
    assert receipt_plot({"rows": [row]}) is not None


def test_what_texts_and_prompts_hold_is_no_html_on_the_page(llama: Tiny, tmp_path: Path) -> None:
    odd = "<script>alert(1)</script>"
    judge = CallableJudge(f"{odd} | judge", lambda text: 0.5)
    found = evaluate(llama.lm, vector_for(llama), judge, prompts=[odd], strengths=(1,), max_new_tokens=4)
    write_evaluation(found, tmp_path)
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert odd not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert found.artifact is not None and odd not in render_card(found.artifact).split("---", 2)[2]


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def mood(model_folder: Path, tmp_path: Path) -> Path:
    from neurosteer.models.loading import load_model

    lm = load_model(model_folder, dtype="float32")
    return save(make_vector(model=lm.reference, name="mood"), tmp_path / "mood")


def test_the_verb_evaluates_writes_its_files_and_keeps_the_receipt(
    run: Run, model_folder: Path, mood: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:3]), encoding="utf-8")
    options = (
        "--model",
        model_folder,
        "--dtype",
        "float32",
        "--prompts",
        prompts,
        "--strengths=-1,1",
        "--max-new-tokens",
        "5",
        "--json",
    )
    ran = run("evaluate", "--use", f"{mood}:1", "--judge", "regex:e", *options, "--out", tmp_path / "out", "--save")
    assert ran.code == 0, ran.err
    printed = json.loads(ran.out)
    written = json.loads((tmp_path / "out" / "receipt.json").read_text(encoding="utf-8"))
    assert printed["receipt"] == written == dict(load(mood).receipts[0].data)
    names = {Path(file).name for file in printed["files"]}
    assert names == {"receipt.json", "generations.csv", "evaluation.html", "evaluation.png"}
    assert (mood / "evaluation.png").read_bytes() == (tmp_path / "out" / "evaluation.png").read_bytes()
    swept = run("sweep", "--use", mood, "--judge", "regex:e", *options, "--out", tmp_path / "swept")
    assert swept.code == 0, swept.err
    assert (tmp_path / "swept" / "receipt.json").read_bytes() == (tmp_path / "out" / "receipt.json").read_bytes()


def test_without_json_the_verb_prints_the_table(run: Run, model_folder: Path, mood: Path, tmp_path: Path) -> None:
    examples = tmp_path / "labelled.csv"
    lines = ["text,label", *(f"a lovely day {n},positive\nan awful day {n},negative" for n in range(6))]
    examples.write_text("\n".join(lines), encoding="utf-8")
    options = ("--model", model_folder, "--dtype", "float32", "--strengths=-1,1", "--max-new-tokens", "3")
    words = ("--random", "2", "--instructions", "Be glad.", "Be sad.")
    ran = run("evaluate", "--use", mood, "--examples", examples, *options, *words)
    assert ran.code == 0, ran.err
    judge = "text classifier trained on labelled (6 + 6 texts)"
    for shown in (judge, "no steering", "random directions (2)", "mood", "points (95% interval"):
        assert shown in ran.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no judge", "--examples")),
        (("--judge", "mine"), ("'mine'", "regex:PATTERN")),
        (("--judge", "regex:("), ("regular expression",)),
        (("--judge", "refusal", "--examples", "sentiment"), ("leave --examples out",)),
        (("--judge", "refusal", "--strengths", "a"), ("--strengths",)),
        (("--judge", "refusal", "--save"), ("--save", "strength 1")),
    ],
)
def test_mistakes_at_the_command_line_are_one_clear_line(
    run: Run, mood: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_clear_line(run("evaluate", "--use", f"{mood}:0.5", *arguments), *words)


def test_the_seed_of_an_evaluation_is_that_of_its_samples(llama: Tiny) -> None:
    once = measured(llama, vector_for(llama), sampling=Sampling(temperature=0.8, seed=77))
    assert receipt_text(once.receipt) == receipt_text(measured(llama, vector_for(llama)).receipt)
    greedy = measured(llama, vector_for(llama), sampling=Sampling(greedy=True))
    same = [row.text for row in greedy.rows if (row.kind, row.strength, row.prompt) == ("steered", 2.0, PROMPTS[0])]
    assert len(same) == 2 and len(set(same)) == 1
