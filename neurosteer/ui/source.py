"""Examples as a visitor gives them: uploaded, pasted or picked."""

from pathlib import Path
from typing import NamedTuple

from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import bundled_sets
from neurosteer.examples.reading import parse_examples, paste_examples, read_examples


class Source(NamedTuple):
    """What the visitor gave as examples."""

    kind: str
    bundled: str | None
    file: str | None
    positive_file: str | None
    negative_file: str | None
    positive_text: str
    negative_text: str


def read_source(source: Source) -> ContrastSet | None:
    """The examples, or None where something is still missing. Raises `ExamplesError`."""
    if source.kind == "bundled":
        return read_bundled(source.bundled) if source.bundled else None
    if source.kind == "file":
        return read_file(source.file) if source.file else None
    if source.kind == "files":
        if not source.positive_file or not source.negative_file:
            return None
        data, filename = _content(source.positive_file)
        negative, negative_filename = _content(source.negative_file)
        return parse_examples(data, filename=filename, negative=negative, negative_filename=negative_filename)
    if not source.positive_text.strip() or not source.negative_text.strip():
        return None
    return paste_examples(source.positive_text, source.negative_text)


def read_bundled(name: str) -> ContrastSet:
    """The ready-made set of that name. Raises `UsageError` for any other text: it is a visitor's, never a path."""
    if name not in bundled_sets():
        raise UsageError(f"There is no ready-made set {name[:60]!r}; there are {', '.join(bundled_sets())}.")
    return read_examples(name)


def read_file(path: str) -> ContrastSet:
    """The labelled texts of an upload. Raises `ExamplesError`."""
    data, filename = _content(path)
    return parse_examples(data, filename=filename)


def _content(path: str) -> tuple[bytes, str]:
    """An upload's content and the name its owner gave it."""
    return Path(path).read_bytes(), Path(path).name
