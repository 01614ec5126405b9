"""The Evaluate tab without a browser: what it shows, and what its handlers do."""

import json
import pickle
import threading
import time
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from pages import EXAMPLES, HOSTILE, Never, Ready, mix_of, slow_steps, source, texts, told, visitor
from tiny import Tiny, make_vector

from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe
from neurosteer.building.build import build
from neurosteer.evaluation import CallableJudge, Evaluation, PatternJudge, TextClassifier, evaluate
from neurosteer.evaluation.report import generations_csv
from neurosteer.examples.files import bundled_sets, neutral_prompts
from neurosteer.steering.batches import Batch
from neurosteer.steering.session import Session
from neurosteer.ui import evaluating, gpu_time, work
from neurosteer.ui.evaluating import KIND, Plan
from neurosteer.ui.jobs import Jobs
from neurosteer.ui.limits import MAX_EVALUATED_TEXTS, MAX_PROMPT
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import Mix
from neurosteer.ui.show import evaluation as shown
from neurosteer.ui.show import html as render
from neurosteer.ui.tabs.evaluate_handlers import (
    BUNDLED,
    FILE,
    OWN,
    PATTERN,
    RECIPE,
    REFUSAL,
    WORDS,
    EvaluateHandlers,
    JudgeAsked,
    Measured,
)

PROMPTS = ("the cat", "happy mountain", "over the")
WORDS_ASKED = JudgeAsked(WORDS, None, None, "a, t, the", "")
PLAN = Plan("\n".join(PROMPTS), 8, "-1, 0, 1", 1, 6, 1, "", "", 0)
NO_SOURCE = source("bundled")


@pytest.fixture
def handlers(llama: Tiny) -> EvaluateHandlers:
    return EvaluateHandlers(Models.of(Ready(Session(llama.lm))), Jobs())


@pytest.fixture(scope="module")
def found(llama_module: Tiny) -> Evaluation:
    """A vector on the tiny model, judged by a word that hostile prompts hold."""
    vector = make_vector([1], name="mood")
    judge = CallableJudge("letters", lambda text: sum(char in "aeiou" for char in text) / max(len(text), 1))
    prompts = (HOSTILE, *PROMPTS)
    return evaluate(
        llama_module.lm,
        vector,
        judge,
        prompts=prompts,
        strengths=(-1, 0, 1, 2),
        samples=2,
        max_new_tokens=6,
        n_random=2,
    )


@pytest.fixture(scope="module")
def llama_module() -> Tiny:
    from tiny import tiny

    return tiny("llama")


