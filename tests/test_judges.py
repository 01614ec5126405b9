"""Judges: what they say, and that their accuracy is the one anybody would measure on texts they have not seen."""

import csv
import math
import random
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from checks import refused
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.utils import murmurhash3_32
from tiny import make_vector

from neurosteer.artifacts.provenance import Provenance
from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import Cancelled, ExamplesError, UsageError
from neurosteer.evaluation import (
    CallableJudge,
    JudgeRequest,
    PatternJudge,
    RefusalDetector,
    TextClassifier,
    accuracy_text,
    classifier,
    judge_for,
    judge_from_words,
    named_judge,
)
from neurosteer.evaluation.classifier import folds
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import assets_folder

ADJECTIVES = {"positive": ["lovely", "fine", "warm", "sweet"], "negative": ["awful", "bad", "cold", "bitter"]}


def labelled(n: int, *, seed: int = 0, noise: float = 0.2, n_negative: int | None = None) -> ContrastSet:
    """Short reviews of which a share says the opposite of its label."""
    rng = random.Random(seed)

    def review(side: str) -> str:
        other = "negative" if side == "positive" else "positive"
        said = other if rng.random() < noise else side
        words = [rng.choice(["the", "a", "my"]), rng.choice(ADJECTIVES[said]), rng.choice(["song", "day", "book"])]
        return " ".join([*words, "number", str(rng.randrange(10**6))])

    counts = {"positive": n, "negative": n if n_negative is None else n_negative}
    found = {side: tuple(dict.fromkeys(review(side) for _ in range(count))) for side, count in counts.items()}
    return ContrastSet(found["positive"], found["negative"], "reviews")


def without_labels(n: int, *, seed: int) -> ContrastSet:
    rng = random.Random(seed)
    texts = [f"{rng.choice(['the', 'a'])} {rng.choice(['song', 'day', 'book'])} {place}" for place in range(2 * n)]
    rng.shuffle(texts)
    return ContrastSet(tuple(texts[:n]), tuple(texts[n:]), "noise")


def counted_by_hand(texts: list[str], known: list[str]) -> np.ndarray:
    """TF-IDF of words and of characters `[len(texts), …]`, one text and one n-gram at a time. What stands for an n-gram
    is the place that its hash falls on, and how rare it is is found in `known`."""
    kinds = (
        CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b").build_analyzer(),
        CountVectorizer(analyzer="char_wb", ngram_range=(2, 5)).build_analyzer(),
    )
    blocks = []
    for grams_of in kinds:
        seen = [Counter(abs(murmurhash3_32(gram)) % 2**18 for gram in grams_of(text)) for text in known]
        holding = Counter(place for counts in seen for place in counts)
        columns = {place: column for column, place in enumerate(sorted(holding))}
        block = np.zeros((len(texts), len(columns)))
        for row, text in enumerate(texts):
            for place, count in Counter(abs(murmurhash3_32(gram)) % 2**18 for gram in grams_of(text)).items():
                if place in columns:
                    rarity = math.log((1 + len(known)) / (1 + holding[place])) + 1
                    block[row, columns[place]] = (1 + math.log(count)) * rarity
        lengths = [math.sqrt(float((row**2).sum())) or 1.0 for row in block]
        blocks.append(block / np.array(lengths)[:, None])
    return np.hstack(blocks)


def by_hand(texts: list[str], labels: list[int], asked: list[str]) -> np.ndarray:
    """Probability of the positive class."""
    seen, new = (counted_by_hand(some, texts) for some in (texts, asked))
    model = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced").fit(seen, labels)
    return model.predict_proba(new)[:, 1]


# --- classifiers -----------------------------------------------------------------------------------------------------


def test_a_classifiers_scores_are_those_of_the_same_model_put_together_by_hand() -> None:
    examples, asked = labelled(30), ["a warm and lovely song", "my awful day", "nothing of the kind", ""]
    labels = [1] * len(examples.positive) + [0] * len(examples.negative)
    expected = by_hand([*examples.positive, *examples.negative], labels, asked)
    assert TextClassifier.train(examples).scores(asked) == pytest.approx(expected.tolist(), abs=1e-6)


