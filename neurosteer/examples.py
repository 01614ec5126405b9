"""Contrast sets: texts that show a behaviour and texts that don't, read from whatever file people have them in.

Every way in (a path, an upload, pasted text, a bundled set) goes through the same few steps: bytes are decoded, rows
are turned into entries, and entries are deduplicated and checked once. Whatever is wrong with the input is an
`ExamplesError` of one line that names the file, the row where there is one, and the remedy.
"""

import hashlib
import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from neurosteer._examples_parsing import (
    MAX_BYTES,
    SIDES,
    TOO_LARGE,
    Entry,
    Parsed,
    clean_text,
    decode,
    listed,
    parse_file,
    parse_lines,
    refuse,
    short,
)

MIN_PER_CLASS, MAX_PER_CLASS, FEW_PER_CLASS = 2, 20_000, 20

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

    `paired` means that row i of both belong together. `dropped` counts the rows that reading left out, under exactly
    `"blank"` and `"duplicate"`; `source` says in words what the texts were read from. Neither takes part in equality.

    Raises `ExamplesError` unless each class has 2 to 20,000 texts, no text is blank, and no text is in both classes
    (compared after Unicode NFC and with runs of whitespace as one space).
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    name: str = "examples"
    paired: bool = False
    dropped: Mapping[str, int] = field(default_factory=lambda: {"blank": 0, "duplicate": 0}, compare=False)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for side in SIDES:
            texts = getattr(self, side)
            if isinstance(texts, str):
                refuse(self.name, f"{side} is one string: give a tuple of texts")
            object.__setattr__(self, side, tuple(texts))
        _check_texts(self.name, self.positive, self.negative)
        if self.paired and len(self.positive) != len(self.negative):
            counts = f"{len(self.positive)} positive and {len(self.negative)} negative"
            refuse(self.name, f"paired texts need as many of each class, not {counts}: pass paired=False")
        if set(self.dropped) != {"blank", "duplicate"}:
            refuse(self.name, f"dropped needs the keys blank and duplicate, not {listed(self.dropped)}")
        object.__setattr__(self, "dropped", dict(self.dropped))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what is allowed but weak."""
        if min(len(self.positive), len(self.negative)) >= FEW_PER_CLASS:
            return ()
        counts = f"{len(self.positive)} positive and {len(self.negative)} negative texts"
        return (f"Only {counts}: with fewer than {FEW_PER_CLASS} per class the result is mostly noise.",)

    @property
    def sha256(self) -> str:
        """A hash of the texts of both classes in order, the same whatever file or encoding they came from."""
        content = json.dumps([self.positive, self.negative], ensure_ascii=False, separators=(",", ":"))
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
        rows = ((split.train_positive, split.train_negative), (split.held_out_positive, split.held_out_negative))
        kept, held = (
            replace(
                self,
                positive=tuple(self.positive[place] for place in positive),
                negative=tuple(self.negative[place] for place in negative),
            )
            for positive, negative in rows
        )
        return kept, held


def read_examples(source: str | Path, negative: str | Path | None = None, *, name: str | None = None) -> ContrastSet:
    """Read a contrast set from a file, from two plain text files, or by the name of a bundled set.

    One file (`source`) may be
    - a table separated by commas, tabs, semicolons or pipes, with the columns `text` and `label` (positive/negative,
      pos/neg, 1/0, true/false) or `positive` and `negative` (a cell may be blank). Upper and lower case are the same,
      other columns are ignored, and two columns of text and label need no header;
    - JSON: a list of objects with those keys, or one object `{"positive": [...], "negative": [...]}`;
    - JSON lines: one such object a line.
    The content decides which, not the file's extension. With `negative`, both files hold one text a line. A `source`
    that is no file is looked up among `bundled_sets()`. UTF-8, UTF-16 and Windows-1252/Latin-1 are recognised.

    Whitespace around a text is removed; blank rows and repetitions within a class are left out and counted in
    `dropped`. Rows are numbered from 1 as a spreadsheet shows them: the header is row 1, in JSON the first object is.

    Raises `ExamplesError` for anything that cannot be read: no such file, more than 20 MB, a binary file, missing
    columns, an unknown label, an unclosed quote, a text in both classes, fewer than 2 or more than 20,000 per class.
    """
    path = Path(source)
    if negative is not None:
        second = Path(negative)
        return parse_examples(
            _read_file(path), filename=path.name, negative=_read_file(second), negative_filename=second.name, name=name
        )
    if str(path) in bundled_sets() and not path.is_file():
        path = _bundled_file(f"{path}.csv")
    return parse_examples(_read_file(path), filename=path.name, name=name)


def parse_examples(
    data: bytes | str,
    *,
    filename: str,
    negative: bytes | str | None = None,
    negative_filename: str = "negative.txt",
    name: str | None = None,
) -> ContrastSet:
    """`read_examples` for content at hand, such as an upload: the same formats, limits and errors.

    `filename` is for messages and the set's default name. With `negative`, both hold one text a line.
    """
    file = PurePath(filename).name or "examples"
    if negative is None:
        text, encoding = decode(data, file)
        parsed = parse_file(text, file)
        source = f"{file}: {parsed.format}, {encoding}, {parsed.columns}"
        return _assemble(parsed, file, name or PurePath(file).stem, source)
    other = PurePath(negative_filename).name or "negative examples"
    stems = dict.fromkeys((PurePath(file).stem, PurePath(other).stem))
    return _from_lines((data, negative), (file, other), name or "-".join(stems))


def paste_examples(positive: str, negative: str) -> ContrastSet:
    """A contrast set from pasted text, one example a line; limits and errors as in `read_examples`."""
    return _from_lines((positive, negative), ("positive texts", "negative texts"), "pasted")


def assets_folder() -> Path:
    """The folder of bundled files: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "assets"
    return inside if inside.exists() else Path(__file__).parent.parent / "assets"


