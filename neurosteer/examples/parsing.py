"""From bytes to entries: encodings, tables and their headers, JSON and plain lines. Nothing here is public.

Rows are numbered from 1 as a spreadsheet or editor shows them. Whatever is wrong is an `ExamplesError` of one line.
"""

import codecs
import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePath
from typing import NamedTuple, NoReturn, cast

from neurosteer.errors import ExamplesError
from neurosteer.text import cut, printable

MAX_BYTES = 20 * 1024 * 1024
MAX_ROWS = 200_000
MAX_CHARACTERS = 20_000
"""Of one text: far more than the 512 tokens that reading keeps; the rest is cut off."""
TOO_LARGE = f"larger than {MAX_BYTES // 1024**2} MB: keep fewer or shorter texts"
SIDES = ("positive", "negative")
_LABELS = {"positive": 0, "pos": 0, "1": 0, "true": 0, "negative": 1, "neg": 1, "0": 1, "false": 1}
_LABELS_IN_WORDS = "positive/negative, pos/neg, 1/0 or true/false"
_COLUMNS = (("text", "label"), SIDES)
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
_JSON_LINES = (".jsonl", ".ndjson")
_NO_RECORD: dict[str, object] = {}
_MOST_BRACKETS = 1_000_000  # a file of nothing but empty lists would take fifty times its size in memory
_NOT_PLAIN = (".csv", ".tsv", ".json", *_JSON_LINES)


class Entry(NamedTuple):
    """One text of one class (0 positive, 1 negative) from one row; an empty text stands for a blank row."""

    side: int
    text: str
    row: int


class Parsed(NamedTuple):
    """What a file was found to hold. `rows_are_pairs` where one row holds a text of each class."""

    entries: Iterable[Entry]
    format: str
    columns: str
    rows_are_pairs: bool = False


_Row = tuple[int, object, object]  # the row's number, and its cells in the two columns that matter


def refuse(where: str, problem: str) -> NoReturn:
    """Raise, with anything that would break the line or a terminal (line ends, half characters) blanked out."""
    raise ExamplesError(printable(f"{where}: {problem}"))


def short(value: object) -> str:
    """A value for a message. Containers by their type only: writing out a deeply nested one can overflow the stack."""
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    return repr(cut(" ".join(str(value).split()), 40))


def listed(names: Collection[str]) -> str:
    """Names for a message."""
    shown = ", ".join(short(name) for name in list(names)[:8])
    return (shown or "none") + (", …" if len(names) > 8 else "")


# --- From bytes to text -----------------------------------------------------------------------------------------------