class Page(HTMLParser):
    """The text of HTML, its tags, and the cells of its rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.rows = "", set[str](), list[list[str]]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def asked(
    handlers: EvaluateHandlers,
    mixed: Mix,
    what: str | None = "mood",
    judge: JudgeAsked = WORDS_ASKED,
    plan: Plan = PLAN,
    examples: Any = NO_SOURCE,
    who: str = "anna",
) -> dict[str, Any]:
    return handlers.evaluate(visitor(who), told, what, judge, plan, examples, mixed)


def error_of(answer: dict[str, Any]) -> str:
    assert answer["start"]["interactive"] and not answer["cancel"]["interactive"], "Run can be pressed again"
    assert set(answer) == {"start", "cancel", "error", "note"}, "what was shown before stays"
    return Page(answer["error"]).text


# --- what is shown ---------------------------------------------------------------------------------------------------


def row_of(found: Evaluation, kind: str, strength: float) -> dict[str, Any]:
    (row,) = [row for row in found.receipt.data["rows"] if (row["kind"], row["strength"]) == (kind, strength)]
    return row


def test_the_summary_tells_the_receipts_figures_in_words(found: Evaluation) -> None:
    said = Page(shown.summary(found.receipt, len(found.rows), 12.4)).text
    up, down, plain = (row_of(found, *at) for at in (("steered", 1.0), ("steered", -1.0), ("unsteered", 0.0)))
    assert f"at strength +1, {up['share']:.0%} of the texts show it ({up['share_low']:.0%} to" in said
    assert f"at strength −1, {down['share']:.0%} (" in said and f"unsteered, {plain['share']:.0%} (" in said
    assert f"random twins {row_of(found, 'random', 1.0)['share']:.0%} at +1" in said
    assert f"KL {up['kl_p95']:.2g} nats, perplexity × {up['perplexity']:.2f}" in said
    n_texts = len(found.rows)
    assert f"{n_texts} texts of at most 6 tokens in 12 s" in said
    assert all(note in said for note in found.receipt.data["table"]["notes"])
    assert "how often it is right was not measured" in said and "too weak" not in said


def test_a_judge_that_is_hardly_ever_right_is_marked_and_its_name_is_text(found: Evaluation) -> None:
    judge = {"name": HOSTILE, "accuracy": 0.6, "n_accuracy": 1200, "is_weak": True}
    html = shown.summary(Receipt({**found.receipt.data, "judge": judge}), 9, 1.0)
    page = Page(html)
    assert "right on 60% of 1,200 labelled texts" in page.text and shown.WEAK_JUDGE in page.text
    assert HOSTILE in page.text and page.tags <= {"div", "p", "b"}


def test_the_effect_is_drawn_with_its_interval_and_its_controls(found: Evaluation) -> None:
    figure = shown.effect_figure(found.receipt)
    traces = {trace.name: trace for trace in figure.data}
    steered = traces["steered"]
    assert list(steered.x) == [-1, 0, 1, 2]
    for place, strength in enumerate(steered.x):
        row = row_of(found, "steered" if strength else "unsteered", strength)
        assert steered.y[place] == pytest.approx(100 * row["share"])
        assert steered.y[place] + steered.error_y.array[place] == pytest.approx(100 * row["share_high"])
        assert steered.y[place] - steered.error_y.arrayminus[place] == pytest.approx(100 * row["share_low"])
    twins = traces["random twins"]
    assert [round(x) for x in twins.x] == [-1, 1] and twins.mode == "markers"
    assert [twins.y[1]] == pytest.approx([100 * row_of(found, "random", 1.0)["share"]])
    assert len(traces["the instruction in plain words"].x) == 2
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)", "light or dark, the page shows through"


def test_damage_is_drawn_for_all_and_kl_where_there_is_one(found: Evaluation) -> None:
    figure = shown.damage_figure(found.receipt)
    by_axis: dict[str, dict[str, Any]] = {}
    for trace in figure.data:
        by_axis.setdefault(trace.yaxis or "y", {})[trace.name] = trace
    assert len(by_axis) == 3
    kl, perplexity, quality = by_axis.values()
    assert list(kl["steered"].y) == pytest.approx(
        [row_of(found, "steered" if at else "unsteered", at)["kl_p95"] for at in (-1.0, 0.0, 1.0, 2.0)]
    )
    assert len(kl["the instruction in plain words"].x) == 0
    assert len(perplexity["the instruction in plain words"].x) == len(quality["random twins"].x) == 2


def test_the_table_is_the_receipts_with_true_minus_signs(found: Evaluation) -> None:
    html, data = shown.table(found.receipt), found.receipt.data["table"]
    page = Page(html)
    head, *rows = page.rows
    assert head[1:] == data["columns"][1:]
    assert [[cell.replace("−", "-") for cell in row] for row in rows] == data["rows"]
    assert "tabindex='0'" in html and data["title"] in page.text
    hostile = {**data, "title": HOSTILE, "rows": [[HOSTILE] * len(data["columns"])]}
    assert "<script" not in shown.table(Receipt({**found.receipt.data, "table": hostile}))


def test_texts_are_listed_by_prompt_and_strength_as_they_are(found: Evaluation) -> None:
    html = shown.texts(found.rows)
    page = Page(html)
    assert page.tags == {"section", "h3", "details", "summary", "ul", "li", "span", "p"} | ({"i"} & page.tags)
    assert "<script" not in html and HOSTILE in page.text
    assert html.count("<details open>") == 1 and html.count("<details") == 4
    first = [row for row in found.rows if row.prompt == PROMPTS[0] and row.sample == 0 and row.kind == "steered"]
    for row in first:
        assert row.text.strip() in page.text
    assert page.text.index("strength −1") < page.text.index("unsteered") < page.text.index("strength +2")
    assert "asked in plain words (more)" in page.text and "random" not in page.text
    hostile = [replace(row, text=HOSTILE) for row in found.rows]
    assert "<script" not in shown.texts(hostile)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_neutral_prompts_are_half_instructions_half_openings() -> None:
    prompts = neutral_prompts()
    some = evaluating.neutral(8)
    assert len(set(some)) == 8 and set(some) < set(prompts)
    assert sum(prompts.index(prompt) < len(prompts) // 2 for prompt in some) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strengths": "1, x"}, "strengths are '1, x'"),
        ({"strengths": "0"}, "no other than 0"),
        ({"strengths": ""}, "0 strengths"),
        ({"strengths": "nan"}, "finite"),
        ({"strengths": ",".join(map(str, range(1, 12)))}, "11 strengths"),
        ({"prompts": "\n".join(map(str, range(40)))}, "40 prompts"),
        ({"prompts": "x" * (MAX_PROMPT + 1)}, "8,001 characters"),
        ({"tokens": 1000}, "1,000 tokens a text"),
        ({"n_prompts": 32, "samples": 5, "prompts": ""}, f"this page writes {MAX_EVALUATED_TEXTS}"),
        ({"more": "Be glad."}, "One of the two instructions is empty"),
    ],
)
def test_too_much_or_nonsense_is_one_line_and_nothing_is_lost(
    handlers: EvaluateHandlers, mood: Any, changes: dict[str, Any], words: str
) -> None:
    answer = asked(handlers, mix_of({"mood": mood}, ["mood"]), plan=PLAN._replace(**changes))
    assert words in error_of(answer)


@pytest.mark.parametrize(
    ("what", "judge", "words"),
    [
        (RECIPE, WORDS_ASKED, "Nothing is chosen on the Steer tab"),
        (None, WORDS_ASKED, "Choose what to evaluate"),
        ("gone", WORDS_ASKED, "Choose what to evaluate"),
        ("mood", WORDS_ASKED._replace(words=" , "), "no words to look for"),
        ("mood", JudgeAsked(FILE, None, None, "", ""), "Upload labelled texts"),
        ("mood", JudgeAsked(OWN, None, None, "", ""), "no examples on the Build tab"),
        ("mood", JudgeAsked(BUNDLED, None, None, "", ""), "Choose the set"),
        ("mood", JudgeAsked(PATTERN, None, None, "", "("), "no regular expression"),
    ],
)
def test_what_is_missing_is_said(
    handlers: EvaluateHandlers, mood: Any, what: str | None, judge: JudgeAsked, words: str
) -> None:
    assert words in error_of(asked(handlers, mix_of({"mood": mood}, []), what, judge))


def test_strangers_patterns_are_not_taken(
    handlers: EvaluateHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/space")
    answer = asked(handlers, mix_of({"mood": mood}, []), judge=JudgeAsked(PATTERN, None, None, "", "a"))
    assert "Choose a judge" in error_of(answer)


# --- judges ----------------------------------------------------------------------------------------------------------


def test_texts_that_an_artifact_was_built_from_do_not_judge_it(handlers: EvaluateHandlers, mood: Any) -> None:
    mixed = mix_of({"mood": mood}, [])
    paste = source("paste", positive_text="\n".join(EXAMPLES.positive), negative_text="\n".join(EXAMPLES.negative))
    own = JudgeAsked(OWN, None, None, "", "")
    assert "was built from all texts of 'pasted'" in error_of(asked(handlers, mixed, judge=own, examples=paste))
    said = handlers.about_judge(visitor(), "mood", own, paste, mixed)
    assert "ns-warning" in said and "cannot judge it" in said


def test_what_building_held_out_judges_and_is_said(handlers: EvaluateHandlers, llama: Tiny) -> None:
    half = build(llama.lm, EXAMPLES, layers=1, name="half", hold_out=0.5, calibrate=False)
    mixed = mix_of({"half": half}, [])
    paste = source("paste", positive_text="\n".join(EXAMPLES.positive), negative_text="\n".join(EXAMPLES.negative))
    own = JudgeAsked(OWN, None, None, "", "")
    assert "the texts that building left out of pasted" in handlers.about_judge(visitor(), "half", own, paste, mixed)
    answer = asked(handlers, mixed, "half", own, examples=paste)
    receipt = answer["measured"].receipt.data
    assert "what building held out of pasted (12 + 12 texts)" in receipt["judge"]["name"]
    assert receipt["judge"]["n_accuracy"] == 24


def test_an_uploaded_file_judges_and_goes_when_its_owner_leaves(
    handlers: EvaluateHandlers, mood: Any, tmp_path: Path
) -> None:
    file = tmp_path / "labelled.csv"
    rows = [f"{text},{label}" for label, word in (("pos", "glad"), ("neg", "low")) for text in texts(word)]
    file.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    mixed, judge = mix_of({"mood": mood}, []), JudgeAsked(FILE, None, str(file), "", "")
    assert "all texts of labelled" in handlers.about_judge(visitor(), "mood", judge, NO_SOURCE, mixed)
    answer = asked(handlers, mixed, judge=judge)
    assert answer["measured"].receipt.data["judge"]["accuracy"] > 0.9
    file.write_text("text,label\nhappy,positive\nsad,maybe\n", encoding="utf-8")
    assert "maybe" in error_of(asked(handlers, mixed, judge=judge))
    assert "maybe" in handlers.about_judge(visitor(), "mood", judge, NO_SOURCE, mixed)
    handlers.jobs.leave("anna")
    assert not file.exists()


def test_labelled_texts_have_a_limit(
    handlers: EvaluateHandlers, mood: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "MAX_JUDGE_CHARACTERS", 100)
    judge = JudgeAsked(BUNDLED, "sentiment", None, "", "")
    assert "this page takes 100" in error_of(asked(handlers, mix_of({"mood": mood}, []), judge=judge))


def test_the_groups_of_inputs_follow_the_judge(handlers: EvaluateHandlers) -> None:
    visible = {
        kind: [name for name, one in handlers.show_judge(kind).items() if one["visible"]]
        for kind in (BUNDLED, FILE, REFUSAL, WORDS)
    }
    assert visible == {BUNDLED: ["bundled"], FILE: ["file"], REFUSAL: [], WORDS: ["words"]}


def test_what_there_is_to_evaluate_follows_the_shelf(handlers: EvaluateHandlers, mood: Any) -> None:
    first = bundled_sets()[0]
    gratitude = make_vector([1], name="gratitude-vector")
    shelf = {"mood": mood, "thanks": gratitude}
    update = handlers.choices(None, first, mix_of(shelf, ["thanks"], 0.5))["what"]
    assert update["value"] == "thanks"
    assert update["choices"] == [
        ("mood", "mood"),
        ("thanks", "thanks"),
        ("The Steer tab’s recipe: thanks +0.5", RECIPE),
    ]
    assert handlers.fitting("thanks", first, mix_of(shelf, [])) == "gratitude"
    assert handlers.fitting("mood", first, mix_of(shelf, [])) == first
    kept = handlers.choices("mood", first, mix_of(shelf, ["thanks"]))
    assert kept["what"]["value"] == "mood" and "bundled" not in kept, "a choice that is still there stays"
    assert handlers.choices("mood", first, mix_of({}, []))["what"]["value"] == RECIPE
    unasked = handlers.choices(None, first, mix_of(shelf, []))
    found = (unasked["what"]["value"], unasked["bundled"])
    assert found == ("thanks", "gratitude"), "the first that a ready-made set can judge"


# --- evaluating ------------------------------------------------------------------------------------------------------


def test_evaluating_shows_what_the_library_measures_and_offers_it(
    handlers: EvaluateHandlers, mood: Any, llama: Tiny, tmp_path: Path
) -> None:
    heard: list[str] = []
    mixed = mix_of({"mood": mood}, [])
    told_to: Any = lambda fraction, desc="": heard.append(desc)  # noqa: E731
    answer = handlers.evaluate(visitor(), told_to, "mood", WORDS_ASKED, PLAN, NO_SOURCE, mixed)
    assert (answer["error"], answer["note"]) == ("", "")
    judge = PatternJudge(["a", "t", "the"])
    wanted = evaluate(
        llama.lm, mood, judge, prompts=PROMPTS, strengths=(-1, 0, 1), max_new_tokens=6, n_random=1, seed=0
    )
    measured, download = answer["measured"], answer["download"]
    assert measured.receipt.data == wanted.receipt.data and measured.label == "mood"
    assert answer["table"] == shown.table(wanted.receipt) and answer["texts"] == shown.texts(wanted.rows)
    assert "mood" in answer["summary"] and answer["effect"]["visible"] and answer["damage"]["visible"]
    assert answer["effect"]["value"].data
    assert answer["attach"]["visible"] and answer["attach"]["value"] == "Keep on mood"
    with zipfile.ZipFile(download["value"]) as file:
        names = {"receipt.json", "generations.csv", "evaluation.html", "evaluation.png"}
        assert set(file.namelist()) == names and Path(download["value"]).name == "mood-evaluation.zip"
        assert json.loads(file.read("receipt.json")) == wanted.receipt.data
        assert file.read("generations.csv").decode() == generations_csv(wanted.rows)
    assert "Training the judge" in heard and any("Writing texts 1 to" in one for one in heard)
    again = asked(handlers, mixed)
    assert again["measured"].receipt.data == wanted.receipt.data, "the same seed, the same figures"
    assert not Path(download["value"]).exists() and Path(again["download"]["value"]).exists(), "only the newest is kept"
    handlers.jobs.leave("anna")
    assert not Path(again["download"]["value"]).exists()


def test_the_steer_tabs_recipe_is_evaluated_where_its_sliders_stand(handlers: EvaluateHandlers, mood: Any) -> None:
    other = make_vector([1], name="other")
    shelf = {"mood": mood, "other": other}
    answer = asked(handlers, mix_of(shelf, ["mood", "other"], 0.5, -1.0), RECIPE)
    assert answer["measured"] is None and not answer["attach"]["visible"], (
        "a receipt of a mixture belongs to no artifact"
    )
    assert "mood + other" in answer["summary"]
    alone = asked(handlers, mix_of(shelf, ["mood"], 1.0), RECIPE)
    assert alone["measured"].label == "mood"
    assert alone["measured"].receipt.data["recipe"][0]["strength"] == 1.0


def test_a_receipt_is_kept_on_the_artifact_that_was_measured_and_on_no_other(
    handlers: EvaluateHandlers, mood: Any
) -> None:
    mixed = mix_of({"mood": mood, "other": make_vector([1])}, ["mood"], 0.7)
    measured = asked(handlers, mixed)["measured"]
    attached = handlers.attach(visitor(), measured, mixed)
    shelf = attached["shelf"]
    assert attached["error"] == "" and "carries the receipt now" in attached["note"]
    assert not attached["attach"]["visible"]
    assert shelf["mood"].receipts == (measured.receipt,) and not mood.receipts and list(shelf) == ["mood", "other"]
    twice = handlers.attach(visitor(), measured, mix_of(shelf, ["mood"]))["shelf"]
    assert len(twice["mood"].receipts) == 1
    judged_otherwise = asked(handlers, mix_of(shelf, []), judge=WORDS_ASKED._replace(words="e"))["measured"]
    both = handlers.attach(visitor(), judged_otherwise, mix_of(shelf, ["mood"]))["shelf"]
    assert len(both["mood"].receipts) == 2
    another = {"mood": make_vector([1], name="mood")}
    gone = handlers.attach(visitor(), measured, mix_of(another, []))
    assert "no longer what was measured" in gone["error"] and "shelf" not in gone
    assert handlers.attach(visitor(), None, mixed) == {}


def test_a_kept_receipt_is_told_in_short(handlers: EvaluateHandlers, mood: Any) -> None:
    mixed = mix_of({"mood": mood}, [])
    measured: Measured = asked(handlers, mixed)["measured"]
    kept = replace(mood, receipts=(measured.receipt,))
    steered = {row["strength"]: row["share"] for row in measured.receipt.data["rows"] if row["kind"] == "steered"}
    said = render.measured(kept)
    assert f"{steered[1.0]:.0%} show it at strength +1" in said and "words a, t, the" in said
    assert said in Page(render.about("mood", kept)).text
    assert render.measured(mood) == ""
    for data in ({}, {"rows": "x"}, {"rows": [{"kind": "steered"}]}, {"rows": [{"kind": "unsteered", "strength": 0}]}):
        assert render.measured(replace(mood, receipts=(Receipt(data),))) == ""


def test_cancelling_stops_at_once_and_loses_nothing(
    handlers: EvaluateHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch, 0.2)
    handlers.begin(visitor())
    threading.Timer(0.3, lambda: handlers.stop(visitor())).start()
    answer = asked(handlers, mix_of({"mood": mood}, []), plan=PLAN._replace(tokens=100))
    assert error_of(answer) == "" and "Cancelled" in answer["note"]


def test_what_takes_too_long_is_stopped_and_said(
    handlers: EvaluateHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch, 0.1)
    monkeypatch.setattr(work, "MAX_SECONDS", 0.2)
    answer = asked(handlers, mix_of({"mood": mood}, []), plan=PLAN._replace(tokens=100))
    assert "was stopped" in error_of(answer)


def test_training_the_judge_is_within_the_limit_and_can_be_cancelled(
    handlers: EvaluateHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, judge = mix_of({"mood": mood}, []), JudgeAsked(BUNDLED, "sentiment")
    trained: list[float] = []

    def train(recipe: Any, examples: Any, *given: Any, **options: Any) -> Any:
        trained.append(time.monotonic())
        time.sleep(0.5)
        return PatternJudge(["a"])

    monkeypatch.setattr("neurosteer.evaluation.judges.judge_for", train)
    monkeypatch.setattr(Batch, "step", lambda self: pytest.fail("texts are written after the time was over"))
    with monkeypatch.context() as patch:
        patch.setattr(work, "MAX_SECONDS", 0.2)
        assert "was stopped" in error_of(asked(handlers, mixed, judge=judge)) and trained
    handlers.begin(visitor())
    threading.Timer(0.2, lambda: handlers.stop(visitor())).start()
    answer = asked(handlers, mixed, judge=judge)
    assert error_of(answer) == "" and "Cancelled" in answer["note"] and len(trained) == 2


def test_two_visitors_do_not_meet(handlers: EvaluateHandlers, mood: Any) -> None:
    mixed = mix_of({"mood": mood}, [])
    anna, ben = (asked(handlers, mixed, who=name)["download"]["value"] for name in ("anna", "ben"))
    handlers.jobs.leave("anna")
    assert not Path(anna).exists() and Path(ben).exists()
    handlers.jobs.leave("ben")


def test_cancelling_while_the_model_is_on_its_way_ends_the_waiting(mood: Any) -> None:
    handlers = EvaluateHandlers(Models.of(Never()), Jobs())
    handlers.begin(visitor())
    handlers.stop(visitor())
    answer = asked(handlers, mix_of({"mood": mood}, []))
    assert "Cancelled" in answer["note"]


def test_a_fault_of_ours_is_one_sentence(handlers: EvaluateHandlers, mood: Any, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(handlers, "judge", fail)
    said = error_of(asked(handlers, mix_of({"mood": mood}, [])))
    assert "Something went wrong on our side" in said and "secret" not in said


def test_an_artifact_of_another_model_is_refused(handlers: EvaluateHandlers, mood: Any) -> None:
    odd = replace(mood, model=replace(mood.model, n_layers=mood.model.n_layers + 3))
    assert "layers" in error_of(asked(handlers, mix_of({"mood": odd}, [])))


def test_a_gpu_is_asked_for_longer_where_more_is_written() -> None:
    few: dict[str, Any] = {
        "prompts": PROMPTS, "strengths": (-1.0, 0.0, 1.0), "samples": 1, "max_new_tokens": 8, "n_random": 1,
    }  # fmt: skip
    seconds = gpu_time.calling_s(evaluate, (), few, ())
    assert seconds < gpu_time.calling_s(evaluate, (), {**few, "max_new_tokens": 800}, ())
    assert seconds < gpu_time.calling_s(evaluate, (), {**few, "prompts": PROMPTS * 20}, ())


def test_the_work_is_cancelled_when_its_visitor_leaves(handlers: EvaluateHandlers) -> None:
    event = handlers.jobs.begin("anna", KIND)
    handlers.jobs.leave("anna")
    assert event.is_set()


def test_the_examples_of_a_set_are_named_in_what_is_said(handlers: EvaluateHandlers, mood: Any) -> None:
    judge = JudgeAsked(BUNDLED, "sentiment", None, "", "")
    said = handlers.about_judge(visitor(), "mood", judge, NO_SOURCE, mix_of({"mood": mood}, []))
    assert "all texts of sentiment" in said
    hint = handlers.about_judge(visitor(), None, judge, NO_SOURCE, mix_of({}, []))
    assert "Choose what to evaluate" in hint and "ns-hint" in hint


def test_what_is_measured_survives_the_way_to_a_gpu_and_back(found: Evaluation, mood: Any) -> None:
    judge = TextClassifier.train(EXAMPLES)
    recipe, again = pickle.loads(ForkingPickler.dumps((Recipe.of((mood, 0.5)), judge)))
    assert recipe.uses[0].artifact.directions[1].equal(mood.directions[1]) and recipe.uses[0].strength == 0.5
    assert again.scores(PROMPTS) == judge.scores(PROMPTS) and again.name == judge.name
    back = pickle.loads(ForkingPickler.dumps(found))
    assert back.receipt == found.receipt and back.rows == found.rows
    assert back.artifact.receipts == found.artifact.receipts  # type: ignore[union-attr]