def bundled_sets() -> tuple[str, ...]:
    """The names that `read_examples` knows without a file, sorted."""
    return tuple(sorted(path.stem for path in _bundled_file("").glob("*.csv")))


def neutral_prompts() -> tuple[str, ...]:
    """Bundled prompts that ask for no behaviour in particular. Raises `ExamplesError` if the file is missing."""
    return _bundled_lines("neutral_prompts.txt")


def calibration_prompts() -> tuple[str, ...]:
    """The bundled prompts that strengths are calibrated on, none of them a neutral prompt; half are instructions, half
    openings. Raises `ExamplesError` if the file is missing."""
    return _bundled_lines("calibration_prompts.txt")


def sweep_prompts() -> tuple[str, ...]:
    """Sixteen of the neutral prompts, half of them instructions, half openings: what a sweep uses by default."""
    prompts = neutral_prompts()
    return prompts[:8] + prompts[20:28]


def _bundled_lines(name: str) -> tuple[str, ...]:
    path = _bundled_file(name)
    text, _ = decode(_read_file(path), path.name)
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _bundled_file(name: str) -> Path:
    return assets_folder() / "examples" / name


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            refuse(str(path), "is a folder: name a file in it")
        if not path.exists():
            refuse(str(path), f"no such file, nor a bundled set: name a file, or one of {', '.join(bundled_sets())}")
        if not path.is_file():
            refuse(str(path), "is not a regular file: save the examples as a CSV or text file")
        if path.stat().st_size > MAX_BYTES:
            refuse(str(path), TOO_LARGE)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        refuse(str(path), f"cannot be read ({reason}): check the path and its permissions")


def _from_lines(data: tuple[bytes | str, bytes | str], files: tuple[str, str], name: str) -> ContrastSet:
    entries: list[Entry] = []
    encodings: dict[str, None] = {}
    for side in (0, 1):
        text, encoding = decode(data[side], files[side])
        entries += parse_lines(text, files[side], side)
        encodings[encoding] = None
    both = " and ".join(files)
    source = f"{both}: lines, {' and '.join(encodings)}"
    return _assemble(Parsed(entries, "lines", ""), both, name, source)


def _assemble(parsed: Parsed, where: str, name: str, source: str) -> ContrastSet:
    """Drop blanks and duplicates, refuse what cannot be a contrast set, and build it."""
    kept: tuple[dict[str, Entry], dict[str, Entry]] = ({}, {})
    dropped = {"blank": 0, "duplicate": 0}
    for entry in parsed.entries:
        texts = kept[entry.side]
        if not entry.text:
            dropped["blank"] += 1
        elif texts.setdefault(_key(entry.text), entry) is not entry:
            dropped["duplicate"] += 1
        elif len(texts) > MAX_PER_CLASS:
            _check_count(where, SIDES[entry.side], len(texts))  # here already: reading on would only cost memory
    for side, texts in zip(SIDES, kept, strict=True):
        _check_count(where, side, len(texts))
    rows = [{key: entry.row for key, entry in texts.items()} for texts in kept]
    _check_overlap(where, "row", *rows)
    paired = parsed.rows_are_pairs and list(rows[0].values()) == list(rows[1].values())
    positive, negative = (tuple(entry.text for entry in texts.values()) for texts in kept)
    return ContrastSet(positive, negative, name, paired, dropped, source)


def _key(text: str) -> str:
    """What makes two texts the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _check_texts(where: str, positive: Sequence[str], negative: Sequence[str]) -> None:
    keys: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for side, texts, seen in zip(SIDES, (positive, negative), keys, strict=True):
        _check_count(where, side, len(texts))
        for number, text in enumerate(texts, start=1):
            place = f"{where}, {side} text {number}"
            if not clean_text(text, place):
                refuse(place, "is blank: leave it out")
            seen.setdefault(_key(text), number)
    _check_overlap(where, "text", *keys)


def _check_count(where: str, side: str, count: int) -> None:
    if count < MIN_PER_CLASS:
        refuse(where, f"{count} different {side} text(s) where at least {MIN_PER_CLASS} are needed: add more")
    if count > MAX_PER_CLASS:
        refuse(where, f"more than {MAX_PER_CLASS:,} {side} texts: keep at most {MAX_PER_CLASS:,} per class")


def _check_overlap(where: str, unit: str, positive: Mapping[str, int], negative: Mapping[str, int]) -> None:
    shared = next((key for key in positive if key in negative), None)
    if shared is not None:
        rows = f"positive ({unit} {positive[shared]}) and negative ({unit} {negative[shared]})"
        refuse(where, f"the text {short(shared)} is both {rows}: keep it in one class")


def _hold_out(
    count: int, fraction: float, at_most: int | None, rng: random.Random
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    order = list(range(count))
    rng.shuffle(order)
    held = min(max(1, round(count * fraction)), count - 1, at_most or count)
    return tuple(sorted(order[held:])), tuple(sorted(order[:held]))
