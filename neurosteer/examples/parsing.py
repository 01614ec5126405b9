"""From text to rows: tables and their headers, JSON, chats and plain lines. Nothing here is public.

Rows are numbered from 1 as a spreadsheet or editor shows them. Whatever is wrong is an `ExamplesError` of one line.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import PurePath
from typing import NamedTuple, cast

from neurosteer.errors import ExamplesError
from neurosteer.examples.chats import asked_of, is_chat, text_of
from neurosteer.examples.columns import (
    KNOWN,
    LABEL,
    TEXTS,
    USUAL,
    Columns,
    Entry,
    Row,
    Shape,
    entries,
    find_one_class,
    find_shape,
    fold,
    looks_like_label,
    refuse_columns,
)
from neurosteer.examples.encodings import decode
from neurosteer.examples.parquet import MAGIC, parse_parquet
from neurosteer.examples.refusing import MAX_COLUMNS, MAX_ROWS, TOO_MANY_ROWS, refuse, short
from neurosteer.examples.texts import SIDES, clean_text

_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
_JSON_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", ".json", *_JSON_LINES)
_NAMED_TABLES = "CSV, JSON lines or Parquet, by its extension"
_EXCEL_DELIMITER = re.compile(r'\A"?sep=(.)"?(?=\n)', re.IGNORECASE)
_NO_RECORD: dict[str, object] = {}
_MOST_BRACKETS = 1_000_000  # a file of nothing but empty lists would take fifty times its size in memory
_PROMPT_LISTS = tuple(f"{side}_prompts" for side in SIDES)


class Parsed(NamedTuple):
    """What a file was found to hold, in words too. `rows_are_pairs` where one row holds a text of each class."""

    entries: Iterable[Entry]
    source: str
    rows_are_pairs: bool = False


def parse_file(data: bytes | str, file: str, columns: Columns) -> Parsed:
    """The entries of one file; its content decides the format."""
    if isinstance(data, bytes) and data.startswith(MAGIC):
        shape, rows = parse_parquet(data, file, columns)
        return _of_shape(shape, rows, columns, file, f"Parquet, columns {shape.in_words}")
    text, encoding = decode(data, file)
    return _parse_json(text, encoding, file, columns) or _parse_table(text, encoding, file, columns)


def _of_shape(shape: Shape, rows: Iterable[Row], columns: Columns, file: str, source: str) -> Parsed:
    return Parsed(entries(shape, rows, columns, file), source, len(shape.texts) == 2)


# --- One class a file -------------------------------------------------------------------------------------------------


def parse_one_class(data: bytes | str, file: str, side: int, columns: Columns) -> Parsed:
    """A file of texts of one class: plain text, one example a line or a paragraph; or a table, JSON lines or Parquet
    with a column of texts or messages, and no labels."""
    if columns.label is not None or columns.positive is not None:
        refuse(
            file, "two files have no labels, each is of one class: name neither a column of them nor the positive one"
        )
    suffix = PurePath(file).suffix.lower()
    if isinstance(data, bytes) and data.startswith(MAGIC):
        shape, rows = parse_parquet(data, file, columns, one_class=True)
        source, encoding = f"columns {shape.in_words}", "Parquet"
    else:
        text, encoding = decode(data, file)
        if suffix not in _TABLES:
            _refuse_named(columns, file, "plain text has no columns")
            return _parse_plain(text, encoding, file, side)
        shape, rows = _one_class_rows(text, file, columns) or _refuse_table(file)
        source = f"columns {shape.in_words}"
    of_side = (entry._replace(side=side) for entry in entries(shape, rows, columns, file))
    return Parsed(of_side, f"{source}, {encoding}")


def _refuse_named(columns: Columns, file: str, why: str) -> None:
    """What was said of columns where there are none would be passed over, and the texts be others than those meant."""
    if columns != USUAL:
        refuse(file, f"{why}: leave the names of columns and the positive label out, or give a table ({_NAMED_TABLES})")


def _refuse_table(file: str) -> tuple[Shape, Iterator[Row]]:
    """Its header or braces would become examples."""
    refuse(file, "two files have to be plain text, or hold texts of one class each under text or messages, no labels")


def _one_class_rows(text: str, file: str, columns: Columns) -> tuple[Shape, Iterable[Row]] | None:
    found = _values(text, file) if text.lstrip().startswith(("{", "[")) else None
    if found is not None:
        names, records = _records(found[1], file, columns)
        shape = find_one_class(names, columns, file)
        return (shape, _record_rows(records, shape)) if shape else None
    table = _read_table(text, file, columns)
    shape = find_one_class(table.names, columns, file) if table.has_header else None
    return (shape, _pick(table.rows, shape, table, file)) if shape else None


def _parse_plain(text: str, encoding: str, file: str, side: int) -> Parsed:
    """Paragraphs where blank lines part texts of several lines, else one text a line."""
    blocks = list(_paragraphs(text, file))
    if len(blocks) > 1 and any("\n" in block for _, block in blocks):
        found = (Entry(side, clean_text(block, f"{file}, row {row}"), row) for row, block in blocks)
        return Parsed(found, f"paragraphs, {encoding}")
    return Parsed(parse_lines(text, file, side), f"lines, {encoding}")


def _paragraphs(text: str, file: str) -> Iterator[tuple[int, str]]:
    """Runs of lines without a blank one between them, with the number of the first."""
    block: list[str] = []
    row = 0
    for row, line in _lines(text, file):
        if line.strip():
            block.append(line)
        elif block:
            yield row - len(block), "\n".join(block)
            block = []
    if block:
        yield row + 1 - len(block), "\n".join(block)


def parse_lines(text: str, file: str, side: int) -> Iterator[Entry]:
    """One text a line, all of one class."""
    return (Entry(side, clean_text(line, f"{file}, row {row}"), row) for row, line in _lines(text, file))


def _lines(text: str, file: str) -> Iterator[tuple[int, str]]:
    """Numbered lines. Not str.splitlines: that splits at characters which no editor counts as a line end."""
    for row, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        _check_row(row, file)
        yield row, line.removesuffix("\n")


def _check_row(row: int, file: str) -> None:
    if row > MAX_ROWS:
        refuse(file, TOO_MANY_ROWS)


# --- Tables -----------------------------------------------------------------------------------------------------------


class _TableRow(NamedTuple):
    """Cells, and whether one of them is parted from the one before by a separator with a space behind it, unquoted."""

    row: int
    cells: list[str]
    is_spaced: bool


class _Table(NamedTuple):
    """A table whose header, where it has one, was read. `is_spaced` is the header's."""

    names: list[str]
    rows: Iterator[_TableRow]
    delimiter: str
    has_header: bool
    is_spaced: bool


