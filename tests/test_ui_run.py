"""Runs of the Steer tab, its sliders and uploads, without a browser, with a tiny random model."""

import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pages import EXAMPLES, HOSTILE, SKIP, along, ask, feature, mix_values, run, told, visitor
from tiny import Tiny, make_circuit, make_vector

from neurosteer.artifacts.storage import pack
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.steering.shared import SharedSession
from neurosteer.ui.mixer import MOST, Mix
from neurosteer.ui.tabs.steer_handlers import Ask, SteerHandlers


def test_a_run_streams_both_texts_as_the_library_writes_them(
    steering: SteerHandlers, llama: Tiny, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers._UPDATE_S", 0.0)
    views = run(steering, ask(), mix_values({"mood": mood}, ["mood"], 3.0))
    grown = [view.unsteered for view in views if isinstance(view.unsteered, str)]
    assert len(grown) > 4 and all(b.startswith(a) for a, b in pairwise(grown))
    session = Session(llama.lm)
    recipe = Mix.of(mix_values({"mood": mood}, ["mood"], 3.0))
    assert recipe.strength("mood") == 3.0
    plain, steered = session.generate(
        [Row("the cat"), Row("the cat", _recipe(mood, 3.0))], max_new_tokens=8, sampling=Sampling(greedy=True)
    )
    assert (views[-1].unsteered, views[-1].steered) == (plain.text, steered.text)
    assert views[-1].unsteered != views[-1].steered
    assert "tokens/s" in views[-1].note and views[-1].run["interactive"] and not views[-1].stop["interactive"]


def _recipe(mood: Any, strength: float) -> Any:
    from neurosteer.artifacts.recipes import Recipe

    return Recipe.of((mood, strength))


def test_strength_zero_writes_the_unsteered_text(steering: SteerHandlers, mood: Any) -> None:
    last = run(steering, ask(), mix_values({"mood": mood}, ["mood"], 0.0))[-1]
    assert last.unsteered == last.steered != ""


def test_stop_keeps_what_was_written(steering: SteerHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers._UPDATE_S", 0.0)
    stream = steering.run(visitor(), *ask(max_new_tokens=100), *mix_values({"mood": mood}, ["mood"]))
    views = []
    for view in stream:
        views.append(view)
        if view.unsteered and isinstance(view.unsteered, str):
            steering.stop(visitor())
    assert "Stopped; what was written is kept" in views[-1].note
    assert views[-1].unsteered.startswith(views[-2].unsteered)


def test_leaving_the_page_mid_way_ends_the_work(steering: SteerHandlers, mood: Any) -> None:
    stream = steering.run(visitor(), *ask(max_new_tokens=100), *mix_values({"mood": mood}, ["mood"]))
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    started = time.monotonic()
    while any(thread.name == "neurosteer-decoding" for thread in threading.enumerate()):
        assert time.monotonic() - started < 5  # a slot is free again by then
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("asked", "chosen", "words"),
    [
        (ask(prompt="  "), ["mood"], "prompt is empty"),
        (ask(), [], "No artifact is chosen"),
        (ask(max_new_tokens=100_000), ["mood"], "100000"),
        (ask(temperature=0.0), ["mood"], "temperature is 0.0"),
        (ask(seed=None), ["mood"], "seed is None"),
    ],
)
def test_what_a_visitor_gets_wrong_is_one_line_and_nothing_is_lost(
    steering: SteerHandlers, mood: Any, asked: Ask, chosen: list[str], words: str
) -> None:
    last = run(steering, asked, mix_values({"mood": mood}, chosen))[-1]
    assert words in last.error and last.error.count("<p") == 1
    assert last.run["interactive"]
    assert (last.unsteered, last.steered, last.prompt, last.talk) == (SKIP, SKIP, SKIP, SKIP)


def test_a_chat_carries_on_two_conversations(steering: SteerHandlers, mood: Any) -> None:
    mixed = mix_values({"mood": mood}, ["mood"], 3.0)
    first = run(steering, ask(mode="chat"), mixed)[-1]
    assert first.prompt == "" and first.unsteered_chat == first.talk["unsteered"]
    second = run(steering, ask(mode="chat", prompt="and the dog", talk=first.talk), mixed)[-1]
    for side in ("unsteered", "steered"):
        assert [message["role"] for message in second.talk[side]] == ["user", "assistant"] * 2
        assert second.talk[side][:2] == first.talk[side]
        assert second.talk[side][2]["content"] == "and the dog"
    assert second.talk["unsteered"][3] != second.talk["steered"][3]


def test_a_slider_keeps_its_strength_when_others_come_and_go(steering: SteerHandlers, mood: Any) -> None:
    shelf = {"a": mood, "b": mood, "c": mood}
    values = mix_values(shelf, ["a", "b"], 0.5, -2.0)
    values[3] = ["c", "b"]
    _, shown, _, _, *rest = steering.remix(*values)
    rows, sliders = rest[:MOST], rest[MOST : 2 * MOST]
    assert shown == ["c", "b"]
    assert [(slider["label"], slider["value"]) for slider in sliders[:2]] == [("c", 1.0), ("b", -2.0)]
    assert [row["visible"] for row in rows] == [True, True, False, False]


def test_two_vectors_tell_their_overlap_and_offer_to_remove_it(steering: SteerHandlers) -> None:
    one, other = along({1: [1.0], 2: [1.0]}, "one"), along({2: [3.0, 4.0], 3: [1.0]}, "other")
    apart, circuit = along({3: [0.0, 1.0]}, "apart"), make_circuit()
    shelf = {"one": one, "other": other, "apart": apart, "c": circuit, "p": replace(one, operation="ablate")}

    def told_of(*labels: str) -> tuple[str, bool]:
        overlap, checkbox, _ = steering.remix(*mix_values(shelf, list(labels)))[-3:]
        assert "value" not in checkbox  # what the visitor ticked stays
        return overlap, checkbox["visible"]

    overlap, offered = told_of("one", "other")
    assert "<b>one</b> and <b>other</b>: overlap 0.60 at layer 2: they push partly the same way" in overlap and offered
    overlap, offered = told_of("one", "apart")
    assert "different layers" in overlap and not offered
    assert told_of("one") == told_of("one", "c") == told_of("one", "p") == ("", False)
    overlap, offered = told_of("one", "other", "apart")
    assert overlap.count("<li>") == 3 and offered


def test_ticked_the_overlap_is_removed_and_otherwise_not(
    steering: SteerHandlers, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neurosteer.artifacts.combining import orthogonalised
    from neurosteer.artifacts.recipes import Recipe

    one, other = (along({1: values}, model=llama.lm.reference) for values in ([1.0], [3.0, 4.0]))
    recipes = []
    written = SharedSession.stream
    monkeypatch.setattr(
        SharedSession,
        "stream",
        lambda self, rows, **given: recipes.append(rows[1].recipe) or written(self, rows, **given),
    )
    for apart in (False, True):
        run(steering, ask(), mix_values({"a": one, "b": other}, ["a", "b"], 2.0, -1.0, apart=apart))
    plain = Recipe.of((one, 2.0), (other, -1.0))
    for recipe, wanted in zip(recipes, (plain, orthogonalised(plain)), strict=True):
        for use, expected in zip(recipe.uses, wanted.uses, strict=True):
            assert use.strength == expected.strength
            assert isinstance(use.artifact, SteeringVector) and isinstance(expected.artifact, SteeringVector)
            assert use.artifact.directions[1].equal(expected.artifact.directions[1])


def test_vectors_that_cannot_be_told_apart_are_one_line(steering: SteerHandlers, mood: Any) -> None:
    shelf = {"mood": mood, "mood (2)": mood}
    last = run(steering, ask(), mix_values(shelf, list(shelf), apart=True))[-1]
    assert "nearly the same direction" in last.error and last.error.count("<p") == 1 and last.run["interactive"]


def test_the_choice_to_remove_the_overlap_lives_through_other_changes(mood: Any) -> None:
    mix = Mix.of(mix_values({"a": mood}, ["a"], 2.0, apart=True))
    assert mix.apart and mix.choosing({"b": mood}, ["b"]).apart
    assert not Mix.of(mix_values({"a": mood}, ["a"])).apart


def test_an_uploaded_artifact_shows_its_features(steering: SteerHandlers, llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "glad.zip"
    vector = make_vector((1,), name="glad", model=llama.lm.reference, features=(feature(promoted=(HOSTILE,)),))
    path.write_bytes(pack(vector))
    error, _, *mixed = steering.upload(visitor(), str(path), *mix_values({}, []))
    about = mixed[-1]
    assert error == "" and "<summary>About glad</summary>" in about and "what a <mark>lovely</mark> day" in about
    assert "&lt;script&gt;" in about and "<script" not in about


def test_an_artifact_comes_back_from_its_zip(steering: SteerHandlers, mood: Any, tmp_path: Path) -> None:
    path = tmp_path / "mood.zip"
    path.write_bytes(pack(mood))
    error, note, shelf, shown, *_ = steering.upload(visitor(), str(path), *mix_values({"mood": mood}, ["mood"]))
    assert error == "" and "mood (2)" in note
    assert shown == ["mood", "mood (2)"] and shelf["mood (2)"].directions[1].equal(mood.directions[1])


def test_a_wrong_zip_and_a_foreign_artifact_are_refused_in_one_line(
    steering: SteerHandlers, mood: Any, tmp_path: Path
) -> None:
    junk, foreign = tmp_path / "junk.zip", tmp_path / "foreign.zip"
    junk.write_bytes(b"PK\x03\x04 not really")
    foreign.write_bytes(pack(replace(mood, model=replace(mood.model, n_layers=77))))
    for path, words in ((junk, "not a zip file"), (foreign, "77 layers")):
        error, note, *rest = steering.upload(visitor(), str(path), *mix_values({}, []))
        assert words in error and path.name in error and note == ""
        assert rest == [SKIP] * len(rest)


def test_one_click_builds_the_example(steering: SteerHandlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers.read_examples", lambda name: replace(EXAMPLES, name=name))
    button, error, note, shelf, shown, empty, *_ = steering.build_example(visitor(), told, *mix_values({}, []))
    assert button["interactive"] and error == "" and "press Run" in note
    assert list(shelf) == shown == ["sentiment-caa"] and not empty["visible"]
