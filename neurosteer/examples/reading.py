"""Contrast sets: texts that show a behaviour and texts that don't, read from whatever file people have them in.

Every way in (a path, an upload, pasted text, a bundled set) goes through the same few steps: bytes are decoded, rows
are turned into entries, and entries are deduplicated and checked once. Whatever is wrong with the input is an
`ExamplesError` of one line that names the file, the row where there is one, and the remedy.
"""

from itertools import chain
from pathlib import Path, PurePath

from neurosteer.examples.contrast_set import MAX_PER_CLASS, ContrastSet, check_class_size, check_overlap, key
from neurosteer.examples.files import bundled_file, bundled_sets, read_file
from neurosteer.examples.parsing import SIDES, Entry, Parsed, decode, parse_file, parse_lines


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

    Whitespace around a text is removed, and what a text has beyond 20,000 characters is cut off. Blank rows and
    repetitions within a class are left out and counted in `dropped`. Rows are numbered from 1 as a spreadsheet shows
    them: the header is row 1, in JSON the first object is.

    Raises `ExamplesError` for anything that cannot be read: no such file, more than 20 MB or 200,000 rows, a binary
    file, missing columns, an unknown label, an unclosed quote, a text in both classes, fewer than 2 or more than
    20,000 texts of a class.
    """
    path = Path(source)
    if negative is not None:
        second = Path(negative)
        return parse_examples(
            read_file(path), filename=path.name, negative=read_file(second), negative_filename=second.name, name=name
        )
    if str(path) in bundled_sets() and not path.is_file():
        path = bundled_file(f"{path}.csv")
    return parse_examples(read_file(path), filename=path.name, name=name)


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


def _from_lines(data: tuple[bytes | str, bytes | str], files: tuple[str, str], name: str) -> ContrastSet:
    decoded = [decode(one, file) for one, file in zip(data, files, strict=True)]
    entries = chain(
        *(parse_lines(text, file, side) for side, ((text, _), file) in enumerate(zip(decoded, files, strict=True)))
    )
    both = " and ".join(files)
    source = f"{both}: lines, {' and '.join(dict.fromkeys(encoding for _, encoding in decoded))}"
    return _assemble(Parsed(entries, "lines", ""), both, name, source)


def _assemble(parsed: Parsed, where: str, name: str, source: str) -> ContrastSet:
    """Drop blanks and duplicates, refuse what cannot be a contrast set, and build it."""
    kept: tuple[dict[str, Entry], dict[str, Entry]] = ({}, {})
    dropped = {"blank": 0, "duplicate": 0}
    for entry in parsed.entries:
        texts = kept[entry.side]
        if not entry.text:
            dropped["blank"] += 1
        elif texts.setdefault(key(entry.text), entry) is not entry:
            dropped["duplicate"] += 1
        elif len(texts) > MAX_PER_CLASS:
            check_class_size(where, SIDES[entry.side], len(texts))  # here already: reading on would only cost memory
    for side, texts in zip(SIDES, kept, strict=True):
        check_class_size(where, side, len(texts))
    rows = [{key: entry.row for key, entry in texts.items()} for texts in kept]
    check_overlap(where, "row", *rows)
    paired = parsed.rows_are_pairs and list(rows[0].values()) == list(rows[1].values())
    positive, negative = (tuple(entry.text for entry in texts.values()) for texts in kept)
    return ContrastSet(positive, negative, name, paired, dropped, source)
