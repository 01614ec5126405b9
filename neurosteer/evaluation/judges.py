"""Judges: does a text show the behaviour? Each says how often it is right itself, on labelled texts it has not seen.

A judge that is right on fewer than 65% of them is too weak to conclude anything from.
"""

import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import UsageError
from neurosteer.evaluation.classifier import Fitted, counted, fit, labels_of
from neurosteer.evaluation.openings import is_refusal, labelled_openings
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import bundled_sets
from neurosteer.examples.reading import read_examples

WEAK_BELOW = 0.65
MAX_PATTERN = 500


class Judge(Protocol):
    """What `evaluate` asks of a judge. One that has `sensitivity` and `specificity` too, the shares it is right on of
    texts that show the behaviour and of those that do not, gets shares corrected for them."""

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
    """A name, and how often it is right on texts that show the behaviour (`sensitivity`) and on those that do not
    (`specificity`), where that was measured, on `n_accuracy` texts."""

    def __init__(self, name: str) -> None:
        self.name, self.n_accuracy = name, 0
        self.sensitivity: float | None = None
        self.specificity: float | None = None

    @property
    def accuracy(self) -> float | None:
        if self.sensitivity is None or self.specificity is None:
            return None
        return (self.sensitivity + self.specificity) / 2

    @property
    def is_weak(self) -> bool:
        return self.accuracy is not None and self.accuracy < WEAK_BELOW

    def scores(self, texts: Sequence[str]) -> list[float]:
        raise NotImplementedError

    def _measure(self, examples: ContrastSet | None) -> None:
        if examples is not None:
            self._count(np.array(self.scores([*examples.positive, *examples.negative])) >= 0.5, examples)

    def _count(self, verdicts: np.ndarray, examples: ContrastSet) -> None:
        labels = labels_of(examples)
        self.sensitivity = float(verdicts[labels == 1].mean())
        self.specificity = float((~verdicts[labels == 0]).mean())
        self.n_accuracy = len(labels)


class TextClassifier(_Measured):
    """Words (1 to 2) and characters (2 to 5) weighted by TF-IDF, and logistic regression on both."""

    def __init__(self, name: str, fitted: Fitted) -> None:
        super().__init__(name)
        self._fitted = fitted

    @classmethod
    def train(cls, examples: ContrastSet, *, seed: int = 0, cancel: threading.Event | None = None) -> "TextClassifier":
        """A classifier trained on all of `examples`. Its accuracy is that of up to 5 others, each trained without a
        part of them (drawn with `seed`; pairs stay together) and asked about that part.

        Raises `UsageError` where the texts hold no word, or too many; `Cancelled` when `cancel` is set.
        """
        fitted, verdicts = fit(examples, seed, cancel)
        sizes = f"{len(examples.positive)} + {len(examples.negative)} texts"
        judge = cls(f"text classifier trained on {examples.name[:60]} ({sizes})", fitted)
        judge._count(verdicts, examples)
        return judge

    def scores(self, texts: Sequence[str]) -> list[float]:
        return self._fitted.probabilities(counted(texts)).tolist() if texts else []


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


def judge_for(
    recipe: Recipe | Artifact, examples: ContrastSet, *, seed: int = 0, cancel: threading.Event | None = None
) -> TextClassifier:
    """The default judge: a classifier trained on labelled texts that no artifact of `recipe` was built from.

    These are all of `examples`, or, where an artifact was built from a part of the same ones, the part that its
    building held out. Texts are told apart by the SHA-256 of the whole set: a file that shares some of its texts with
    another is not noticed.

    Raises `UsageError` where an artifact was built from all of `examples`, `ExamplesError` where too few were held out,
    `Cancelled` when `cancel` is set.
    """
    uses = recipe.uses if isinstance(recipe, Recipe) else Recipe.of(recipe).uses
    seen = [use.artifact for use in uses if use.artifact.provenance.examples_sha256 == examples.sha256]
    if not seen:
        return TextClassifier.train(examples, seed=seed, cancel=cancel)
    least = min(seen, key=lambda artifact: artifact.provenance.hold_out)
    if least.provenance.hold_out <= 0:
        raise UsageError(
            f"{least.name!r} was built from all of the texts of {examples.name[:60]!r}, so they cannot judge it; give "
            "other labelled texts, or build it with --hold-out 0.5 and give the same ones."
        )
    held_out = examples.parts(least.provenance.hold_out, seed=HOLD_OUT_SEED)[1]
    held_out = replace(held_out, name=f"what building held out of {examples.name}")
    return TextClassifier.train(held_out, seed=seed, cancel=cancel)


