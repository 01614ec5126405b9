"""Which columns (or JSON keys) hold texts, labels and prompts, and what a row of them says."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from neurosteer.examples.chats import Asked, asked_of, text_of
from neurosteer.examples.refusing import listed, refuse, short
from neurosteer.examples.texts import SIDES

TEXTS = ("text", "sentence", "completion", "messages")
"""Names of the column of texts that a label stands beside, the likeliest first."""

PAIRS = (SIDES, ("pos", "neg"), ("chosen", "rejected"), ("answer_matching_behavior", "answer_not_matching_behavior"))
PROMPTS = ("prompt", "question")
LABEL = "label"
KNOWN = frozenset((*TEXTS, *PROMPTS, LABEL, *(name for pair in PAIRS for name in pair)))

_POSITIVE = ("positive", "pos", "1", "true", "yes")
_NEGATIVE = ("negative", "neg", "0", "-1", "false", "no")
_LABELS_IN_WORDS = "positive/negative, pos/neg, 1/0, 1/-1, true/false or yes/no"
_WHOLE = re.compile(r"([+-]?\d{1,15})\.0+")


@dataclass(frozen=True)
class Columns:
    """What a file calls its columns (or JSON keys) where the usual names do not say it; upper and lower case are the
    same. `text` and `label` are columns, `positive` the label of texts that show the behaviour (all others have one
    other label), `prompt` the column of what the texts answer."""

    text: str | None = None
    label: str | None = None
    positive: str | None = None
    prompt: str | None = None

    @property
    def named(self) -> frozenset[str]:
        """The columns named, as `fold` makes them."""
        return frozenset(fold(name) for name in (self.text, self.label, self.prompt) if name is not None)

    @property
    def wants_labels(self) -> bool:
        """Whether a column of labels is meant, whatever else there is."""
        return any(given is not None for given in (self.text, self.label, self.positive))


USUAL = Columns()


class Shape(NamedTuple):
    """The columns that matter: of texts, one with a label beside it or one a class, and of prompts."""

    texts: tuple[str, ...]
    label: str | None = None
    prompt: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order in which `entries` takes their cells."""
        return tuple(name for name in (*self.texts, self.label, self.prompt) if name is not None)

    @property
    def in_words(self) -> str:
        """For what was read."""
        *names, last = self.names
        return f"{', '.join(names)} and {last}" if names else last


class Entry(NamedTuple):
    """One text of one class (0 positive, 1 negative) from one row; an empty text stands for a blank row."""

    side: int
    text: str
    row: int
    asked: Asked = ""


Row = tuple[int, Sequence[object]]
"""A row's number, and its cells in the columns of a shape."""


def fold(name: str) -> str:
    """A column's name as names are compared."""
    return name.strip().casefold()


def find_shape(names: Collection[str], columns: Columns, file: str) -> Shape | None:
    """What a file with columns of these (folded) names holds; None where that cannot be told. Raises `ExamplesError`
    for a column that was asked for and is not there."""
    _check_named(names, columns, file)
    prompts = (fold(columns.prompt),) if columns.prompt is not None else PROMPTS
    prompt = next((name for name in prompts if name in names), None)
    text = fold(columns.text) if columns.text is not None else next((name for name in TEXTS if name in names), None)
    label = fold(columns.label) if columns.label is not None else LABEL
    if text is not None and label in names:
        return Shape((text,), label, prompt if prompt not in (text, label) else None)
    if columns.wants_labels:
        return None
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    return Shape(pair, None, prompt) if pair is not None else None


def find_one_class(names: Collection[str], columns: Columns, file: str) -> Shape | None:
    """As `find_shape`, for a file that holds the texts of one class."""
    _check_named(names, columns, file)
    text = fold(columns.text) if columns.text is not None else next((name for name in TEXTS if name in names), None)
    prompts = (fold(columns.prompt),) if columns.prompt is not None else PROMPTS
    prompt = next((name for name in prompts if name in names and name != text), None)
    return Shape((text,), None, prompt) if text is not None and LABEL not in names else None


def _check_named(names: Collection[str], columns: Columns, file: str) -> None:
    for name in sorted(columns.named - set(names)):
        refuse(file, f"there is no column {short(name)}; there are {listed(names)}")


def refuse_columns(file: str, found: Collection[str]) -> NoReturn:
    """What there is, and what is needed."""
    needed = "text and label, or positive and negative, or chosen and rejected"
    other = "or say which columns are the text and the label (--text, --label)"
    refuse(file, f"found columns {listed(found)}; needed: {needed}; {other}, or give two files, one a class")


def looks_like_label(cell: str) -> bool:
    """Whether a cell is one of the usual labels."""
    return _folded_label(cell) in (*_POSITIVE, *_NEGATIVE)


class _Labels:
    """Which class a label means; all labels of a file are held against one another."""

    def __init__(self, positive: str | None) -> None:
        self.positive = None if positive is None else _folded_label(positive)
        self.seen: dict[str, None] = {}

    def side(self, label: object, where: str) -> int:
        folded = _folded_label(label)
        if not folded:
            refuse(where, f"the label is missing: use {_LABELS_IN_WORDS}")
        self.seen[folded] = None
        if self.positive is not None:
            labels = {self.positive: None, **self.seen}
            if len(labels) > 2:
                refuse(where, f"more than two labels, {listed(labels)}: keep the rows of two of them")
            return int(folded != self.positive)
        if folded not in _POSITIVE and folded not in _NEGATIVE:
            remedy = f"use {_LABELS_IN_WORDS}, or say which one is positive (--positive)"
            refuse(where, f"the label {short(label)} is unknown: {remedy}")
        if {"0", "-1"} <= self.seen.keys():
            refuse(where, "the labels 0 and -1 both stand here: keep the rows of two labels, and name the positive one")
        return int(folded in _NEGATIVE)

    def check(self, file: str) -> None:
        """That the positive label was there, once all rows were read."""
        if self.positive is not None and self.positive not in self.seen and self.seen:
            refuse(file, f"no row has the label {short(self.positive)}; there are {listed(self.seen)}")


def _folded_label(label: object) -> str:
    """A label as labels are compared: 1, 1.0, "1" and "1.0" are the same, as pandas writes numbers beside blanks."""
    if not isinstance(label, str | int | float):
        return "" if label is None else short(label)
    folded = fold(str(label))
    whole = _WHOLE.fullmatch(folded)
    return whole[1] if whole else folded


def entries(shape: Shape, rows: Iterable[Row], columns: Columns, file: str) -> Iterator[Entry]:
    """What the rows say. Raises `ExamplesError` for a row of which a part is missing."""
    labels = _Labels(columns.positive)
    for row, cells in rows:
        where = f"{file}, row {row}"
        asked = asked_of(cells[-1], where) if shape.prompt is not None else ""
        found = [text_of(cell, asked, where) for cell in cells[: len(shape.texts)]]
        if not any(text for text, _ in found):
            yield Entry(0, "", row)
            continue
        for name, (text, answers) in zip(shape.texts, found, strict=True):
            if not text:
                refuse(where, f"{name} is empty: fill every column, leave the row out, or use text and label")
            if shape.prompt is not None and not answers:
                refuse(where, f"{shape.prompt} is empty: fill every column, or leave the row or the column out")
        if len(found) == 1:
            side = labels.side(cells[1], where) if shape.label is not None else 0
            yield Entry(side, found[0][0], row, found[0][1])
        else:
            yield from (Entry(side, text, row, answers) for side, (text, answers) in enumerate(found))
    labels.check(file)
