"""The Steer tab's presets, comparisons, colours, links and models, without a browser, with a tiny random model."""

import re
import threading
from dataclasses import replace
from html import unescape
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from pages import HOSTILE, SKIP, ask, mix_values, run, visitor
from tiny import Tiny, make_circuit, make_vector

from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import ModelError
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.ui import shelf as shelves
from neurosteer.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import MOST, Mix
from neurosteer.ui.presets import PRESETS, Preset
from neurosteer.ui.show.html import signed
from neurosteer.ui.tabs.steer_handlers import SteerHandlers, new_talk


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, mood: Any) -> dict[str, Any]:
    """What comes with NeuroSteer, were the tiny model the embedded one."""
    found = {"sentiment": replace(mood, name="sentiment"), "circuit": make_circuit(name="circuit")}
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers.released_for", lambda model: found)
    monkeypatch.setattr(shelves, "released", lambda: found)
    return found


def written(llama: Tiny, *recipes: Recipe, prompt: Any = "the cat", tokens: int = 8) -> list[str]:
    rows = [Row(prompt, recipe) for recipe in recipes]
    return [row.text for row in Session(llama.lm).generate(rows, max_new_tokens=tokens, sampling=Sampling(greedy=True))]


def test_a_preset_chooses_a_released_artifact_and_writes_at_once(
    steering: SteerHandlers, llama: Tiny, released: dict[str, Any]
) -> None:
    preset = Preset("Down", "sentiment", -1.0)
    first, *_, last = steering.runner(preset)(visitor(), *ask(), *mix_values({}, []))
    assert first.picked == SKIP
    shelf, shown, _, chosen, *rest = steering.show_picked(last.picked, *mix_values({}, []))
    assert list(shelf) == ["sentiment", "circuit"] and shown == chosen["value"] == ["sentiment"]
    assert rest[MOST]["value"] == -1.0
    assert [last.unsteered, last.steered] == written(llama, Recipe(), Recipe.of((released["sentiment"], -1.0)))
    assert last.unsteered != last.steered


def test_the_presets_released_are_there() -> None:
    """What the page offers at once exists, and was made on the model that is loaded at once."""
    fitting = shelves.released_for("SmolLM2-135M-Instruct")
    assert {preset.artifact for preset in PRESETS} <= set(fitting)
    assert shelves.released_for("GPT-2-small") == {}
    assert all(shelves.origin(name) == shelves.RELEASED for name in fitting)


def test_a_released_name_is_not_taken_by_what_a_visitor_builds(mood: Any) -> None:
    _, label = shelves.put({}, replace(mood, name="sentiment"))
    assert label == "sentiment (2)" and shelves.origin(label) == shelves.OWN
    assert shelves.origin("someone/sentiment") == shelves.PULLED


def test_another_recipe_can_stand_on_the_left(steering: SteerHandlers, llama: Tiny, mood: Any) -> None:
    kept, against, error = steering.keep(*mix_values({"mood": mood}, ["mood"], -2.0))
    assert error == "" and against["value"] == "kept" and against["choices"][1] == ("kept: mood −2", "kept")
    mixed = mix_values({"mood": mood}, ["mood"], 2.0)
    views = run(steering, ask(kept=kept, against="kept"), mixed)
    wanted = written(llama, Recipe.of((mood, -2.0)), Recipe.of((mood, 2.0)))
    assert [views[-1].unsteered, views[-1].steered] == wanted and wanted[0] != wanted[1]
    assert views[0].unsteered["label"] == "Kept: mood −2" and views[0].steered["label"] == "Steered: mood +2"
    back = run(steering, ask(kept=kept, against="unsteered"), mixed)
    assert back[-1].unsteered == written(llama, Recipe())[0] and back[0].unsteered["label"] == "Unsteered"


def test_nothing_chosen_is_nothing_to_keep(steering: SteerHandlers) -> None:
    kept, against, error = steering.keep(*mix_values({}, []))
    assert (kept, against) == (SKIP, SKIP) and "no recipe to keep" in error


def test_again_draws_other_numbers_and_says_which(steering: SteerHandlers, mood: Any) -> None:
    mixed = mix_values({"mood": mood}, ["mood"])
    first = run(steering, ask(greedy=False), mixed)[-1]
    views = list(steering.again(visitor(), *ask(greedy=False), *mixed))
    assert steering.next_seed(0) == 1 and views[-1].unsteered != first.unsteered
    assert views[-1].unsteered == run(steering, ask(greedy=False, seed=1), mixed)[-1].unsteered


