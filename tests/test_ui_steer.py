"""The Steer tab's presets, comparisons, colours, links and models, without a browser, with a tiny random model."""

import re
import threading
import time
from dataclasses import replace
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest
from pages import HOSTILE, SKIP, ask, mix_of, run, visitor
from tiny import Tiny, make_circuit, make_vector

from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import ModelError
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.ui import shelf as shelves
from neurosteer.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT
from neurosteer.ui.loading import Models
from neurosteer.ui.presets import PRESETS, Preset
from neurosteer.ui.show.html import signed
from neurosteer.ui.tabs.mixer_handlers import MixerHandlers
from neurosteer.ui.tabs.steer_handlers import SteerHandlers
from neurosteer.ui.tabs.steer_texts import new_talk


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, mood: Any) -> dict[str, Any]:
    """What comes with NeuroSteer, were the tiny model the embedded one."""
    found = {"sentiment": replace(mood, name="sentiment"), "circuit": make_circuit(name="circuit")}
    for module in ("steer_handlers", "mixer_handlers"):
        monkeypatch.setattr(f"neurosteer.ui.tabs.{module}.released_for", lambda model: found)
    monkeypatch.setattr(shelves, "released", lambda: found)
    return found


def written(llama: Tiny, *recipes: Recipe, prompt: Any = "the cat", tokens: int = 8) -> list[str]:
    rows = [Row(prompt, recipe) for recipe in recipes]
    return [row.text for row in Session(llama.lm).generate(rows, max_new_tokens=tokens, sampling=Sampling(greedy=True))]


def test_a_preset_chooses_a_released_artifact_and_writes_at_once(
    steering: SteerHandlers, llama: Tiny, released: dict[str, Any]
) -> None:
    preset = Preset("Down", "sentiment", -1.0)
    first, *_, last = steering.runner(preset)(visitor(), ask(), mix_of({}, []))
    assert first.picked == SKIP
    mixed = steering.show_picked(last.picked, mix_of({}, []))
    assert list(mixed["shelf"]) == ["sentiment", "circuit"]
    assert mixed["standing"] == mixed["chosen"]["value"] == ["sentiment"] and mixed["slider_1"]["value"] == -1.0
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
    aside = steering.put_aside(mix_of({"mood": mood}, ["mood"], -2.0))
    kept, against = aside["kept"], aside["against"]
    assert (
        aside["mix_error"] == "" and against["value"] == "kept" and against["choices"][1] == ("kept: mood −2", "kept")
    )
    mixed = mix_of({"mood": mood}, ["mood"], 2.0)
    views = run(steering, ask(kept=kept, against="kept"), mixed)
    wanted = written(llama, Recipe.of((mood, -2.0)), Recipe.of((mood, 2.0)))
    assert [views[-1].unsteered, views[-1].steered] == wanted and wanted[0] != wanted[1]
    assert views[0].unsteered["label"] == "Kept: mood −2" and views[0].steered["label"] == "Steered: mood +2"
    back = run(steering, ask(kept=kept, against="unsteered"), mixed)
    assert back[-1].unsteered == written(llama, Recipe())[0] and back[0].unsteered["label"] == "Unsteered"


def test_nothing_chosen_is_nothing_to_keep(steering: SteerHandlers) -> None:
    found = steering.put_aside(mix_of({}, []))
    assert set(found) == {"mix_error"} and "no recipe to keep" in found["mix_error"]


def test_again_draws_other_numbers_and_says_which(steering: SteerHandlers, mood: Any) -> None:
    mixed = mix_of({"mood": mood}, ["mood"])
    first = run(steering, ask(greedy=False), mixed)[-1]
    views = list(steering.again(visitor(), ask(greedy=False), mixed))
    assert steering.next_seed(0) == 1 and views[-1].unsteered != first.unsteered
    assert views[-1].unsteered == run(steering, ask(greedy=False, seed=1), mixed)[-1].unsteered