def _parse_table(text: str, encoding: str, file: str, columns: Columns) -> Parsed:
    table = _read_table(text, file, columns)
    shape = find_shape(table.names, columns, file) or refuse_columns(file, table.names)
    header = "" if table.has_header else ", no header"
    source = f"CSV, {encoding}, {_DELIMITERS[table.delimiter]}{header}, columns {shape.in_words}"
    return _of_shape(shape, _pick(table.rows, shape, table, file), columns, file, source)


def _read_table(text: str, file: str, columns: Columns) -> _Table:
    if not text.strip():
        refuse(file, "is empty: add a header (text,label) and one row per example")
    text, delimiters = _without_excel_line(text, file)
    delimiter, first = _sniff(text, delimiters, file, columns)
    names = [fold(cell) for cell in first.cells]
    rows = _csv_rows(text, delimiter, file)
    label = None if _is_header(names, columns) else _label_column(first.cells, columns)
    if label is not None:
        return _Table([(TEXTS[0], LABEL)[i == label] for i in (0, 1)], rows, delimiter, False, False)
    if first.cells:
        next(one for one in rows if any(map(str.strip, one.cells)))
    return _Table(names, rows, delimiter, True, first.is_spaced)


def _without_excel_line(text: str, file: str) -> tuple[str, str]:
    """The text without the line `sep=;`, which Excel takes as a word on the separator, and which separators it may be.
    A blank line stays in its place, so that rows keep their numbers."""
    found = _EXCEL_DELIMITER.match(text)
    if not found:
        return text, "".join(_DELIMITERS)
    if found[1] not in _DELIMITERS:
        refuse(f"{file}, row 1", f"the separator {short(found[1])} is not read: save with a comma, semicolon or tab")
    return text[found.end() :], found[1]


