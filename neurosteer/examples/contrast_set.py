"""Contrast sets: texts that show a behaviour and texts that do not, validated, split and hashed."""

import hashlib
import json
import random
import re
import sys
import unicodedata
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from neurosteer.examples.chats import Asked, check_asked
from neurosteer.examples.refusing import listed, refuse, short
from neurosteer.examples.texts import SIDES, clean_text

MIN_PER_CLASS, MAX_PER_CLASS, FEW_PER_CLASS = 2, 20_000, 20

_MARKS = 30  # the Stream-Safe Text Format of Unicode (UAX #15) allows as many
_MAY_BE_MARKS = re.compile(f"[\u0300-\U0010ffff]{{{_MARKS + 1}}}")  # every combining mark lies there

HOLD_OUT_SEED = 1
"""Of the split that building with `hold_out` makes, so that a judge finds the same texts again."""


@dataclass(frozen=True)
class Split:
    """Positions into a contrast set's `positive` and `negative`, ascending. Indices, because one held-out text is
    enough for a split but not for a `ContrastSet`."""

    train_positive: tuple[int, ...]
    train_negative: tuple[int, ...]
    held_out_positive: tuple[int, ...]
    held_out_negative: tuple[int, ...]


@dataclass(frozen=True)
class ContrastSet:
    """Texts that show a behaviour (`positive`) and texts that don't (`negative`).

    `positive_prompts` and `negative_prompts`, one for each text, are what the texts answer: a request, or the turns of
    a conversation, each a pair of role and content; empty where texts stand by themselves. `paired` means that row i of
    both belong together. `dropped` counts the rows that were left out, under `"blank"`,
    `"duplicate"` and whatever other reason there was; `source` says in words what the texts were read from. Neither
    takes part in equality.

    Raises `ExamplesError` unless each class has 2 to 20,000 texts, no text is blank, no text is in both classes as an
    answer to the same prompt (compared after Unicode NFC and with runs of whitespace as one space; see `key`), and
    either every text has a prompt or none has.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    name: str = "examples"
    paired: bool = False
    dropped: Mapping[str, int] = field(default_factory=lambda: {"blank": 0, "duplicate": 0}, compare=False)
    source: str = field(default="", compare=False)
    positive_prompts: tuple[Asked, ...] = ()
    negative_prompts: tuple[Asked, ...] = ()

    def __post_init__(self) -> None:
        for side in SIDES:
            texts = getattr(self, side)
            if isinstance(texts, str):
                refuse(self.name, f"{side} is one string: give a tuple of texts")
            object.__setattr__(self, side, tuple(texts))
        object.__setattr__(self, "positive_prompts", self._checked_prompts("positive"))
        object.__setattr__(self, "negative_prompts", self._checked_prompts("negative"))
        _check_texts(self)
        if self.paired and len(self.positive) != len(self.negative):
            counts = f"{len(self.positive)} positive and {len(self.negative)} negative"
            refuse(self.name, f"paired texts need as many of each class, not {counts}: pass paired=False")
        if not {"blank", "duplicate"} <= set(self.dropped):
            refuse(self.name, f"dropped needs the keys blank and duplicate, not {listed(self.dropped)}")
        object.__setattr__(self, "dropped", dict(self.dropped))

    def _checked_prompts(self, side: str) -> tuple[Asked, ...]:
        given = getattr(self, f"{side}_prompts")
        wanted = len(getattr(self, side)) if self.positive_prompts or self.negative_prompts else 0
        if isinstance(given, str) or len(given) != wanted:
            refuse(self.name, f"{len(given)} {side}_prompts for {wanted} texts: give one for each text, or none at all")
        prompts = tuple(
            check_asked(asked, f"{self.name}, {side} prompt {number}") for number, asked in enumerate(given, start=1)
        )
        if "" in prompts:
            refuse(
                f"{self.name}, {side} prompt {prompts.index('') + 1}", "is blank: fill it, or give no prompts at all"
            )
        return prompts

    @property
    def prompts(self) -> list[str | list[dict[str, str]]] | None:
        """What the positive texts answer, then what the negative ones do, each as a chat template takes it; None where
        texts stand by themselves."""
        both = (*self.positive_prompts, *self.negative_prompts)
        return [
            asked if isinstance(asked, str) else [{"role": role, "content": content} for role, content in asked]
            for asked in both
        ] or None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what is allowed but weak."""
        if min(len(self.positive), len(self.negative)) >= FEW_PER_CLASS:
            return ()
        counts = f"{len(self.positive)} positive and {len(self.negative)} negative texts"
        return (f"Only {counts}: with fewer than {FEW_PER_CLASS} per class the result is mostly noise.",)

    @property
    def sha256(self) -> str:
        """A hash of the texts of both classes in order, and of what they answer where they answer something, the same
        whatever file or encoding they came from."""
        prompts = [self.positive_prompts, self.negative_prompts] if self.positive_prompts else []
        content = json.dumps([self.positive, self.negative, *prompts], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def split(self, fraction: float, *, seed: int = 0, at_most: int | None = None) -> Split:
        """Hold out `fraction` of each class, at most `at_most` texts per class; paired rows stay together.

        At least one text per class is held out and at least one is left to train on. The same seed gives the same
        split, and a smaller held-out set is a subset of a larger one. Raises `ExamplesError` unless
        0 < fraction < 1 and `at_most` is at least 1.
        """
        if not 0 < fraction < 1:
            refuse(self.name, f"the held-out fraction has to lie between 0 and 1, not {fraction}")
        if at_most is not None and at_most < 1:
            refuse(self.name, f"at_most has to be at least 1, not {at_most}")
        rng = random.Random(seed)
        positive = _hold_out(len(self.positive), fraction, at_most, rng)
        negative = positive if self.paired else _hold_out(len(self.negative), fraction, at_most, rng)
        return Split(positive[0], negative[0], positive[1], negative[1])

    def parts(self, fraction: float, *, seed: int = 0, at_most: int | None = None) -> "tuple[ContrastSet, ContrastSet]":
        """The texts left to train on, and those held out as in `split`. Raises `ExamplesError` also where one of the
        two parts would have fewer than 2 texts of a class."""
        split = self.split(fraction, seed=seed, at_most=at_most)
        kept = self.at(split.train_positive, split.train_negative)
        return kept, self.at(split.held_out_positive, split.held_out_negative)

    def at(self, positive: Iterable[int], negative: Iterable[int], **changes: Any) -> "ContrastSet":
        """The texts at these positions with what they answer, otherwise as it is but for `changes`. Raises as making
        one does."""
        picked = {
            name: tuple(getattr(self, name)[place] for place in places)
            for side, places in zip(SIDES, (tuple(positive), tuple(negative)), strict=True)
            for name in (side, *([f"{side}_prompts"] if self.positive_prompts else []))
        }
        return replace(self, **picked, **changes)


def key(text: str) -> str:
    """What makes two texts the same: the text after Unicode NFC, with runs of white space as one space.

    A text with more than `_MARKS` combining marks in a row, which no script needs, is not normalised: for such a run
    Python's normalisation takes time with the square of its length, and stops every other thread meanwhile.
    """
    if not text.isascii() and not (_MAY_BE_MARKS.search(text) and _marks_in_a_row().search(text)):
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


@cache
def _marks_in_a_row() -> re.Pattern[str]:
    marks = "".join(map(chr, filter(lambda code: unicodedata.combining(chr(code)), range(sys.maxunicode + 1))))
    return re.compile(f"[{marks}]{{{_MARKS + 1}}}")


def identity(text: str, asked: Asked = "") -> Hashable:
    """What makes two examples the same: the text (see `key`), and what it answers."""
    return (key(text), key(asked) if isinstance(asked, str) else asked) if asked else key(text)


def _check_texts(examples: ContrastSet) -> None:
    keys: tuple[dict[Hashable, int], dict[Hashable, int]] = ({}, {})
    for side, seen in zip(SIDES, keys, strict=True):
        texts, prompts = getattr(examples, side), getattr(examples, f"{side}_prompts")
        check_class_size(examples.name, side, len(texts))
        for number, text in enumerate(texts, start=1):
            place = f"{examples.name}, {side} text {number}"
            if not clean_text(text, place):
                refuse(place, "is blank: leave it out")
            seen.setdefault(identity(text, prompts[number - 1] if prompts else ""), number)
    check_overlap(examples.name, "text", *keys)


def check_class_size(where: str, side: str, count: int) -> None:
    if count < MIN_PER_CLASS:
        refuse(where, f"{count} different {side} text(s) where at least {MIN_PER_CLASS} are needed: add more")
    if count > MAX_PER_CLASS:
        refuse(where, f"more than {MAX_PER_CLASS:,} {side} texts: keep at most {MAX_PER_CLASS:,} per class")


def check_overlap(where: str, unit: str, positive: Mapping[Hashable, int], negative: Mapping[Hashable, int]) -> None:
    shared = next((key for key in positive if key in negative), None)
    if shared is not None:
        text = shared[0] if isinstance(shared, tuple) else shared
        rows = f"positive ({unit} {positive[shared]}) and negative ({unit} {negative[shared]})"
        remedy = "keep it in one class, or drop such texts (--drop-conflicts)"
        refuse(where, f"the text {short(text)} is both {rows}: {remedy}")


def _hold_out(
    count: int, fraction: float, at_most: int | None, rng: random.Random
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    order = list(range(count))
    rng.shuffle(order)
    held = min(max(1, round(count * fraction)), count - 1, at_most or count)
    return tuple(sorted(order[held:])), tuple(sorted(order[:held]))