def test_again_in_a_chat_writes_the_last_answers_anew(steering: SteerHandlers, mood: Any) -> None:
    mixed = mix_values({"mood": mood}, ["mood"])
    talk = run(steering, ask(mode="chat", greedy=False), mixed)[-1].talk
    talk = run(steering, ask(mode="chat", greedy=False, talk=talk, prompt="and the dog"), mixed)[-1].talk
    anew = list(steering.again(visitor(), *ask(mode="chat", greedy=False, talk=talk, prompt=""), *mixed))[-1].talk
    for side in talk:
        assert anew[side][:3] == talk[side][:3] and anew[side][3] != talk[side][3] and len(anew[side]) == 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [(ask(prompt="x" * (MAX_PROMPT + 1)), "characters"), (ask(max_new_tokens=MAX_NEW_TOKENS + 1), "at most 512")],
)
def test_the_pages_limits_hold_whatever_the_browser_sends(
    steering: SteerHandlers, mood: Any, asked: Any, words: str
) -> None:
    last = run(steering, asked, mix_values({"mood": mood}, ["mood"]))[-1]
    assert words in last.error and last.steered == SKIP


def test_a_run_that_takes_too_long_is_stopped_and_kept(
    steering: SteerHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers.MAX_SECONDS", 0.0)
    last = run(steering, ask(max_new_tokens=200), mix_values({"mood": mood}, ["mood"]))[-1]
    assert "Stopped" in last.note and last.error == ""


def test_a_scaling_circuits_slider_is_its_multiplier(steering: SteerHandlers, llama: Tiny) -> None:
    circuit = make_circuit(name="c", model=llama.lm.reference, operation="scale")
    _, shown, _, _, *rest = steering.remix(*mix_values({"c": circuit}, ["c"])[:2], [], ["c"], *[1.0] * MOST, False)
    slider = rest[MOST]
    assert shown == ["c"] and slider["label"] == "c: multiplier" and slider["value"] == circuit.calibration.amount
    last = run(steering, ask(), mix_values({"c": circuit}, ["c"], 0.0))[-1]
    from neurosteer.artifacts.recipes import Use

    assert [last.unsteered, last.steered] == written(llama, Recipe(), Recipe.of(Use(circuit, multiplier=0.0)))
    assert Mix.of(mix_values({"c": circuit}, ["c"], 0.5)).in_words() == "c × 0.5"


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["projection", "kl"])
def test_coloured_texts_are_the_texts(steering: SteerHandlers, mood: Any, kind: str) -> None:
    mixed = mix_values({"mood": mood}, ["mood"], 3.0)
    done = run(steering, ask(), mixed)[-1]
    html = steering.colour(kind, done.last, *mixed)
    paragraphs = re.findall(r"<p class='ns-coloured'[^>]*>(.*?)</p>", html, re.DOTALL)
    assert [unescape(re.sub(r"<[^>]+>", "", part)) for part in paragraphs] == [done.unsteered, done.steered]
    shares = [int(share) for share in re.findall(r"--share:(\d+)%", html)]
    assert max(shares) > 50 and (kind == "kl" or min(shares) < 20)


def test_coloured_text_is_escaped(steering: SteerHandlers, llama: Tiny, mood: Any) -> None:
    rows = tuple(Row("the cat", Recipe.of((replace(mood, name="x"), 1.0)), text=HOSTILE) for _ in range(2))
    html = steering.colour("projection", rows, *mix_values({}, []))
    assert "<script" not in html and "<img" not in html and "&lt;" in html


def test_without_texts_there_is_nothing_to_colour(steering: SteerHandlers) -> None:
    assert "Run it first" in steering.colour("kl", (), *mix_values({}, []))
    assert steering.colour("", (), *mix_values({}, [])) == ""


# --- links -----------------------------------------------------------------------------------------------------------


def arriving(query: str = "") -> Any:
    return SimpleNamespace(session_hash="anna", query_params=query)


def test_a_visitor_finds_what_was_released(steering: SteerHandlers, released: dict[str, Any]) -> None:
    found = steering.arrive(arriving(), *mix_values({}, []))
    set_to, (error, shelf, _, empty, chosen) = found[:8], found[8:13]
    assert set_to == [SKIP] * 8 and error == "" and list(shelf) == list(released)
    assert not empty["visible"] and chosen["value"] == []