def test_its_accuracy_is_that_of_cross_validation_redone_by_hand() -> None:
    examples, seed = labelled(31, n_negative=23, noise=0.1), 4
    rng = random.Random(seed)
    sides = [[(text, 1) for text in examples.positive], [(text, 0) for text in examples.negative]]
    mixed = [rng.sample(side, len(side)) for side in sides]
    right: dict[int, list[bool]] = {0: [], 1: []}
    for fold in range(5):
        asked = [entry for side in mixed for place, entry in enumerate(side) if place % 5 == fold]
        # in the order they were given, as a solver stops a little earlier or later with another one
        rest = [entry for side in sides for entry in side if entry not in asked]
        found = by_hand([text for text, _ in rest], [label for _, label in rest], [text for text, _ in asked])
        for (_, label), score in zip(asked, found, strict=True):
            right[label].append((score >= 0.5) == bool(label))
    judge = TextClassifier.train(examples, seed=seed)
    assert judge.accuracy == pytest.approx((np.mean(right[0]) + np.mean(right[1])) / 2)
    assert (judge.sensitivity, judge.specificity) == pytest.approx((np.mean(right[1]), np.mean(right[0])))
    assert judge.n_accuracy == len(examples.positive) + len(examples.negative)
    assert judge.accuracy is not None and 0.65 < judge.accuracy < 1.0 and not judge.is_weak


def test_a_classifier_of_labels_that_mean_nothing_is_marked_as_weak() -> None:
    judge = TextClassifier.train(without_labels(60, seed=3))
    assert judge.accuracy is not None and judge.accuracy < 0.65
    assert judge.is_weak and "too weak to conclude from" in accuracy_text(judge)


def test_a_judge_that_always_says_the_same_is_right_on_half_however_many_of_a_class_there_are() -> None:
    examples = labelled(40, n_negative=5)
    assert CallableJudge("yes", lambda text: True, examples).accuracy == 0.5
    assert CallableJudge("no", lambda text: 0.1, examples).is_weak


def test_pairs_stay_together_in_cross_validation() -> None:
    positive = tuple(f"lovely thing {place}" for place in range(20))
    paired = ContrastSet(positive, tuple(f"awful thing {place}" for place in range(20)), paired=True)
    parts = folds(paired, 0)
    assert sorted(map(len, parts)) == [8] * 5 and sorted(np.concatenate(parts)) == list(range(40))
    for part in parts:
        numbers = [int(place) % 20 for place in part]
        assert all(numbers.count(number) == 2 for number in numbers)


def test_training_can_be_stopped_between_two_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, fits = threading.Event(), []
    fit = LogisticRegression.fit

    def stopping(self: LogisticRegression, *arguments: Any) -> LogisticRegression:
        fits.append(1)
        if len(fits) == 2:
            cancel.set()
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", stopping)
    with pytest.raises(Cancelled, match="Training the judge"):
        judge_for(make_vector(), labelled(20), cancel=cancel)
    assert len(fits) == 2


def test_words_are_counted_once_and_what_is_kept_of_them_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    transform = HashingVectorizer.transform

    def counting(self: HashingVectorizer, texts: list[str]) -> Any:
        counted.append(len(texts))
        return transform(self, texts)

    monkeypatch.setattr(HashingVectorizer, "transform", counting)
    examples = labelled(30)
    TextClassifier.train(examples)
    assert counted == [len(examples.positive) + len(examples.negative)] * 2, "words and characters"
    monkeypatch.setattr(classifier, "MAX_CHARACTERS", 100)
    refused(lambda: TextClassifier.train(examples), UsageError, "characters", "100")


def test_texts_without_a_word_are_refused_in_one_line() -> None:
    examples = ContrastSet(("!!!", "??!", "?!?"), ("...", ",,,", ";;;"))
    refused(lambda: TextClassifier.train(examples), UsageError, "No judge can be trained")


# --- the default judge -----------------------------------------------------------------------------------------------


def built_from(examples: ContrastSet, hold_out: float) -> Provenance:
    return Provenance(examples_sha256=examples.sha256, hold_out=hold_out)


def test_the_default_judge_is_trained_on_all_of_texts_that_no_artifact_was_built_from() -> None:
    examples, others = labelled(20), labelled(20, seed=1)
    judge = judge_for(make_vector(provenance=built_from(others, 0.0)), examples)
    assert judge.n_accuracy == len(examples.positive) + len(examples.negative)


def test_it_never_sees_a_text_that_an_artifact_was_built_from() -> None:
    examples = labelled(40)
    kept, held = examples.parts(0.5, seed=HOLD_OUT_SEED)
    more, less = (make_vector(provenance=built_from(examples, share)) for share in (0.5, 0.2))
    judge = judge_for(more, examples)
    asked = ["a lovely day", *kept.positive[:3]]
    labels = [1] * len(held.positive) + [0] * len(held.negative)
    assert judge.scores(asked) == pytest.approx(by_hand([*held.positive, *held.negative], labels, asked).tolist())
    fewest = examples.parts(0.2, seed=HOLD_OUT_SEED)[1]
    both = judge_for(Recipe.of(more, (less, 0.5)), examples)
    assert both.n_accuracy == len(fewest.positive) + len(fewest.negative)
    assert set(fewest.positive) <= set(held.positive)  # what the one held out, the other did too


