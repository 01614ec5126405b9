"""The Circuits tab without a browser: what it shows, and what its handlers do."""

import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from pages import HOSTILE, Never, Ready, mix_of, told, visitor
from tiny import Tiny, make_circuit, make_vector

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.circuits import (
    Attribution,
    Prediction,
    Selection,
    attribute,
    find_edges,
    find_universal,
    find_unspecific,
    sweep_multipliers,
)
from neurosteer.progress import check_cancelled
from neurosteer.steering.session import Session
from neurosteer.ui import work
from neurosteer.ui.explaining import KEEP, LEAVE_OUT, LEAVE_OUT_MORE, MAX_TOKENS, Question
from neurosteer.ui.jobs import Jobs
from neurosteer.ui.limits import MAX_PROMPT
from neurosteer.ui.loading import Models
from neurosteer.ui.show import circuits as shown
from neurosteer.ui.show.html import signed
from neurosteer.ui.tabs.circuits import CircuitHandlers

PROMPT = "the cat runs over the"
QUESTION = Question(PROMPT, "a", "t", 40, LEAVE_OUT, False)


@pytest.fixture
def found(llama: Tiny) -> Attribution:
    return attribute(llama.lm, PROMPT, "a", "t", raw=True)


@pytest.fixture
def handlers(llama: Tiny) -> CircuitHandlers:
    return CircuitHandlers(Models.of(Ready(Session(llama.lm)), None), Jobs())


def asked(handlers: CircuitHandlers, question: Question = QUESTION, **changes: Any) -> dict[str, Any]:
    return handlers.attribute(visitor(), told, question._replace(**changes), mix_of({}, []))