def _is_header(names: list[str], columns: Columns) -> bool:
    known = columns.named <= set(names)
    return known and find_shape(names, columns, "") is not None


def _sniff(text: str, delimiters: str, file: str, columns: Columns) -> tuple[str, _TableRow]:
    """The delimiter, and the first row that is not blank. The delimiter is the one under which that row makes sense:
    counting characters, as csv.Sniffer does, is misled by punctuation in the texts."""
    firsts: dict[str, _TableRow] = {}
    problems: list[ExamplesError] = []
    for delimiter in delimiters:
        try:
            rows = (one for one in _csv_rows(text, delimiter, file) if any(map(str.strip, one.cells)))
            first = next(rows, _TableRow(1, [], False))
        except ExamplesError as problem:
            problems.append(problem)
            continue
        while first.cells and not first.cells[-1].strip():
            first.cells.pop()
        names = [fold(cell) for cell in first.cells]
        if _is_header(names, columns) or _label_column(first.cells, columns) is not None:
            return delimiter, first
        firsts[delimiter] = first
    delimiter, first = max(firsts.items(), key=lambda item: len(item[1].cells), default=("", _TableRow(1, [], False)))
    if problems and len(first.cells) < 2:  # no separator parts anything, but where it is not read
        raise problems[0]
    return delimiter, first


def _label_column(first: list[str], columns: Columns) -> int | None:
    """Which of two cells is a label, if the row looks like data without a header."""
    if columns.named:
        return None
    return next((at for at in (1, 0) if len(first) == 2 and looks_like_label(first[at])), None)


