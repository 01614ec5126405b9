"""Runs of the Steer tab, its sliders and uploads, without a browser, with a tiny random model."""

import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pages import EXAMPLES, HOSTILE, SKIP, along, ask, feature, mix_of, run, told, visitor
from tiny import Tiny, make_circuit, make_vector

from neurosteer.artifacts.storage import pack
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.steering.shared import SharedSession
from neurosteer.ui.mixer import MOST
from neurosteer.ui.tabs.mixer_handlers import MixerHandlers
from neurosteer.ui.tabs.steer_handlers import SteerHandlers
from neurosteer.ui.tabs.steer_texts import Ask


def test_a_run_streams_both_texts_as_the_library_writes_them(
    steering: SteerHandlers, llama: Tiny, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers._UPDATE_S", 0.0)
    views = run(steering, ask(), mix_of({"mood": mood}, ["mood"], 3.0))
    grown = [view.unsteered for view in views if isinstance(view.unsteered, str)]
    assert len(grown) > 4 and all(b.startswith(a) for a, b in pairwise(grown))
    session = Session(llama.lm)
    assert mix_of({"mood": mood}, ["mood"], 3.0).strength("mood") == 3.0
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
    last = run(steering, ask(), mix_of({"mood": mood}, ["mood"], 0.0))[-1]
    assert last.unsteered == last.steered != ""


def test_stop_keeps_what_was_written(steering: SteerHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers._UPDATE_S", 0.0)
    stream = steering.run(visitor(), ask(max_new_tokens=100), mix_of({"mood": mood}, ["mood"]))
    views = []
    for view in stream:
        views.append(view)
        if view.unsteered and isinstance(view.unsteered, str):
            steering.stop(visitor())
    assert "Stopped; what was written is kept" in views[-1].note
    assert views[-1].unsteered.startswith(views[-2].unsteered)


def test_leaving_the_page_mid_way_ends_the_work(steering: SteerHandlers, mood: Any) -> None:
    stream = steering.run(visitor(), ask(max_new_tokens=100), mix_of({"mood": mood}, ["mood"]))
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
    last = run(steering, asked, mix_of({"mood": mood}, chosen))[-1]
    assert words in last.error and last.error.count("<p") == 1
    assert last.run["interactive"]
    assert (last.unsteered, last.steered, last.prompt, last.talk) == (SKIP, SKIP, SKIP, SKIP)


def test_a_chat_carries_on_two_conversations(steering: SteerHandlers, mood: Any) -> None:
    mixed = mix_of({"mood": mood}, ["mood"], 3.0)
    first = run(steering, ask(mode="chat"), mixed)[-1]
    assert first.prompt == "" and first.unsteered_chat == first.talk["unsteered"]
    second = run(steering, ask(mode="chat", prompt="and the dog", talk=first.talk), mixed)[-1]
    for side in ("unsteered", "steered"):
        assert [message["role"] for message in second.talk[side]] == ["user", "assistant"] * 2
        assert second.talk[side][:2] == first.talk[side]
        assert second.talk[side][2]["content"] == "and the dog"
    assert second.talk["unsteered"][3] != second.talk["steered"][3]


def test_a_slider_keeps_its_strength_when_others_come_and_go(mixing: MixerHandlers, mood: Any) -> None:
    shelf = {"a": mood, "b": mood, "c": mood}
    found = mixing.remix(mix_of(shelf, ["c", "b"], 0.5, -2.0, standing=["a", "b"]))
    sliders = [found[f"slider_{number}"] for number in (1, 2)]
    assert found["standing"] == ["c", "b"]
    assert [(slider["label"], slider["value"]) for slider in sliders] == [("c", 1.0), ("b", -2.0)]
    assert [found[f"row_{number}"]["visible"] for number in range(1, MOST + 1)] == [True, True, False, False]


def test_two_vectors_tell_their_overlap_and_offer_to_remove_it(mixing: MixerHandlers) -> None:
    one, other = along({1: [1.0], 2: [1.0]}, "one"), along({2: [3.0, 4.0], 3: [1.0]}, "other")
    apart, circuit = along({3: [0.0, 1.0]}, "apart"), make_circuit()
    shelf = {"one": one, "other": other, "apart": apart, "c": circuit, "p": replace(one, operation="ablate")}

    def told_of(*labels: str) -> tuple[str, bool]:
        found = mixing.remix(mix_of(shelf, list(labels)))
        assert "value" not in found["without_overlap"]  # what the visitor ticked stays
        return found["overlap"], found["without_overlap"]["visible"]

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
        run(steering, ask(), mix_of({"a": one, "b": other}, ["a", "b"], 2.0, -1.0, without_overlap=apart))
    plain = Recipe.of((one, 2.0), (other, -1.0))
    for recipe, wanted in zip(recipes, (plain, orthogonalised(plain)), strict=True):
        for use, expected in zip(recipe.uses, wanted.uses, strict=True):
            assert use.strength == expected.strength
            assert isinstance(use.artifact, SteeringVector) and isinstance(expected.artifact, SteeringVector)
            assert use.artifact.directions[1].equal(expected.artifact.directions[1])


def test_vectors_that_cannot_be_told_apart_are_one_line(steering: SteerHandlers, mood: Any) -> None:
    shelf = {"mood": mood, "mood (2)": mood}
    last = run(steering, ask(), mix_of(shelf, list(shelf), without_overlap=True))[-1]
    assert "nearly the same direction" in last.error and last.error.count("<p") == 1 and last.run["interactive"]


def test_the_choice_to_remove_the_overlap_lives_through_other_changes(mood: Any) -> None:
    mix = mix_of({"a": mood}, ["a"], 2.0, without_overlap=True)
    assert mix.without_overlap and mix.choosing({"b": mood}, ["b"]).without_overlap
    assert not mix_of({"a": mood}, ["a"]).without_overlap


def test_an_uploaded_artifact_shows_its_features(mixing: MixerHandlers, llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "glad.zip"
    vector = make_vector((1,), name="glad", model=llama.lm.reference, features=(feature(promoted=(HOSTILE,)),))
    path.write_bytes(pack(vector))
    found = mixing.upload(visitor(), str(path), mix_of({}, []))
    about = found["about"]
    assert (
        found["mix_error"] == ""
        and "<summary>About glad</summary>" in about
        and "what a <mark>lovely</mark> day" in about
    )
    assert "&lt;script&gt;" in about and "<script" not in about


def test_an_artifact_comes_back_from_its_zip(mixing: MixerHandlers, mood: Any, tmp_path: Path) -> None:
    path = tmp_path / "mood.zip"
    path.write_bytes(pack(mood))
    found = mixing.upload(visitor(), str(path), mix_of({"mood": mood}, ["mood"]))
    assert found["mix_error"] == "" and "mood (2)" in found["mix_note"]
    assert found["standing"] == ["mood", "mood (2)"]
    assert found["shelf"]["mood (2)"].directions[1].equal(mood.directions[1])


def test_a_wrong_zip_and_a_foreign_artifact_are_refused_in_one_line(
    mixing: MixerHandlers, mood: Any, tmp_path: Path
) -> None:
    junk, foreign = tmp_path / "junk.zip", tmp_path / "foreign.zip"
    junk.write_bytes(b"PK\x03\x04 not really")
    foreign.write_bytes(pack(replace(mood, model=replace(mood.model, n_layers=77))))
    for path, words in ((junk, "not a zip file"), (foreign, "77 layers")):
        found = mixing.upload(visitor(), str(path), mix_of({}, []))
        assert words in found["mix_error"] and path.name in found["mix_error"] and found["mix_note"] == ""
        assert set(found) == {"mix_error", "mix_note"}


def test_one_click_builds_the_example(mixing: MixerHandlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.mixer_handlers.read_bundled", lambda name: replace(EXAMPLES, name=name))
    found = mixing.build_example(visitor(), told, mix_of({}, []))
    assert found["example"]["interactive"] and found["mix_error"] == "" and "press Run" in found["mix_note"]
    assert list(found["shelf"]) == found["standing"] == ["sentiment-caa"] and not found["empty"]["visible"]