def test_a_judge_of_the_texts_an_artifact_was_built_from_is_refused_with_the_remedy() -> None:
    examples = labelled(20)
    vector = make_vector(provenance=built_from(examples, 0.0))
    refused(lambda: judge_for(vector, examples), UsageError, "vector-0", "reviews", "--hold-out")
    held_out = replace(vector, provenance=built_from(examples, 0.01))
    refused(lambda: judge_for(held_out, examples), ExamplesError, "2")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_the_refusal_detectors_accuracy_is_the_share_right_of_the_labelled_openings() -> None:
    with (assets_folder() / "examples" / "refusal_openings.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    judge = RefusalDetector()
    right = {"positive": 0, "negative": 0}
    for row, score in zip(rows, judge.scores([row["text"] for row in rows]), strict=True):
        right[row["label"]] += (score >= 0.5) == (row["label"] == "positive")
    assert judge.n_accuracy == len(rows) == 140
    assert judge.accuracy == pytest.approx((right["positive"] / 70 + right["negative"] / 70) / 2)
    assert judge.accuracy is not None and judge.accuracy > 0.9


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I can't help with that.", True),
        ("  **I’m sorry, but I can’t assist with that.**", True),
        ("I'm sorry, but\nI cannot do that", True),
        ("Unfortunately, as an AI language model, I cannot provide that.", True),
        ("I can't wait to tell you", False),
        ("I'm sorry to hear that. Here is what helps:", False),
        ("Here is how. I can't help with the rest.", False),
        ("", False),
        ("I can't help but laugh.", False),
        ("That's something I can do.", False),
    ],
)
def test_a_refusal_is_told_by_how_it_opens(text: str, refusal: bool) -> None:
    assert RefusalDetector().scores([text]) == [float(refusal)]


def test_the_refusal_detector_is_quick_on_odd_texts() -> None:
    odd = ["thanks for " * 100_000, "sorry, " * 100_000, "\x00" * 1000, "i " * 1000, "as an ai " * 10_000]
    assert RefusalDetector().scores(odd)[1:] == [0.0] * 4


# --- patterns and functions ------------------------------------------------------------------------------------------


def test_patterns_and_words_are_found_whatever_their_case() -> None:
    assert PatternJudge(r"so+ good\b").scores(["It was SOOO good.", "so goods"]) == [1.0, 0.0]
    assert PatternJudge(["thanks", "c++"]).scores(["Thanks!", "I like C++.", "thanksgiving", "c"]) == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    judge = PatternJudge("lovely|fine|warm|sweet", labelled(200, noise=0.25))
    assert judge.accuracy == pytest.approx(0.75, abs=0.07) and judge.n_accuracy > 300


@pytest.mark.parametrize("pattern", ["", "(", "a" * 501, [], [" "]])
def test_a_pattern_that_is_none_is_refused(pattern: str | list[str]) -> None:
    refused(lambda: PatternJudge(pattern), UsageError, "pattern")


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), None, "high"])
def test_a_function_that_returns_no_score_is_refused(value: object) -> None:
    judge = CallableJudge("mine", lambda text: value)  # type: ignore[arg-type,return-value]
    refused(lambda: judge.scores(["a text"]), UsageError, "mine", "0 to 1")


def test_judges_are_known_by_name() -> None:
    assert isinstance(named_judge("refusal"), RefusalDetector)
    assert named_judge("regex:a:b").scores(["a:b", "ab"]) == [1.0, 0.0]
    assert named_judge("words:one,two").scores(["two", "twofold"]) == [1.0, 0.0]
    assert named_judge("words:one").accuracy is None
    refused(lambda: named_judge("refuse"), UsageError, "'refuse'", "regex:PATTERN")


def test_one_function_makes_the_judge_that_is_asked_for_in_words() -> None:
    vector, examples = make_vector(), labelled(20)
    trained = judge_from_words("", vector, examples)
    assert isinstance(trained, TextClassifier) and "reviews" in trained.name
    assert "gratitude" in judge_from_words("gratitude", vector).name
    assert isinstance(judge_from_words("refusal", vector), RefusalDetector)
    words = judge_from_words("words:lovely,fine", vector, examples)
    assert words.scores(["a lovely day", "a day"]) == [1.0, 0.0] and words.n_accuracy > 30
    refused(lambda: judge_from_words("", vector), UsageError, "There is no judge", "refusal")
    refused(lambda: judge_from_words("gratitude", vector, examples), UsageError, "brings its own")
    refused(lambda: judge_from_words("mine", vector), UsageError, "'mine'", "regex:PATTERN")
    refused(lambda: JudgeRequest("regex:a", patterns=False), UsageError, "words:ONE,TWO")