class Text(HTMLParser):
    """The text of HTML, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def likely(answer: str) -> list[str]:
    """The words of a list of predictions, as HTML."""
    return re.findall(r"<li><bdi class='ns-word'>(.*?)</bdi> ([\d.]+%)", answer)


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "wanted"), [(" Paris", "·Paris"), ("\n", "↵"), ("", "∅"), ("a\x1b[0mb", "a�[0mb"), ("‮", "�")]
)
def test_a_token_is_shown_in_printable_characters(token: str, wanted: str) -> None:
    assert shown.visible(token) == wanted


def test_the_summary_says_what_was_asked_what_came_and_what_is_left_out(found: Attribution) -> None:
    circuit = found.circuit(select=Selection("top_k", 40))
    said = Text(shown.summary(found, circuit)).text
    assert f"a rather than t: {found.prompts[0].metric:+.2f}".replace("-", "−") in said.replace("-", "−")
    assert "40 strongest neurons" in said and f"{len(circuit.layers)} layers" in said and "first token" not in said
    assert ("left out" in said) == bool(found.left_out)
    assert f"{len(found.left_out)} that fire" in said or not found.left_out
    assert "left out" not in shown.summary(replace(found, keep_universal=True), circuit)


def test_a_target_of_several_tokens_is_said_to_be_its_first(llama: Tiny) -> None:
    part = attribute(llama.lm, PROMPT, "abc", raw=True, keep_universal=True)
    assert "the first token of what you wrote" in shown.summary(part, part.circuit())


def test_the_table_holds_the_strongest_neurons_with_their_tokens(found: Attribution) -> None:
    rows = shown.table(found, 12)
    wanted = found.rows(Selection("top_k", 12))
    assert [(row[0], row[1], row[3]) for row in rows] == [one[:3] for one in wanted]
    assert [row[2] for row in rows] == [shown.visible(found.tokens[0][one.position]) for one in wanted]
    assert [row[4] for row in rows] == pytest.approx([one.score for one in wanted], abs=6e-4)
    assert all(len(row) == len(shown.COLUMNS) for row in rows)


def test_a_circuit_of_no_prompt_lists_its_neurons_strongest_first() -> None:
    circuit = make_circuit(seed=3)
    rows = shown.circuit_table(circuit)
    assert sorted(row[0] for row in rows) == sorted(circuit.neuron_layers.tolist())
    sizes = [abs(row[4]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and all(len(row) == len(shown.COLUMNS) for row in rows)


def test_the_heat_map_adds_up_what_every_neuron_of_a_layer_gives_at_a_token(llama: Tiny) -> None:
    whole = attribute(llama.lm, PROMPT, "a", "t", raw=True, keep_universal=True, per_position=llama.lm.shape.d_mlp)
    sums: dict[tuple[int, int], float] = {}
    for row in whole.rows():
        sums[row.layer, row.position] = sums.get((row.layer, row.position), 0.0) + row.score
    (heat,) = shown.heat_map(whole).data
    for layer, line in enumerate(heat.z):
        assert line == pytest.approx([sums.get((layer, at), 0.0) for at in range(len(whole.tokens[0]))], abs=1e-5)
    assert heat.zmin == -heat.zmax == -max(abs(value) for line in heat.z for value in line)


def test_a_long_prompt_s_heat_map_names_some_tokens_and_nothing_names_them_as_html(llama: Tiny) -> None:
    long = attribute(llama.lm, HOSTILE + " word" * 30, "a", raw=True, keep_universal=True)
    figure = shown.heat_map(long)
    assert len(figure.layout.xaxis.tickvals) <= 96 < len(long.tokens[0]) < MAX_TOKENS
    assert not any("<" in text for text in figure.layout.xaxis.ticktext)


def test_the_edge_picture_lets_the_page_show_through_and_keeps_every_edge(found: Attribution, llama: Tiny) -> None:
    graph = find_edges(llama.lm, found, select=Selection("top_k", 20), n_targets=5)
    figure = shown.edge_picture(graph)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    *lines, _ = figure.data
    assert sum(len([x for x in line.x if x is None]) for line in lines) == len(graph.edges)


def test_predictions_are_shown_side_by_side_and_as_text() -> None:
    before, after = [Prediction(1, HOSTILE, 0.75)], [Prediction(2, " cat", 0.5), Prediction(3, " dog", 0.25)]
    html = shown.predictions(before, after, 0.5)
    page = Text(html)
    assert page.tags == {"div", "h4", "ol", "li", "bdi", "span"}
    assert "75.0%" in page.text and "·cat 50.0%" in page.text and "The circuit × 0.5" in page.text
    assert "<script" not in html and "alert" in page.text
    assert "--share:75%" in html


def test_a_circuit_of_the_shelf_is_told_as_text() -> None:
    assert "<b>" in shown.about_circuit(make_circuit()) and "neuron" in shown.about_circuit(make_circuit())


# --- what the handlers do --------------------------------------------------------------------------------------------


def test_a_question_is_answered_as_the_library_does(handlers: CircuitHandlers, llama: Tiny) -> None:
    found = asked(handlers)
    wanted = attribute(llama.lm, PROMPT, "a", "t", raw=True)
    circuit = wanted.circuit(select=Selection("top_k", 40))
    assert found["error"] == "" and found["summary"] == shown.summary(wanted, circuit)
    assert found["table"]["value"] == shown.table(wanted, 40) and len(found["table"]["value"]) == 40
    assert all(found[name]["visible"] for name in ("heat", "table", "edges", "multiplier", "save"))
    assert found["current"].circuit.neurons.tolist() == circuit.neurons.tolist() and found["multiplier"]["value"] == 0.0
    before, after = sweep_multipliers(llama.lm, circuit, PROMPT, [1.0, 0.0], k=8, raw=True)
    words = [(shown.visible(one.text), f"{one.probability:.1%}") for one in (*before.predictions, *after.predictions)]
    assert [(Text(word).text, share) for word, share in likely(found["predictions"])] == words


@pytest.mark.parametrize("choice", [LEAVE_OUT, LEAVE_OUT_MORE, KEEP])
def test_neurons_of_any_prompt_are_left_out_as_chosen(handlers: CircuitHandlers, llama: Tiny, choice: str) -> None:
    current = asked(handlers, universal=choice, neurons=256)["current"]
    gone = {LEAVE_OUT: find_universal, LEAVE_OUT_MORE: find_unspecific}
    left_out = set(gone[choice](llama.lm).all) if choice in gone else set()
    found: NeuronCircuit = current.circuit
    assert not left_out & set(zip(found.neuron_layers.tolist(), found.neurons.tolist(), strict=True))
    assert found.parameters["keep_universal"] == (choice == KEEP)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"target": ""}, "next word is empty"),
        ({"counterfactual": "a"}, "same token"),
        ({"prompt": "a" * (MAX_PROMPT + 1)}, "8,001 characters"),
        ({"prompt": "word " * MAX_TOKENS}, f"{MAX_TOKENS} tokens"),
        ({"neurons": 0}, "neurons is 0"),
        ({"prompt": HOSTILE, "target": HOSTILE, "counterfactual": HOSTILE}, "same token"),
    ],
)
def test_a_mistake_is_one_line_and_what_is_shown_stays(
    handlers: CircuitHandlers, changes: dict[str, Any], words: str
) -> None:
    found = asked(handlers, **changes)
    assert words in Text(found["error"]).text and Text(found["error"]).tags <= {"div", "p", "span"}
    assert set(found) == {"error"}


def test_a_circuit_of_the_shelf_is_tried_on_the_prompt_and_moved(
    handlers: CircuitHandlers, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    circuit = make_circuit(name="mine", model=llama.lm.reference, operation="scale")
    shelf = {"mine": circuit, "vector": make_vector(model=llama.lm.reference)}
    mix, no_word = mix_of(shelf, []), QUESTION._replace(target="")
    found = handlers.take(visitor(), told, "mine", no_word, mix)
    assert found["error"] == "" and "mine" in found["summary"]
    assert not any(found[name]["visible"] for name in ("heat", "edges", "save"))
    assert found["table"]["value"] == shown.circuit_table(circuit) and found["multiplier"]["visible"]
    current = found["current"]
    assert current.circuit is circuit and len(likely(found["predictions"])) == 16
    monkeypatch.setattr(handlers.models.holder(), "wait", None)  # sliding asks the model for nothing
    for multiplier in (0.0, 0.7, 1.0, 3.0, 4.0):
        after = sweep_multipliers(llama.lm, circuit, PROMPT, [1.0, multiplier], k=8, raw=True)[1].predictions
        moved = handlers.move(current, multiplier)
        assert [share for _, share in likely(moved)][8:] == [f"{one.probability:.1%}" for one in after]
        assert f"The circuit × {multiplier:g}" in moved
    assert handlers.move(None, 1.0) == ""
    assert handlers.circuits(mix)["choices"] == ["mine"]
    assert handlers.take(visitor(), told, None, QUESTION, mix) == {}
    empty = handlers.take(visitor(), told, "mine", QUESTION._replace(prompt=" "), mix)
    assert "prompt is empty" in empty["error"] and set(empty) == {"error"}


@pytest.mark.parametrize("taking", [False, True])
def test_what_takes_too_long_is_stopped_and_said(
    handlers: CircuitHandlers, llama: Tiny, taking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*given: Any, cancel: threading.Event, **options: Any) -> None:
        cancel.wait(20)
        check_cancelled(cancel, "Attributing")

    monkeypatch.setattr("neurosteer.circuits.attribute", slowly)
    monkeypatch.setattr(work, "MAX_SECONDS", 0.2)
    mix = mix_of({"mine": make_circuit(model=llama.lm.reference)}, [])
    found = handlers.take(visitor(), told, "mine", QUESTION, mix) if taking else asked(handlers)
    assert "took over 0.2 s and was stopped" in found["error"] and set(found) == {"error"}


def test_a_circuit_of_the_shelf_shows_what_of_the_word_is_owed_to_it(handlers: CircuitHandlers, llama: Tiny) -> None:
    circuit = make_circuit(name="mine", model=llama.lm.reference, operation="scale")
    mix = mix_of({"mine": circuit}, [])
    found = handlers.take(visitor(), told, "mine", QUESTION, mix)
    whole = attribute(llama.lm, PROMPT, "a", "t", raw=True, keep_universal=True, per_position=llama.lm.shape.d_mlp)
    mine = set(zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True))
    owed = [row for row in whole.rows() if (row.layer, row.neuron) in mine][:40]
    assert found["error"] == "" and found["heat"]["visible"] and found["edges"]["visible"] and len(owed) > 5
    assert [(row[0], row[1], row[3]) for row in found["table"]["value"]] == [row[:3] for row in owed]
    share = sum(row.score for row in whole.rows() if (row.layer, row.neuron) in mine)
    assert f"its neurons give {signed(round(share, 2))}" in Text(found["summary"]).text
    same = QUESTION._replace(counterfactual="a")
    assert "same token" in handlers.take(visitor(), told, "mine", same, mix)["error"]


def test_what_was_found_goes_to_the_shelf_and_is_chosen(handlers: CircuitHandlers) -> None:
    current = asked(handlers)["current"]
    found = handlers.save(current, mix_of({}, []))
    assert "a-relp is on your shelf" in Text(found["summary"]).text
    assert found["shelf"]["a-relp"] is current.circuit and found["standing"] == ["a-relp"]
    assert handlers.save(None, mix_of({}, [])) == {}


def test_stop_ends_the_visitor_s_own_work_only(handlers: CircuitHandlers) -> None:
    mine, other = handlers.jobs.begin("anna", "circuits"), handlers.jobs.begin("bert", "circuits")
    handlers.stop(visitor("anna"))
    assert mine.is_set() and not other.is_set()


def test_a_model_that_failed_to_load_is_told(llama: Tiny) -> None:
    class Failed(Never):
        def wait(self, progress: Any = None, cancel: threading.Event | None = None) -> Any:
            from neurosteer.errors import ModelError

            raise ModelError("The model is not there: no network.")

    handlers = CircuitHandlers(Models.of(Failed(), None), Jobs())
    assert "no network" in asked(handlers)["error"]