def _csv_rows(text: str, delimiter: str, file: str) -> Iterator[_TableRow]:
    line = ""
    row = start = end = separators = 0  # of the row, where it starts, and what was read of it

    def remembered() -> Iterator[str]:
        nonlocal line, end, separators
        for line in io.StringIO(text):
            before, separators = separators, separators + line.count(delimiter)
            if before < MAX_COLUMNS <= separators:
                _check_cells(text, start, delimiter, f"{file}, row {row + 1}")
            end += len(line)
            yield line

    reader = csv.reader(remembered(), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for row, cells in enumerate(reader, start=1):
            _check_row(row, file)
            start, separators = end, 0
            yield _TableRow(row, cells, delimiter != "\t" and f"{delimiter} " in line and '"' not in line)
    except csv.Error as error:
        problem = "text after a closing quote: write a quote inside a quoted text twice"
        if "unexpected end" in str(error):
            problem = "a quote that opens here is never closed: close it, or write a quote inside a quoted text twice"
        elif "field larger" in str(error):
            problem = f"a cell has over {csv.field_size_limit():,} characters: shorten it, or close its quote"
        refuse(f"{file}, row {row + 1}", problem)


def _check_cells(text: str, start: int, delimiter: str, where: str) -> None:
    """That the row which starts there has not too many cells, before all of them are made: a million of them would
    take fifty times the row's bytes. Separators within quotes part no cells."""
    cell = re.compile(rf' *+(?:"[^"]*+(?:""[^"]*+)*+"?+)?+[^{delimiter}\n]*+({re.escape(delimiter)}?+)')
    if all(one[1] for one in islice(cell.finditer(text, start), MAX_COLUMNS)):
        refuse(where, f"more than {MAX_COLUMNS:,} cells: keep the columns of the examples alone")


def _pick(rows: Iterable[_TableRow], shape: Shape, table: _Table, file: str) -> Iterator[Row]:
    """The cells of the columns that matter. What an unquoted separator in a text would tear apart is refused: the row
    has too many cells, or a text goes on after the separator and a space where the header has none."""
    width, at = len(table.names), [table.names.index(name) for name in shape.names]
    is_torn = table.has_header and not table.is_spaced and (shape.label is None or shape.prompt is not None)
    remedy = "put double quotes around a text that contains the separator"
    for row, cells, is_spaced in rows:
        if any(map(str.strip, cells[width:])):
            refuse(f"{file}, row {row}", f"{len(cells)} cells where {width} are expected: {remedy}")
        if is_torn and is_spaced:
            said = f"a {_DELIMITERS[table.delimiter]} and a space may be part of a text: {remedy}"
            refuse(f"{file}, row {row}", f"{said}, or leave the space out")
        yield row, [cells[i] if i < len(cells) else "" for i in at]


# --- JSON -------------------------------------------------------------------------------------------------------------


def _parse_json(text: str, encoding: str, file: str, columns: Columns) -> Parsed | None:
    """JSON or JSON lines; None if the content is neither, for a table may well start with a bracket."""
    found = _values(text, file) if text.lstrip().startswith(("{", "[")) else None
    if found is None:
        return None
    kind, values = found
    if isinstance(values, dict):
        _refuse_named(columns, file, "an object of lists has no columns")
        named = ", ".join((*SIDES, *_PROMPT_LISTS) if _PROMPT_LISTS[0] in values else SIDES)
        return Parsed(
            _from_lists(cast(dict[str, object], values), file),
            f"{kind}, {encoding}, lists {' and '.join(named.rsplit(', ', 1))}",
        )
    names, records = _records(values, file, columns)
    shape = find_shape(names, columns, file) or refuse_columns(file, names)
    source = f"{kind}, {encoding}, keys {shape.in_words}"
    return _of_shape(shape, _record_rows(records, shape), columns, file, source)


def _values(text: str, file: str) -> tuple[str, Iterable[tuple[int, object]] | dict[str, object]] | None:
    """The format in words and its numbered records, or the lists of one object; None where it is no JSON."""
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        refuse(file, f"more than {_MOST_BRACKETS:,} lists and objects: keep the examples alone")
    suffix = PurePath(file).suffix.lower()
    document, problem = _load_json(text)
    if problem:
        first_line = next(line for _, line in _lines(text, file) if line.strip())
        if suffix in _JSON_LINES or not _load_json(first_line)[1]:
            return "JSON lines", _load_lines(text, file)
        if suffix != ".json":
            return None
        refuse(file, f"is not valid JSON ({problem}): correct it there, or export it again")
    if isinstance(document, list):
        return "JSON", enumerate(cast(list[object], document), start=1)
    folded = _folded(document)
    if all(isinstance(folded.get(side), list) for side in SIDES) and not is_chat(folded[SIDES[0]]):
        return "JSON", folded
    return "JSON", [(1, document)]


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
    return {fold(key): value for key, value in cast(dict[str, object], document).items()}


def _from_lists(lists: dict[str, object], file: str) -> Iterator[Entry]:
    """Texts of each class, and what they answer where there are lists of that too."""
    for side, (name, prompts) in enumerate(zip(SIDES, _PROMPT_LISTS, strict=True)):
        texts, asked = cast(list[object], lists[name]), lists.get(prompts) or []
        if not isinstance(asked, list) or (asked and len(asked) != len(texts)):
            count = len(asked) if isinstance(asked, list) else short(asked)
            refuse(file, f"{prompts} has {count} for {len(texts)} texts: give one for each text, or none at all")
        for row, value in enumerate(texts, start=1):
            where = f"{file}, {name} row {row}"
            text, answers = text_of(value, asked_of(asked[row - 1], where) if asked else "", where)
            yield Entry(side, text, row, answers)


def _records(
    values: Iterable[tuple[int, object]] | dict[str, object], file: str, columns: Columns
) -> tuple[dict[str, None], list[tuple[int, dict[str, object]]]]:
    """All keys there are, and the records with those that may matter."""
    wanted = KNOWN | columns.named
    records: list[tuple[int, dict[str, object]]] = []
    names: dict[str, None] = {}
    for row, value in [(1, values)] if isinstance(values, dict) else values:
        if not isinstance(value, dict):
            refuse(f"{file}, row {row}", f'is {short(value)}, not an object: write {{"text": …, "label": …}}')
        folded = _folded(value)
        names.update(dict.fromkeys(folded))
        records.append((row, {name: folded[name] for name in folded if name in wanted} if folded else _NO_RECORD))
    return names, records


def _record_rows(records: Iterable[tuple[int, dict[str, object]]], shape: Shape) -> Iterator[Row]:
    return ((row, [record.get(name) for name in shape.names]) for row, record in records)
