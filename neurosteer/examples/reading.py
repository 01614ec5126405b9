"""Contrast sets: texts that show a behaviour and texts that don't, read from whatever file people have them in.

Every way in (a path, an upload, pasted text, a bundled set) goes through the same few steps: bytes are decoded, rows
are turned into entries, and entries are deduplicated and checked once. Whatever is wrong with the input is an
`ExamplesError` of one line that names the file, the row where there is one, and the remedy.
"""

from collections.abc import Hashable
from itertools import chain
from pathlib import Path, PurePath

from neurosteer.examples.columns import USUAL, Columns, Entry
from neurosteer.examples.contrast_set import MAX_PER_CLASS, ContrastSet, check_class_size, check_overlap, identity
from neurosteer.examples.encodings import decode
from neurosteer.examples.files import bundled_file, bundled_sets, read_file
from neurosteer.examples.parsing import Parsed, parse_file, parse_lines, parse_one_class
from neurosteer.examples.refusing import refuse
from neurosteer.examples.texts import SIDES

CONFLICT = "conflicting"
"""What texts in both classes are counted as where they were dropped on request."""

_Kept = tuple[dict[Hashable, Entry], dict[Hashable, Entry]]


def read_examples(
    source: str | Path,
    negative: str | Path | None = None,
    *,
    name: str | None = None,
    columns: Columns = USUAL,
    drop_conflicts: bool = False,
) -> ContrastSet:
    """Read a contrast set from a file, from one file for each class, or by the name of a bundled set.

    One file (`source`) is a table separated by commas, tabs, semicolons or pipes (also with Excel's `sep=` line),
    Parquet, JSON (a list of objects) or JSON lines (one object a line), with one of these columns or keys:
    - `text` (or `sentence`, `completion`, `messages`) and `label`: positive/negative, pos/neg, 1/0, 1/-1, true/false,
      yes/no. Two columns of text and label need no header.
    - `positive` and `negative`, or `pos` and `neg`, or `chosen` and `rejected`: a pair in each row;
    - `answer_matching_behavior` and `answer_not_matching_behavior`, as in Anthropic's and CAA's A/B questions.
    A column `prompt` (or `question`) holds what the texts of its row answer: they are read as answers to it. A cell of
    messages (`{"role": …, "content": …}`) is a conversation; its text is the last turn, the assistant's, and what it
    answers the turns before. JSON may also be one object of lists,
    `{"positive": […], "negative": […], "positive_prompts": […], "negative_prompts": […]}` (the last two may be absent).

    With `negative` there is a file for each class: plain text, a text in each line, or in each paragraph where blank
    lines part texts of several lines; or one of the formats above with a column of texts and no labels.

    Args:
        source: the file, or one of `bundled_sets()`. Its content decides its format, not its extension. UTF-8, UTF-16,
            Windows-1252, GBK and Shift-JIS are recognised; `source` of the set says which it was.
        negative: the second of two files.
        name: the set's name; the file's when left out.
        columns: which columns hold what, and which label is positive, where the names above do not say it. Upper and
            lower case are the same; other columns are ignored.
        drop_conflicts: whether to leave out texts that are in both classes (of pairs the whole row), counted in
            `dropped`.

    Whitespace around a text is removed, and what a text has beyond 20,000 characters is cut off. Rows without text and
    repetitions within a class are left out and counted in `dropped`. Rows are numbered from 1 as a spreadsheet shows
    them: the header is row 1, in JSON and Parquet the first object is.

    Raises `ExamplesError` for anything that cannot be read for sure: no such file, more than 20 MB or 200,000 rows, a
    binary file, an encoding that is not clear, missing columns, an unknown label, a row with an empty part, an unclosed
    quote, a separator in an unquoted text, a text in both classes, fewer than 2 or more than 20,000 texts of a class.
    """
    path = Path(source)
    if negative is not None:
        second = Path(negative)
        return parse_examples(
            read_file(path), filename=path.name, negative=read_file(second), negative_filename=second.name, name=name,
            columns=columns, drop_conflicts=drop_conflicts,
        )  # fmt: skip
    if str(path) in bundled_sets() and not path.is_file():
        path = bundled_file(f"{path}.csv")
    return parse_examples(
        read_file(path), filename=path.name, name=name, columns=columns, drop_conflicts=drop_conflicts
    )


