"""The texts that SAEs are trained on: read from files, shuffled, framed a few hundred at a time."""

import csv
import hashlib
import json
import random
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import overload

from neurosteer.errors import UsageError
from neurosteer.models.language_model import FRAMINGS, FramedText, Framing, LanguageModel
from neurosteer.validation import check_count

_TEXTS_AT_ONCE = 200
_MAX_TEXT = 1 << 24  # characters in a table's cell; the csv module's own limit is 131,072


@dataclass(frozen=True)
class TrainingText:
    """A text, and the request it answers where it is a chat model's answer."""

    text: str
    prompt: str | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """`features` of each SAE, `active` (on average per token) of them at once, over `tokens` tokens in batches of
    `batch_tokens`. Texts without a prompt take turns under `framings`; each keeps its first `max_tokens` tokens.
    `held_out_tokens` are read for the figures only."""

    features: int = 4096
    active: float = 48
    tokens: int = 3_000_000
    batch_tokens: int = 512
    chunk_tokens: int = 65_536
    learning_rate: float = 1e-3
    framings: tuple[Framing, ...] = ("raw",)
    max_tokens: int = 256
    held_out_tokens: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "framings", tuple(self.framings))
        for key in ("features", "tokens", "batch_tokens", "chunk_tokens", "max_tokens", "held_out_tokens"):
            check_count(key, getattr(self, key), 1, 1 << 40)
        if not 0 < self.active <= self.features:
            raise UsageError(f"active is {self.active!r}; it must lie between 0 and the {self.features} features.")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"learning_rate is {self.learning_rate!r}; it must lie between 0 and 1.")
        if not self.framings or not set(self.framings) <= set(FRAMINGS):
            raise UsageError(f"framings is {self.framings!r}; use some of {', '.join(FRAMINGS)}.")


class TextsOnDisk(Sequence[TrainingText]):
    """Texts in a temporary file, read when they are asked for: in memory a text takes 8 bytes, however long it is.

    The file lies in Python's `tempfile.gettempdir()` (`TMPDIR`), which should be a disk. Raises `UsageError` where it
    cannot be written.
    """

    def __init__(self, texts: Iterable[TrainingText]) -> None:
        self._starts, self._lock = array("q", [0]), threading.Lock()
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with this object)
            weakref.finalize(self, self._file.close)
            for text in texts:
                self._file.write(json.dumps(astuple(text)).encode())
                self._starts.append(self._file.tell())
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"The texts could not be kept in {tempfile.gettempdir()} ({error.strerror or error}); make room there, "
                "or set TMPDIR to another folder."
            ) from error

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> TrainingText: ...
    @overload
    def __getitem__(self, place: slice) -> list[TrainingText]: ...
    def __getitem__(self, place: int | slice) -> TrainingText | list[TrainingText]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        number = range(len(self))[place]
        with self._lock:
            self._file.seek(self._starts[number])
            content = self._file.read(self._starts[number + 1] - self._starts[number])
        return TrainingText(*json.loads(content))


def read_training_texts(paths: Sequence[str | Path]) -> TextsOnDisk:
    """Texts from `.jsonl` (objects with `text` and perhaps `prompt`), `.csv` (those columns) or plain files (one text
    a line), which may be larger than memory. Raises `UsageError` naming the file and line that cannot be read."""
    found = TextsOnDisk(text for path in paths for text in _texts_of(Path(path)) if text.text.strip())
    if not found:
        raise UsageError(f"{', '.join(map(str, paths)) or 'no file'} holds no text; give files with texts to train on.")
    return found


def _texts_of(path: Path) -> Iterator[TrainingText]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from _texts_of_table(path, csv.DictReader(file))
                return
            for number, line in enumerate(file, 1):
                if path.suffix != ".jsonl":
                    yield TrainingText(line.strip())
                elif line.strip():
                    yield _text_of_line(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({error}); give UTF-8 files of texts.") from error


def _texts_of_table(path: Path, rows: "csv.DictReader[str]") -> Iterator[TrainingText]:
    limit = csv.field_size_limit(_MAX_TEXT)
    try:
        if "text" not in (rows.fieldnames or ()):
            raise UsageError(f"{path} has no column 'text'.")
        for row in rows:
            if row["text"] is None:
                raise UsageError(f"{path}, line {rows.line_num} has fewer columns than the first line.")
            yield TrainingText(row["text"], row.get("prompt") or None)
    finally:
        csv.field_size_limit(limit)


def _text_of_line(line: str, where: str) -> TrainingText:
    try:
        row = json.loads(line)
        text, prompt = row["text"], row.get("prompt")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{where} is no JSON object with a 'text'.") from None
    if not isinstance(text, str) or not isinstance(prompt, str | None):
        raise UsageError(f"{where}: 'text' and 'prompt' must be texts.")
    return TrainingText(text, prompt)


class Corpus:
    """The texts in a fixed random order, framed a few hundred at a time; its first tokens are held out.

    A position counts texts from the beginning of the training part, round and round if there are too few.
    """

    def __init__(self, lm: LanguageModel, texts: Sequence[TrainingText], options: TrainingOptions) -> None:
        self.lm, self.options = lm, options
        self.texts = texts
        self.sha256 = _sha256(texts)
        self.order = array("q", range(len(texts)))
        random.Random(options.seed).shuffle(self.order)
        self.held_out: list[FramedText] = []
        first, kept = 0, 0
        while kept < options.held_out_tokens and first < len(self.texts):
            framed = self._frame(range(first, min(first + _TEXTS_AT_ONCE, len(self.texts))))
            self.held_out += framed
            kept += sum(len(item.ids) - item.start for item in framed)
            first += _TEXTS_AT_ONCE
        self.first = min(first, len(self.texts))
        if self.first == len(self.texts):
            raise UsageError(
                f"{len(self.texts)} texts make {kept} tokens, all of which would be held out; give more texts."
            )

    def take(self, position: int, tokens: int) -> tuple[list[FramedText], int]:
        """Texts from `position` on with about `tokens` tokens, and the position after them."""
        taken: list[FramedText] = []
        count, seen, length = 0, 0, len(self.texts) - self.first
        while count < tokens:
            step = range(position, position + min(_TEXTS_AT_ONCE, length))
            framed = self._frame([self.first + place % length for place in step])
            taken += framed
            count += sum(len(item.ids) - item.start for item in framed)
            position += len(step)
            seen += len(step)
            if not taken and seen >= length:
                raise UsageError(f"{length} texts beside those held out are too short to train on; give more texts.")
        return taken, position

    def _frame(self, places: Sequence[int]) -> list[FramedText]:
        kinds: dict[tuple[Framing, bool], list[TrainingText]] = {}
        for place in places:
            item = self.texts[self.order[place]]
            prompted = item.prompt is not None and self.lm.chat
            turn: Framing = self.options.framings[place % len(self.options.framings)]
            kinds.setdefault(("answer" if prompted else turn, prompted), []).append(item)
        framed: list[FramedText] = []
        for (framing, prompted), items in sorted(kinds.items()):
            prompts = [item.prompt or "" for item in items] if prompted else None
            framed += self.lm.frame(
                [item.text for item in items], framing, max_tokens=self.options.max_tokens, prompts=prompts
            )
        return [item for item in framed if len(item.ids) > item.start + 1]


def _sha256(texts: Iterable[TrainingText]) -> str:
    """Of the texts as one JSON list, a text at a time."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(texts):
        digest.update(f"{', ' if number else ''}{json.dumps(astuple(item))}".encode())
    digest.update(b"]")
    return digest.hexdigest()
