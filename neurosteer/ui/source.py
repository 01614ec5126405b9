"""Examples as a visitor gives them: uploaded, pasted, picked, or named on the Hub where visitors are trusted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neurosteer.artifacts.files import csv_text
from neurosteer.errors import UsageError
from neurosteer.examples.columns import Columns
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import bundled_sets
from neurosteer.examples.reading import parse_examples, paste_examples, read_examples
from neurosteer.ui.limits import strangers

ANSWERS = ("prompt", "chosen", "rejected")
"""Columns of the model's own answers, as `parse_examples` knows them."""


class Source(NamedTuple):
    """What the visitor gave as examples, and what is said of the columns of files; `dataset` names one on the Hub."""

    kind: str
    bundled: str | None
    file: str | None
    positive_file: str | None
    negative_file: str | None
    positive_text: str
    negative_text: str
    dataset: str = ""
    text_column: str = ""
    label_column: str = ""
    positive_label: str = ""
    prompt_column: str = ""
    drop_conflicts: bool = False
    answers: Any = None  # rows of prompt, answer that shows it, answer that does not

    @property
    def options(self) -> dict[str, Any]:
        """How files are read."""
        named = (self.text_column, self.label_column, self.positive_label, self.prompt_column)
        columns = Columns(*((name or "").strip() or None for name in named))
        return {"columns": columns, "drop_conflicts": bool(self.drop_conflicts)}


def read_source(source: Source) -> ContrastSet | None:
    """The examples, or None where something is still missing. Raises `ExamplesError`, and for data sets on the Hub
    what `read_dataset` raises."""
    if source.kind == "bundled":
        return read_bundled(source.bundled) if source.bundled else None
    if source.kind == "file":
        return read_file(source.file, source.options) if source.file else None
    if source.kind == "dataset":
        return _read_dataset(source)
    if source.kind == "described":
        return read_answers(source.answers)
    if source.kind == "files":
        if not source.positive_file or not source.negative_file:
            return None
        data, filename = _content(source.positive_file)
        negative, negative_filename = _content(source.negative_file)
        return parse_examples(
            data, filename=filename, negative=negative, negative_filename=negative_filename, **source.options
        )
    if not source.positive_text.strip() or not source.negative_text.strip():
        return None
    return paste_examples(source.positive_text, source.negative_text)


def _read_dataset(source: Source) -> ContrastSet | None:
    """A data set of the Hub, which the machine's owner fetches with their own token: never a stranger."""
    if strangers():
        raise UsageError(
            "Data sets on the Hub are fetched on a page of one's own only; download the file and upload it."
        )
    if not (source.dataset or "").strip():
        return None
    from neurosteer.hub.datasets import read_dataset

    return read_dataset(source.dataset, **source.options)


def answers_csv(rows: Any) -> str:
    """A table of answers as it stands on the page, as a file of examples. Rows in which nothing is left are none."""
    named: list[dict[str, str]] = [dict(zip(ANSWERS, map(_cell, row), strict=False)) for row in rows or ()]
    return csv_text(ANSWERS, [row for row in named if any(row.values())])


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def read_answers(rows: Any) -> ContrastSet | None:
    """The table of answers as examples; None where there is none. Raises `ExamplesError` naming the row."""
    text = answers_csv(rows)
    if text.count("\n") < 2:
        return None
    return parse_examples(text.encode(errors="replace"), filename="answers.csv")


def read_bundled(name: str) -> ContrastSet:
    """The ready-made set of that name. Raises `UsageError` for any other text: it is a visitor's, never a path."""
    if name not in bundled_sets():
        raise UsageError(f"There is no ready-made set {name[:60]!r}; there are {', '.join(bundled_sets())}.")
    return read_examples(name)


def read_file(path: str, options: Mapping[str, Any] | None = None) -> ContrastSet:
    """The labelled texts of an upload, read with `options` of `parse_examples`. Raises `ExamplesError`."""
    data, filename = _content(path)
    return parse_examples(data, filename=filename, **(options or {}))


def _content(path: str) -> tuple[bytes, str]:
    """An upload's content and the name its owner gave it."""
    return Path(path).read_bytes(), Path(path).name