def test_again_in_a_chat_writes_the_last_answers_anew(steering: SteerHandlers, mood: Any) -> None:
    mixed = mix_of({"mood": mood}, ["mood"])
    talk = run(steering, ask(mode="chat", greedy=False), mixed)[-1].talk
    talk = run(steering, ask(mode="chat", greedy=False, talk=talk, prompt="and the dog"), mixed)[-1].talk
    anew = list(steering.again(visitor(), ask(mode="chat", greedy=False, talk=talk, prompt=""), mixed))[-1].talk
    for side in talk:
        assert anew[side][:3] == talk[side][:3] and anew[side][3] != talk[side][3] and len(anew[side]) == 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [(ask(prompt="x" * (MAX_PROMPT + 1)), "characters"), (ask(max_new_tokens=MAX_NEW_TOKENS + 1), "at most 512")],
)
def test_the_pages_limits_hold_whatever_the_browser_sends(
    steering: SteerHandlers, mood: Any, asked: Any, words: str
) -> None:
    last = run(steering, asked, mix_of({"mood": mood}, ["mood"]))[-1]
    assert words in last.error and last.steered == SKIP


def test_a_run_that_takes_too_long_is_stopped_and_kept(
    steering: SteerHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.steer_handlers.MAX_SECONDS", 0.0)
    last = run(steering, ask(max_new_tokens=200), mix_of({"mood": mood}, ["mood"]))[-1]
    assert "Stopped" in last.note and last.error == ""


def test_a_scaling_circuits_slider_is_its_multiplier(
    steering: SteerHandlers, mixing: MixerHandlers, llama: Tiny
) -> None:
    circuit = make_circuit(name="c", model=llama.lm.reference, operation="scale")
    found = mixing.remix(mix_of({"c": circuit}, ["c"], standing=[]))
    slider = found["slider_1"]
    assert (
        found["standing"] == ["c"]
        and slider["label"] == "c: multiplier"
        and slider["value"] == circuit.calibration.amount
    )
    last = run(steering, ask(), mix_of({"c": circuit}, ["c"], 0.0))[-1]
    from neurosteer.artifacts.recipes import Use

    assert [last.unsteered, last.steered] == written(llama, Recipe(), Recipe.of(Use(circuit, multiplier=0.0)))
    assert mix_of({"c": circuit}, ["c"], 0.5).in_words() == "c × 0.5"


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["projection", "kl"])
def test_coloured_texts_are_the_texts(steering: SteerHandlers, mood: Any, kind: str) -> None:
    mixed = mix_of({"mood": mood}, ["mood"], 3.0)
    done = run(steering, ask(), mixed)[-1]
    html = steering.colour(kind, done.last, mixed)
    paragraphs = re.findall(r"<p class='ns-coloured'[^>]*>(.*?)</p>", html, re.DOTALL)
    assert [unescape(re.sub(r"<[^>]+>", "", part)) for part in paragraphs] == [done.unsteered, done.steered]
    shares = [int(share) for share in re.findall(r"--share:(\d+)%", html)]
    assert max(shares) > 50 and (kind == "kl" or min(shares) < 20)


def test_coloured_text_is_escaped(steering: SteerHandlers, llama: Tiny, mood: Any) -> None:
    rows = tuple(Row("the cat", Recipe.of((replace(mood, name="x"), 1.0)), text=HOSTILE) for _ in range(2))
    html = steering.colour("projection", rows, mix_of({}, []))
    assert "<script" not in html and "<img" not in html and "&lt;" in html


def test_without_texts_there_is_nothing_to_colour(steering: SteerHandlers) -> None:
    assert "Run it first" in steering.colour("kl", (), mix_of({}, []))
    assert steering.colour("", (), mix_of({}, [])) == ""


# --- links -----------------------------------------------------------------------------------------------------------


def arriving(query: str = "") -> Any:
    return SimpleNamespace(session_hash="anna", query_params=query)


SET_BY_A_LINK = {"model", "mode", "prompt", "max_new_tokens", "temperature", "top_p", "seed", "greedy"}


def test_a_visitor_finds_what_was_released(mixing: MixerHandlers, released: dict[str, Any]) -> None:
    found = mixing.arrive(arriving(), mix_of({}, []))
    assert not SET_BY_A_LINK & set(found) and found["mix_error"] == "" and list(found["shelf"]) == list(released)
    assert not found["empty"]["visible"] and found["chosen"]["value"] == []


def test_a_shared_link_sets_the_page_as_it_was(
    steering: SteerHandlers, mixing: MixerHandlers, released: dict[str, Any]
) -> None:
    asked = ask(prompt="Tell <me> & all?", temperature=0.5, seed=7, greedy=True, max_new_tokens=33)
    mixed = mix_of(released, ["sentiment"], -1.5)
    shared = steering.share(asked, mixed)
    assert shared["error"] == ""
    found = mixing.arrive(arriving(shared["query"].removeprefix("?")), mix_of({}, []))
    assert {name: found[name] for name in SET_BY_A_LINK} == {
        "model": steering.models.default, "mode": "prompt", "prompt": asked.prompt, "max_new_tokens": 33,
        "temperature": 0.5, "top_p": 0.95, "seed": 7, "greedy": True,
    }  # fmt: skip
    assert found["mix_error"] == "" and found["standing"] == ["sentiment"] and found["slider_1"]["value"] == -1.5
    assert "fetch" not in found