def named_judge(text: str, examples: ContrastSet | None = None) -> Judge:
    """The judge that `refusal`, `regex:PATTERN` or `words:ONE,TWO` names; the accuracy of the last two is measured on
    labelled `examples` where they are given. Raises `UsageError` for any other text."""
    kind, colon, rest = text.partition(":")
    if text == "refusal":
        return RefusalDetector()
    if colon and kind == "regex":
        return PatternJudge(rest, examples)
    if colon and kind == "words":
        return PatternJudge([word.strip() for word in rest.split(",") if word.strip()], examples)
    raise UsageError(f"There is no judge {text[:80]!r}; use {_NAMED}, or the name of a bundled set.")


_NAMED = "refusal, regex:PATTERN or words:ONE,TWO"


@dataclass(frozen=True)
class JudgeRequest:
    """Who is to judge, in words: nothing for a classifier trained on `labelled` texts, the name of a bundled set for
    one trained on that, or what `named_judge` knows. `labelled_as` is what the caller calls labelled texts.

    Raises `UsageError` at once for what cannot be, before a model is loaded; `patterns` says whether `regex:` is taken,
    which is better not taken from strangers.
    """

    words: str = ""
    labelled: ContrastSet | None = None
    labelled_as: str = "labelled texts"
    patterns: bool = True

    def __post_init__(self) -> None:
        if not self.words and self.labelled is None:
            raise UsageError(
                f"There is no judge; give {self.labelled_as}, or name one: {_NAMED}, or a bundled set "
                f"({', '.join(bundled_sets())})."
            )
        if self.words and self.labelled is not None and (self.words == "refusal" or self.words in bundled_sets()):
            raise UsageError(f"The judge {self.words!r} brings its own labelled texts; leave {self.labelled_as} out.")
        if self.words.startswith("regex:") and not self.patterns:
            raise UsageError("Patterns are not taken here, some never end; use words:ONE,TWO.")
        if self.words and self.words not in bundled_sets():
            named_judge(self.words)

    @property
    def training(self) -> ContrastSet | None:
        """The texts that a classifier is to be trained on; None for the other judges."""
        return read_examples(self.words) if self.words in bundled_sets() else None if self.words else self.labelled

    def judge(self, recipe: Recipe | Artifact, cancel: threading.Event | None = None) -> Judge:
        """The judge, who has seen no text that an artifact of `recipe` was built from. Raises as `judge_for` does."""
        training = self.training
        return (
            named_judge(self.words, self.labelled) if training is None else judge_for(recipe, training, cancel=cancel)
        )


def judge_from_words(
    words: str,
    recipe: Recipe | Artifact,
    labelled: ContrastSet | None = None,
    *,
    cancel: threading.Event | None = None,
) -> Judge:
    """The judge of `recipe` that `words` ask for; see `JudgeRequest`."""
    return JudgeRequest(words, labelled).judge(recipe, cancel)


def accuracy_text(judge: Judge) -> str:
    """How far the judge itself is to be trusted, as a phrase for beside its figures."""
    if judge.accuracy is None:
        return "how often it is right was not measured"
    found = f"right on {judge.accuracy:.1%} of {judge.n_accuracy:,} labelled texts it had not seen"
    rates = [getattr(judge, name, None) for name in ("sensitivity", "specificity")]
    if None not in rates:
        found += f" ({rates[0]:.0%} of those that show it, {rates[1]:.0%} of the others)"
    return f"{found}: too weak to conclude from" if judge.is_weak else found


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
