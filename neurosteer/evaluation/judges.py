"""Judges: does a text show the behaviour? Each says how often it is right itself, on labelled texts it has not seen.

A judge that is right on fewer than 65% of them is too weak to conclude anything from.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import UsageError
from neurosteer.evaluation.openings import is_refusal, labelled_openings
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet

WEAK_BELOW = 0.65
MAX_PATTERN = 500
_FOLDS = 5


class Judge(Protocol):
    """What `evaluate` asks of a judge."""

    @property
    def name(self) -> str:
        """What judges, in words, as figures show it."""
        ...

    @property
    def accuracy(self) -> float | None:
        """How often it is right on labelled texts it has not seen, the mean of the two classes' shares, so that one
        that always says the same has 0.5; None where that was not measured."""
        ...

    @property
    def n_accuracy(self) -> int:
        """How many texts `accuracy` was measured on."""
        ...

    @property
    def is_weak(self) -> bool:
        """Whether its accuracy is below 0.65: too weak to conclude from."""
        ...

    def scores(self, texts: Sequence[str]) -> list[float]:
        """How clearly each text shows the behaviour, from 0 to 1; from 0.5 on it counts as showing it."""
        ...


class _Measured:
    """A name, and an accuracy that may have been measured."""

    def __init__(self, name: str, accuracy: float | None = None, n_accuracy: int = 0) -> None:
        self.name, self.accuracy, self.n_accuracy = name, accuracy, n_accuracy

    @property
    def is_weak(self) -> bool:
        return self.accuracy is not None and self.accuracy < WEAK_BELOW

    def scores(self, texts: Sequence[str]) -> list[float]:
        raise NotImplementedError

    def _measure(self, examples: ContrastSet | None) -> None:
        if examples is not None:
            labels = _labels(examples)
            verdicts = np.array(self.scores([*examples.positive, *examples.negative])) >= 0.5
            self.accuracy, self.n_accuracy = _balanced(verdicts, labels), len(labels)


class TextClassifier(_Measured):
    """Words (1 to 2) and characters (2 to 5) weighted by TF-IDF, and logistic regression on both."""

    def __init__(self, name: str, pipeline: Any, accuracy: float, n_accuracy: int) -> None:
        super().__init__(name, accuracy, n_accuracy)
        self._pipeline = pipeline

    @classmethod
    def train(cls, examples: ContrastSet, *, seed: int = 0) -> "TextClassifier":
        """A classifier trained on all of `examples`. Its accuracy is that of up to 5 others, each trained without a
        part of them (drawn with `seed`; pairs stay together) and asked about that part.

        Raises `UsageError` where the texts hold no word.
        """
        texts, labels = [*examples.positive, *examples.negative], _labels(examples)
        verdicts = np.zeros(len(texts), dtype=bool)
        for part in _folds(examples, seed):
            rest = np.setdiff1d(np.arange(len(texts)), part)
            other = _fitted([texts[place] for place in rest], labels[rest])
            verdicts[part] = other.predict_proba([texts[place] for place in part])[:, 1] >= 0.5
        sizes = f"{len(examples.positive)} + {len(examples.negative)} texts"
        name = f"text classifier trained on {examples.name[:60]} ({sizes})"
        return cls(name, _fitted(texts, labels), _balanced(verdicts, labels), len(texts))

    def scores(self, texts: Sequence[str]) -> list[float]:
        return self._pipeline.predict_proba(list(texts))[:, 1].tolist() if texts else []


class RefusalDetector(_Measured):
    """Whether a text opens as a refusal does ("I can't help with that", "I'm sorry, but …"): `openings` lists how.

    Its accuracy is measured on labelled openings that ship with the package. A refusal that comes late in a text, or
    in words of its own, is not seen.
    """

    def __init__(self) -> None:
        super().__init__("refusal detector (how texts open)")
        self._measure(labelled_openings())

    def scores(self, texts: Sequence[str]) -> list[float]:
        return [float(is_refusal(text)) for text in texts]


class PatternJudge(_Measured):
    """Whether something is found in a text, upper and lower case being the same: a regular expression, or, given a
    sequence, one of several words. Its accuracy is measured where labelled `examples` are given.

    Raises `UsageError` for a pattern that is empty, too long or no regular expression. Patterns of strangers are better
    not taken: some keep a processor busy for hours.
    """

    def __init__(self, pattern: str | Sequence[str], examples: ContrastSet | None = None) -> None:
        shown = pattern if isinstance(pattern, str) else ", ".join(pattern)
        super().__init__(f"{'pattern' if isinstance(pattern, str) else 'words'} {shown[:80]}")
        self._pattern = _compiled(pattern)
        self._measure(examples)

    def scores(self, texts: Sequence[str]) -> list[float]:
        return [float(self._pattern.search(text) is not None) for text in texts]


class CallableJudge(_Measured):
    """A function of one text that returns a number from 0 to 1 (or whether the text shows the behaviour). Its accuracy
    is measured where labelled `examples` are given; they must be ones that the function was not made from."""

    def __init__(self, name: str, function: Callable[[str], float | bool], examples: ContrastSet | None = None) -> None:
        super().__init__(name)
        self._function = function
        self._measure(examples)

    def scores(self, texts: Sequence[str]) -> list[float]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float:
        value = self._function(text)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= 1:
            raise UsageError(f"The judge {self.name[:80]!r} returned {value!r:.60}; it must be a number from 0 to 1.")
        return score


def judge_for(recipe: Recipe | Artifact, examples: ContrastSet, *, seed: int = 0) -> TextClassifier:
    """The default judge: a classifier trained on labelled texts that no artifact of `recipe` was built from.

    These are all of `examples`, or, where an artifact was built from a part of the same ones, the part that its
    building held out. Texts are told apart by the SHA-256 of the whole set: a file that shares some of its texts with
    another is not noticed.

    Raises `UsageError` where an artifact was built from all of `examples`, `ExamplesError` where too few were held out.
    """
    uses = recipe.uses if isinstance(recipe, Recipe) else Recipe.of(recipe).uses
    seen = [use.artifact for use in uses if use.artifact.provenance.examples_sha256 == examples.sha256]
    if not seen:
        return TextClassifier.train(examples, seed=seed)
    least = min(seen, key=lambda artifact: artifact.provenance.hold_out)
    if least.provenance.hold_out <= 0:
        raise UsageError(
            f"{least.name!r} was built from all of the texts of {examples.name[:60]!r}, so they cannot judge it; give "
            "other labelled texts, or build it with --hold-out 0.5 and give the same ones."
        )
    held_out = examples.parts(least.provenance.hold_out, seed=HOLD_OUT_SEED)[1]
    return TextClassifier.train(replace(held_out, name=f"what building held out of {examples.name}"), seed=seed)


def named_judge(text: str, examples: ContrastSet | None = None) -> Judge:
    """The judge that `refusal`, `regex:PATTERN` or `words:ONE,TWO` names; the accuracy of the last two is measured on
    labelled `examples` where they are given. Raises `UsageError` for any other text."""
    kind, colon, rest = text.partition(":")
    if text == "refusal":
        return RefusalDetector()
    if colon and kind == "regex":
        return PatternJudge(rest, examples)
    if colon and kind == "words":
        return PatternJudge(rest.split(","), examples)
    raise UsageError(f"There is no judge {text[:80]!r}; use refusal, regex:PATTERN or words:ONE,TWO.")


def accuracy_text(judge: Judge) -> str:
    """How far the judge itself is to be trusted, as a phrase for beside its figures."""
    if judge.accuracy is None:
        return "how often it is right was not measured"
    found = f"right on {judge.accuracy:.1%} of {judge.n_accuracy:,} labelled texts it had not seen"
    return f"{found}: too weak to conclude from" if judge.is_weak else found


def _fitted(texts: Sequence[str], labels: np.ndarray) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    classifier = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
    pipeline = make_pipeline(make_union(words, characters), classifier)
    try:
        return pipeline.fit(texts, labels)
    except ValueError as error:  # nothing but punctuation
        raise UsageError(f"No judge can be trained on these texts ({' '.join(str(error).split())[:100]}).") from error


def _folds(examples: ContrastSet, seed: int) -> list[np.ndarray]:
    """Positions in positive + negative texts, in up to 5 parts that each hold about as much of either class."""
    counts = len(examples.positive), len(examples.negative)
    n_folds = min(_FOLDS, *counts)
    rng = random.Random(seed)
    orders = [rng.sample(range(count), count) for count in counts]
    if examples.paired:
        orders[1] = orders[0]
    parts = [
        [*orders[0][fold::n_folds], *(counts[0] + place for place in orders[1][fold::n_folds])]
        for fold in range(n_folds)
    ]
    return [np.array(sorted(part)) for part in parts]


def _labels(examples: ContrastSet) -> np.ndarray:
    return np.array([1] * len(examples.positive) + [0] * len(examples.negative))


def _balanced(verdicts: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the classes' shares that were judged right."""
    return float((verdicts[labels == 1].mean() + (~verdicts[labels == 0]).mean()) / 2)


def _compiled(pattern: str | Sequence[str]) -> re.Pattern[str]:
    if isinstance(pattern, str):
        source = pattern
    else:
        words = [word.strip() for word in pattern if word.strip()]
        source = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)" if words else ""
    if not source or len(source) > MAX_PATTERN:
        raise UsageError(f"The pattern of a judge has {len(source)} characters; it must have 1 to {MAX_PATTERN}.")
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"The pattern {source[:80]!r} is no regular expression ({error}).") from error