def decode(data: bytes | str, file: str) -> tuple[str, str]:
    """The text, with line feeds as its only line ends, and its encoding in words."""
    if len(data) > MAX_BYTES:
        refuse(file, TOO_LARGE)
    text, encoding = (data, "text") if isinstance(data, str) else _decode_bytes(data, file)
    if "\0" in text:
        refuse(file, "holds NUL bytes, so it is not a text file: save the examples as CSV or plain text in UTF-8")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decode_bytes(data: bytes, file: str) -> tuple[str, str]:
    for bom, name in ((codecs.BOM_UTF8, "UTF-8"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if data.startswith(bom):
            try:
                return data.decode(name), name
            except UnicodeDecodeError as error:
                refuse(file, f"starts as {name} but is damaged at byte {error.start}: save it again as UTF-8")
    if b"\0" in data:
        return _decode_utf16_without_bom(data) or "\0", "UTF-16"
    for codec, name in (("utf-8", "UTF-8"), ("cp1252", "Windows-1252")):
        try:
            return data.decode(codec), name
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "Latin-1"


def _decode_utf16_without_bom(data: bytes) -> str | None:
    """UTF-16 gives itself away by its ASCII: nearly every line end, comma and quote has a NUL beside it, where a binary
    file, or a stray NUL in an 8-bit one, leaves most of them without."""
    codec = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        return None
    marks = '\n\r\t,;|"'
    return text if 2 * sum(map(text.count, marks)) > sum(data.count(mark.encode()) for mark in marks) else None


# --- From cells to entries --------------------------------------------------------------------------------------------


def clean_text(value: object, where: str) -> str:
    """A cell as it will be kept: at most `MAX_CHARACTERS` of it; empty if it is blank or absent."""
    if value is None:
        return ""
    if not isinstance(value, str):
        refuse(where, f"a text is {short(value)}, not a string: put it in quotes")
    text = value.strip()[:MAX_CHARACTERS]
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(where, "a text holds half of a character (a lone surrogate): remove or retype it")
    return text.strip().replace("\r\n", "\n").replace("\r", "\n")


def _side(label: object, where: str) -> int:
    folded = "" if label is None else _fold(str(label)) if isinstance(label, str | int) else short(label)
    if not folded:
        refuse(where, f"the label is missing: use {_LABELS_IN_WORDS}")
    if folded not in _LABELS:
        refuse(where, f"the label {short(label)} is unknown: use {_LABELS_IN_WORDS}")
    return _LABELS[folded]


def _entries(columns: tuple[str, str], rows: Iterable[_Row], file: str) -> Iterator[Entry]:
    for row, first, second in rows:
        where = f"{file}, row {row}"
        if columns == SIDES:
            texts = clean_text(first, where), clean_text(second, where)
            found = [Entry(side, text, row) for side, text in enumerate(texts) if text]
            yield from found or [Entry(0, "", row)]
        else:
            text = clean_text(first, where)
            yield Entry(_side(second, where) if text else 0, text, row)


def _fold(name: str) -> str:
    return name.strip().casefold()


def _wanted(names: Collection[str]) -> tuple[str, str] | None:
    return next((pair for pair in _COLUMNS if set(pair) <= set(names)), None)


def _refuse_columns(file: str, found: Collection[str]) -> NoReturn:
    needed = "text and label, or positive and negative"
    refuse(file, f"found columns {listed(found)}; needed: {needed} (or give two files, one a class, one text a line)")


# --- The formats ------------------------------------------------------------------------------------------------------


def parse_file(text: str, file: str) -> Parsed:
    """The entries of one decoded file; its content decides the format."""
    return _parse_json(text, file) or _parse_table(text, file)


def parse_lines(text: str, file: str, side: int) -> Iterator[Entry]:
    """One text a line, all of one class."""
    if PurePath(file).suffix.lower() in _NOT_PLAIN:  # its header or braces would become examples
        refuse(file, "two files have to be plain text, one example a line: save both as .txt, or give only this one")
    return (Entry(side, clean_text(line, f"{file}, row {row}"), row) for row, line in _lines(text, file))


def _lines(text: str, file: str) -> Iterator[tuple[int, str]]:
    """Numbered lines. Not str.splitlines: that splits at characters which no editor counts as a line end."""
    for row, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        _check_row(row, file)
        yield row, line.removesuffix("\n")


def _check_row(row: int, file: str) -> None:
    if row > MAX_ROWS:
        refuse(file, f"more than {MAX_ROWS:,} rows: keep fewer, and leave blank ones out")


def _parse_table(text: str, file: str) -> Parsed:
    if not text.strip():
        refuse(file, "is empty: add a header (text,label) and one row per example")
    delimiter, first = _sniff(text, file)
    names = [_fold(cell) for cell in first]
    rows = _csv_rows(text, delimiter, file)
    notes = _DELIMITERS[delimiter]
    if columns := _wanted(names):
        next(cells for _, cells in rows if any(map(str.strip, cells)))  # the header
    elif (label := _label_column(first)) is not None:
        columns, names = _COLUMNS[0], [_COLUMNS[0][i == label] for i in (0, 1)]
        notes += ", no header"
    else:
        _refuse_columns(file, first)
    picked = _pick(rows, len(names), (names.index(columns[0]), names.index(columns[1])), file)
    return Parsed(_entries(columns, picked, file), "CSV", f"{notes}, columns {' and '.join(columns)}", columns == SIDES)


def _sniff(text: str, file: str) -> tuple[str, list[str]]:
    """The delimiter, and the first row that is not blank. The delimiter is the one under which that row makes sense:
    counting characters, as csv.Sniffer does, is misled by punctuation in the texts."""
    firsts: dict[str, list[str]] = {}
    problems: list[ExamplesError] = []
    for delimiter in _DELIMITERS:
        try:
            first = next((cells for _, cells in _csv_rows(text, delimiter, file) if any(map(str.strip, cells))), [])
        except ExamplesError as problem:
            problems.append(problem)
            continue
        while first and not first[-1].strip():
            first.pop()
        if _wanted([_fold(cell) for cell in first]) or _label_column(first) is not None:
            return delimiter, first
        firsts[delimiter] = first
    if not firsts:
        raise problems[0]
    return max(firsts.items(), key=lambda item: len(item[1]))


def _label_column(first: list[str]) -> int | None:
    """Which of two cells is a label, if the row looks like data without a header."""
    return next((at for at in (1, 0) if len(first) == 2 and _fold(first[at]) in _LABELS), None)


def _csv_rows(text: str, delimiter: str, file: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
    row = 0
    try:
        for row, cells in enumerate(reader, start=1):
            _check_row(row, file)
            yield row, cells
    except csv.Error as error:
        problem = "text after a closing quote: write a quote inside a quoted text twice"
        if "unexpected end" in str(error):
            problem = "a quote that opens here is never closed: close it, or write a quote inside a quoted text twice"
        elif "field larger" in str(error):
            problem = f"a cell has over {csv.field_size_limit():,} characters: shorten it, or close its quote"
        refuse(f"{file}, row {row + 1}", problem)


def _pick(rows: Iterable[tuple[int, list[str]]], width: int, at: tuple[int, int], file: str) -> Iterator[_Row]:
    for row, cells in rows:
        if any(map(str.strip, cells[width:])):  # an unquoted comma in a text: reading on would cut the text short
            problem = f"{len(cells)} cells where {width} are expected"
            refuse(f"{file}, row {row}", f"{problem}: put double quotes around a text that contains the separator")
        first, second = (cells[i] if i < len(cells) else "" for i in at)
        yield row, first, second


def _parse_json(text: str, file: str) -> Parsed | None:
    """JSON or JSON lines; None if the content is neither, for a table may well start with a bracket."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        refuse(file, f"more than {_MOST_BRACKETS:,} lists and objects: keep the examples alone")
    suffix = PurePath(file).suffix.lower()
    document, problem = _load_json(text)
    if problem:
        first_line = next(line for _, line in _lines(text, file) if line.strip())
        if suffix in _JSON_LINES or not _load_json(first_line)[1]:
            return _parse_records(_load_lines(text, file), "JSON lines", file)
        if suffix != ".json":
            return None
        refuse(file, f"is not valid JSON ({problem}): correct it there, or export it again")
    if isinstance(document, list):
        return _parse_records(enumerate(cast(list[object], document), start=1), "JSON", file)
    sides = [value for key, value in _folded(document).items() if key in SIDES]
    if len(sides) == 2 and all(isinstance(value, list) for value in sides):
        return Parsed(_from_lists(_folded(document), file), "JSON", "lists positive and negative")
    return _parse_records([(1, document)], "JSON", file)


def _load_json(text: str) -> tuple[object, str]:
    """The value and no problem, or None and the problem in words."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as error:
        return None, f"{error.msg} at line {error.lineno}, column {error.colno}"
    except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets in brackets
        return None, "a value too large or too deeply nested"


def _load_lines(text: str, file: str) -> Iterator[tuple[int, object]]:
    for row, line in _lines(text, file):
        value, problem = _load_json(line) if line.strip() else ({}, "")
        if problem:
            reason = problem.partition(" at line")[0]  # its line is always 1
            refuse(f"{file}, row {row}", f"is not valid JSON ({reason}): write one object a line")
        yield row, value


def _folded(document: object) -> dict[str, object]:
    return {_fold(key): value for key, value in cast(dict[str, object], document).items()}


def _from_lists(sides: dict[str, object], file: str) -> Iterator[Entry]:
    for side, name in enumerate(SIDES):
        for row, value in enumerate(cast(list[object], sides[name]), start=1):
            yield Entry(side, clean_text(value, f"{file}, {name} row {row}"), row)


def _parse_records(values: Iterable[tuple[int, object]], kind: str, file: str) -> Parsed:
    wanted = [name for pair in _COLUMNS for name in pair]
    records: list[tuple[int, dict[str, object]]] = []
    names: dict[str, None] = {}
    for row, value in values:
        if not isinstance(value, dict):
            refuse(f"{file}, row {row}", f'is {short(value)}, not an object: write {{"text": …, "label": …}}')
        folded = _folded(value)
        names.update(dict.fromkeys(folded))
        records.append((row, {name: folded[name] for name in wanted if name in folded} if folded else _NO_RECORD))
    columns = _wanted(names) or _refuse_columns(file, names)
    rows = ((row, record.get(columns[0]), record.get(columns[1])) for row, record in records)
    return Parsed(_entries(columns, rows, file), kind, f"keys {' and '.join(columns)}", columns == SIDES)