def test_what_a_link_names_on_the_hub_is_offered_and_fetched_only_when_asked_for(
    mixing: MixerHandlers, mood: Any, released: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled: list[str] = []
    monkeypatch.setattr("neurosteer.hub.pull", lambda name, token: pulled.append(name) or mood)
    found = mixing.arrive(arriving("use=sentiment:-1&use=alice/mood:0.5&apart=1"), mix_of({}, []))
    assert pulled == [] and found["standing"] == ["sentiment"] and found["slider_1"]["value"] == -1.0
    assert found["fetch"]["visible"] and "alice/mood" in found["fetch"]["value"]
    done = mixing.fetch_linked(found["wanted"], mix_of(found["shelf"], ["sentiment"], -1.0))
    assert pulled == ["alice/mood"] and done["standing"] == ["sentiment", "alice/mood"] and done["mix_error"] == ""
    assert [done[f"slider_{number}"]["value"] for number in (1, 2)] == [-1.0, 0.5] and not done["fetch"]["visible"]
    assert mixing.fetch_linked(None, mix_of({}, [])) == {}


def test_a_hub_that_takes_too_long_to_give_what_a_link_names_is_given_up(
    mixing: MixerHandlers, released: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = threading.Event()
    monkeypatch.setattr("neurosteer.hub.pull", lambda name, token: gone.wait(30))
    monkeypatch.setattr("neurosteer.ui.tabs.mixer_handlers.LINK_S", 0.2)
    found = mixing.arrive(arriving("use=alice/slow:1"), mix_of({}, []))
    started = time.monotonic()
    error = mixing.fetch_linked(found["wanted"], mix_of({}, []))["mix_error"]
    gone.set()
    assert time.monotonic() - started < 5 and "Fetching alice/slow took over 0.2 s" in error


def test_what_is_on_this_page_only_cannot_be_shared(
    steering: SteerHandlers, mood: Any, released: dict[str, Any]
) -> None:
    found = steering.share(ask(), mix_of({"mood": mood}, ["mood"]))
    assert found["query"] == "" and "mood is on this page only" in found["error"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("use=nothing:1&prompt=x", "not among those released here"),
        ("use=../x:1", "no artifact at a strength"),
        ("use=sentiment:1&model=evil/model", "not on offer"),
    ],
)
def test_a_link_that_leads_nowhere_is_one_line_and_the_page_works(
    mixing: MixerHandlers, released: dict[str, Any], query: str, words: str
) -> None:
    found = mixing.arrive(arriving(query), mix_of({}, []))
    assert words in found["mix_error"] and found["mix_error"].count("<p") == 1 and not SET_BY_A_LINK & set(found)
    assert list(found["shelf"]) == list(released) and found["chosen"]["value"] == []


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
    mixing: MixerHandlers, mood: Any, released: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.tabs.mixer_handlers.released_for", lambda model: {})
    mix = mix_of({**released, "mood": mood}, ["sentiment", "mood"])
    found = mixing.choose_model(mix)
    assert found["mix_error"] == "" and list(found["shelf"]) == found["standing"] == ["mood"]
    found = mixing.choose_model(replace(mix, model="evil/model"))
    assert "not on offer" in found["mix_error"] and set(found) == {"mix_error"}


def test_two_visitors_never_stop_each_other(steering: SteerHandlers, llama: Tiny) -> None:
    vector = make_vector((1,), model=llama.lm.reference)
    mixed = mix_of({"v": vector}, ["v"])
    anna, bert = (steering.run(visitor(name), ask(max_new_tokens=40), mixed) for name in ("anna", "bert"))
    next(anna)
    next(bert)
    steering.stop(visitor("anna"))
    assert "ended before" in list(anna)[-1].note and "40 + " in list(bert)[-1].note
    assert new_talk() == {"unsteered": [], "steered": []} and threading.active_count() > 0


@pytest.mark.parametrize(("number", "said"), [(1.0, "+1"), (-0.5, "−0.5"), (0.0, "0"), (2.25, "+2.25")])
def test_strengths_are_said_with_a_sign(number: float, said: str) -> None:
    assert signed(number) == said