def parse_examples(
    data: bytes | str,
    *,
    filename: str,
    negative: bytes | str | None = None,
    negative_filename: str = "negative.txt",
    name: str | None = None,
    columns: Columns = USUAL,
    drop_conflicts: bool = False,
) -> ContrastSet:
    """`read_examples` for content at hand, such as an upload: the same formats, limits and errors.

    `filename` is for messages and the set's default name. With `negative`, each holds texts of one class.
    """
    file = PurePath(filename).name or "examples"
    if negative is None:
        parsed = parse_file(data, file, columns)
        parsed = parsed._replace(source=f"{file}: {parsed.source}")
        return _assemble(parsed, file, name or PurePath(file).stem, drop_conflicts)
    other = PurePath(negative_filename).name or "negative examples"
    stems = dict.fromkeys((PurePath(file).stem, PurePath(other).stem))
    sides = [
        parse_one_class(content, named, side, columns)
        for side, (content, named) in enumerate(((data, file), (negative, other)))
    ]
    return _assemble(_both(sides, (file, other)), f"{file} and {other}", name or "-".join(stems), drop_conflicts)


def paste_examples(positive: str, negative: str) -> ContrastSet:
    """A contrast set from pasted text, one example a line; limits and errors as in `read_examples`."""
    files = ("positive texts", "negative texts")
    sides = [
        Parsed(parse_lines(decode(text, file)[0], file, side), "lines, text")
        for side, (text, file) in enumerate(zip((positive, negative), files, strict=True))
    ]
    return _assemble(_both(sides, files), " and ".join(files), "pasted", False)


def _both(sides: list[Parsed], files: tuple[str, str]) -> Parsed:
    """Two files as one. What both were found to be is said once: "lines, UTF-8 and UTF-16"."""
    forms = [side.source.rpartition(", ")[::2] for side in sides]
    in_words = (" and ".join(dict.fromkeys(words)) for words in zip(*forms, strict=True))
    return Parsed(chain(*(side.entries for side in sides)), f"{' and '.join(files)}: {', '.join(in_words)}")


def _assemble(parsed: Parsed, where: str, name: str, drop_conflicts: bool) -> ContrastSet:
    """Drop blanks and duplicates, refuse what cannot be a contrast set, and build it."""
    kept, dropped = _kept(parsed, where)
    if drop_conflicts and (count := _drop_conflicts(kept, parsed.rows_are_pairs)):
        dropped[CONFLICT] = count
    for side, texts in zip(SIDES, kept, strict=True):
        check_class_size(where, side, len(texts))
    rows = [{key: entry.row for key, entry in texts.items()} for texts in kept]
    check_overlap(where, "row", *rows)
    _check_prompts(where, [*kept[0].values(), *kept[1].values()])
    paired = parsed.rows_are_pairs and list(rows[0].values()) == list(rows[1].values())
    positive, negative = (tuple(entry.text for entry in texts.values()) for texts in kept)
    prompts = (tuple(entry.asked for entry in texts.values() if entry.asked) for texts in kept)
    return ContrastSet(positive, negative, name, paired, dropped, parsed.source, *prompts)


def _kept(parsed: Parsed, where: str) -> tuple[_Kept, dict[str, int]]:
    """The different texts of each class, the first of each, and how many rows were left out and why."""
    kept: _Kept = ({}, {})
    dropped = {"blank": 0, "duplicate": 0}
    for entry in parsed.entries:
        texts = kept[entry.side]
        if not entry.text:
            dropped["blank"] += 1
        elif texts.setdefault(identity(entry.text, entry.asked), entry) is not entry:
            dropped["duplicate"] += 1
        elif len(texts) > MAX_PER_CLASS:
            check_class_size(where, SIDES[entry.side], len(texts))  # here already: reading on would only cost memory
    return kept, dropped


def _drop_conflicts(kept: _Kept, rows_are_pairs: bool) -> int:
    """Leave out what is in both classes; where rows are pairs, the whole of such rows, so that no text stays without
    its partner. Returns how many texts that were."""
    shared = kept[0].keys() & kept[1].keys()
    rows = {texts[key].row for texts in kept for key in shared} if rows_are_pairs else set()
    count = 0
    for texts in kept:
        gone = [key for key, entry in texts.items() if key in shared or entry.row in rows]
        count += len(gone)
        for one in gone:
            del texts[one]
    return count


def _check_prompts(where: str, entries: list[Entry]) -> None:
    without = next((entry for entry in entries if not entry.asked), None)
    if without is not None and any(entry.asked for entry in entries):
        refuse(f"{where}, row {without.row}", "the text answers nothing, others do: give every text a prompt, or none")