def test_a_shared_link_sets_the_page_as_it_was(steering: SteerHandlers, released: dict[str, Any]) -> None:
    asked = ask(prompt="Tell <me> & all?", temperature=0.5, seed=7, greedy=True, max_new_tokens=33)
    mixed = mix_values(released, ["sentiment"], -1.5)
    query, error = steering.share(*asked, *mixed)
    assert error == ""
    model, mode, prompt, length, temperature, top_p, seed, greedy, error, *mixer = steering.arrive(
        arriving(query.removeprefix("?")), *mix_values({}, [])
    )
    assert (mode, prompt, length, temperature, top_p, seed, greedy, error) == (
        "prompt", asked.prompt, 33, 0.5, 0.95, 7, True, "",
    )  # fmt: skip
    assert model == steering.models.default
    assert mixer[1] == ["sentiment"] and mixer[4 + MOST]["value"] == -1.5


def test_what_is_on_this_page_only_cannot_be_shared(
    steering: SteerHandlers, mood: Any, released: dict[str, Any]
) -> None:
    query, error = steering.share(*ask(), *mix_values({"mood": mood}, ["mood"]))
    assert query == "" and "mood is on this page only" in error


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("use=nothing:1&prompt=x", "not among those released here"),
        ("use=../x:1", "no artifact at a strength"),
        ("use=sentiment:1&model=evil/model", "not on offer"),
    ],
)
def test_a_link_that_leads_nowhere_is_one_line_and_the_page_works(
    steering: SteerHandlers, released: dict[str, Any], query: str, words: str
) -> None:
    found = steering.arrive(arriving(query), *mix_values({}, []))
    set_to, (error, shelf, _, _, chosen) = found[:8], found[8:13]
    assert words in error and error.count("<p") == 1
    assert set_to == [SKIP] * 8 and list(shelf) == list(released) and chosen["value"] == []


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_are_loaded_once_and_the_least_used_makes_room(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.loading.free_memory_gb", lambda: 1000.0)
    loaded: list[str | None] = []

    def load(name: str | None, progress: Any) -> Any:
        loaded.append(name)
        return llama.lm

    models = Models(load=load, most=2)
    for name in (None, "GPT-2-small", "GPT-2-small", "Gemma-3-270M", None):
        assert models.holder(name).wait().lm is llama.lm
    assert loaded == ["SmolLM2-135M-Instruct", "GPT-2-small", "Gemma-3-270M"]
    models.holder("GPT-2-small").wait()
    assert loaded[3:] == ["GPT-2-small"]
    assert models.holder() is models.holder("SmolLM2-135M-Instruct")


def test_a_model_that_does_not_fit_or_is_not_on_offer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.loading.free_memory_gb", lambda: 2.0)
    models = Models()
    with pytest.raises(ModelError, match=r"Gemma-2-2B needs about .* and 2\.0 GB are free"):
        models.holder("Gemma-2-2B")
    with pytest.raises(ModelError, match="'evil/model' is not on offer"):
        models.holder("evil/model")
    assert models.holder("GPT-2-small") is not models.holder()


def test_choosing_a_model_changes_what_is_released_and_keeps_what_is_ones_own(
    steering: SteerHandlers, mood: Any, released: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers.released_for", lambda model: {})
    values = mix_values({**released, "mood": mood}, ["sentiment", "mood"])
    error, shelf, shown, *_ = steering.choose_model(*values)
    assert error == "" and list(shelf) == shown == ["mood"]
    error, *rest = steering.choose_model("evil/model", *values[1:])
    assert "not on offer" in error and rest == [gr.skip()] * len(rest)


def test_two_visitors_never_stop_each_other(steering: SteerHandlers, llama: Tiny) -> None:
    vector = make_vector((1,), model=llama.lm.reference)
    mixed = mix_values({"v": vector}, ["v"])
    anna, bert = (steering.run(visitor(name), *ask(max_new_tokens=40), *mixed) for name in ("anna", "bert"))
    next(anna)
    next(bert)
    steering.stop(visitor("anna"))
    assert "ended before" in list(anna)[-1].note and "40 + " in list(bert)[-1].note
    assert new_talk() == {"unsteered": [], "steered": []} and threading.active_count() > 0


@pytest.mark.parametrize(("number", "said"), [(1.0, "+1"), (-0.5, "−0.5"), (0.0, "0"), (2.25, "+2.25")])
def test_strengths_are_said_with_a_sign(number: float, said: str) -> None:
    assert signed(number) == said
