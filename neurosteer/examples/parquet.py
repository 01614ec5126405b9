"""Parquet: tables of columns, as the Hugging Face Hub keeps data sets. Only the columns that matter are unpacked.

A small file may unpack to any size: pages are compressed, and a long text that many rows share is stored once. So what
the file says of itself is looked at first (how its columns nest, how large each page becomes), and rows are unpacked a
few at a time, until there are too many.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from neurosteer.examples.columns import Columns, Row, Shape, find_one_class, find_shape, fold, refuse_columns
from neurosteer.examples.refusing import MAX_BYTES, MAX_COLUMNS, MAX_ROWS, TOO_LARGE, TOO_MANY_ROWS, refuse, short
from neurosteer.examples.thrift import read_struct

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAGIC = b"PAR1"
MAX_UNPACKED = 64 * 1024 * 1024
"""Bytes, of the columns that are read."""

_MAX_FOOTER, _MAX_DEPTH = 1024 * 1024, 12
_MAX_PAGES, _MAX_HEADER, _HEADER_BYTES = 50_000, 64 * 1024, 64  # a page with a longer header counts more than once
_AT_ONCE = 1_000  # rows
_NOT_PARQUET = "is not valid Parquet"

# Field numbers, from Parquet's own description (parquet.thrift).
_SCHEMA, _N_ROWS, _ROW_GROUPS = 2, 3, 4
_CHILDREN = 5
_CHUNKS, _CHUNK = 1, 3
_PATH, _PACKED_BYTES, _DATA_AT, _DICTIONARY_AT = 3, 7, 9, 11
_PAGE_UNPACKED, _PAGE_PACKED, _PAGE_KINDS, _N_VALUES = 2, 3, (5, 7, 8), 1
_VALUE_BYTES = (
    16  # that a value takes at least once it is unpacked, be it absent: a run of those takes no room in a page
)


def parse_parquet(data: bytes, file: str, columns: Columns, *, one_class: bool = False) -> tuple[Shape, Iterator[Row]]:
    """What a Parquet file holds, and its rows.

    Raises `ExamplesError` for more than 20 MB, a damaged file, one that unpacks to more than 64 MB or 200,000 rows, and
    columns that are none of ours.
    """
    if len(data) > MAX_BYTES:
        refuse(file, TOO_LARGE)
    footer = _footer(data, file)
    parquet = _opened(data, file)
    names = {fold(name): name for name in parquet.schema_arrow.names}
    shape = find_one_class(names, columns, file) if one_class else find_shape(names, columns, file)
    if shape is None:
        refuse_columns(file, names)
    wanted = [names[name] for name in shape.names]
    largest = _check_pages(data, footer, {name.encode() for name in wanted}, file)
    return shape, _rows(parquet, wanted, largest, file)


def _footer(data: bytes, file: str) -> dict[int, Any]:
    """The file's account of itself, held against what there may be."""
    size = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != MAGIC or size > len(data) - 12:
        refuse(file, f"{_NOT_PARQUET} (its end is missing): fetch it again")
    if size > _MAX_FOOTER:
        refuse(file, f"its description has {size:,} bytes: keep fewer columns")
    try:
        footer, _ = read_struct(data[-8 - size : -8], 0)
        schema, has_too_many = footer[_SCHEMA], footer[_N_ROWS] > MAX_ROWS
        if len(schema) > MAX_COLUMNS or _depth(schema) > _MAX_DEPTH:
            refuse(file, f"more than {MAX_COLUMNS:,} columns, or columns too deeply nested: keep the examples alone")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        refuse(file, f"{_NOT_PARQUET} (its description {_why(error)}): fetch it again")
    if has_too_many:
        refuse(file, TOO_MANY_ROWS)
    return footer


def _depth(schema: Sequence[dict[int, Any]]) -> int:
    """How deep columns nest; a schema lists each column before those within it."""
    open_, deepest = [1], 0
    for element in schema:
        while open_ and not open_[-1]:
            open_.pop()
        if not open_:
            raise ValueError("names columns twice")
        open_[-1] -= 1
        open_.append(element.get(_CHILDREN) or 0)
        deepest = max(deepest, len(open_) - 1)
    return deepest


def _check_pages(data: bytes, footer: dict[int, Any], wanted: set[bytes], file: str) -> int:
    """The most bytes that a column of a row group unpacks to. Page by page: what the description says of them is only
    a claim. Raises `ExamplesError` where all come to more than `MAX_UNPACKED`, or take too long to look at."""
    total = largest = cost = 0
    try:
        for about in _wanted_chunks(data, footer, wanted):
            before = total
            for header, unpacked in _pages(data, about):
                total, cost = total + unpacked, cost + 1 + header // _HEADER_BYTES
                if total > MAX_UNPACKED:
                    refuse(file, f"unpacks to more than {MAX_UNPACKED // 1024**2} MB: keep fewer or shorter texts")
                if cost > _MAX_PAGES:
                    refuse(file, f"more than {_MAX_PAGES:,} pages: write it again with larger ones")
            largest = max(largest, total - before)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        refuse(file, f"{_NOT_PARQUET} (a page {_why(error)}): fetch it again")
    return largest


def _wanted_chunks(data: bytes, footer: dict[int, Any], wanted: set[bytes]) -> list[dict[int, Any]]:
    """What is said of the columns that are read, in each row group. None may lie where another one does, or a small
    file would be looked at, and unpacked, as often as it has row groups."""
    chunks = [chunk[_CHUNK] for group in footer[_ROW_GROUPS] for chunk in group[_CHUNKS]]
    chunks = [about for about in chunks if _is_wanted(about[_PATH], wanted)]
    sizes = [about[_PACKED_BYTES] for about in chunks]
    if min(sizes, default=0) < 0 or sum(sizes) > len(data):
        raise ValueError("lies where another one does")
    return chunks


def _is_wanted(path: Sequence[bytes], wanted: set[bytes]) -> bool:
    """As pyarrow takes names: a dot in one may stand for a column within a column."""
    dotted = b".".join(path) + b"."
    return any(dotted.startswith(name + b".") for name in wanted)


def _pages(data: bytes, about: dict[int, Any]) -> Iterator[tuple[int, int]]:
    """The bytes of the header of each page of one column in one row group, and those that the page unpacks to."""
    at = min(place for place in (about.get(_DICTIONARY_AT), about[_DATA_AT]) if place)
    end = at + about[_PACKED_BYTES]
    while at < end:
        page, body = read_struct(data, at, min(end, at + _MAX_HEADER))
        packed, unpacked = page[_PAGE_PACKED], page[_PAGE_UNPACKED]
        values = sum(page[kind][_N_VALUES] for kind in _PAGE_KINDS if kind in page)
        if min(packed, unpacked, values) < 0:
            raise ValueError("has a negative size")
        yield body - at, unpacked + values * _VALUE_BYTES
        at = body + packed


def _opened(data: bytes, file: str) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, memory_map=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        refuse(file, f"{_NOT_PARQUET} ({_why(error)}): fetch it again")


def _rows(parquet: "pq.ParquetFile", wanted: list[str], largest: int, file: str) -> Iterator[Row]:
    """A few rows at a time: any of them may hold the longest text there is."""
    import pyarrow as pa

    names = _label_names(parquet)
    at_once = min(_AT_ONCE, max(1, MAX_UNPACKED // max(1, largest)))
    row = unpacked = 0
    try:
        for batch in parquet.iter_batches(at_once, columns=wanted, use_threads=False):
            unpacked += batch.nbytes
            if unpacked > MAX_UNPACKED:
                refuse(file, f"unpacks to more than {MAX_UNPACKED // 1024**2} MB: keep fewer or shorter texts")
            cells = [_named(batch.column(name).to_pylist(), names.get(name)) for name in wanted]
            for values in zip(*cells, strict=True):
                row += 1
                if row > MAX_ROWS:
                    refuse(file, TOO_MANY_ROWS)
                yield row, values
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:  # also from odd dates
        refuse(file, f"{_NOT_PARQUET} ({_why(error)}): fetch it again")


def _named(cells: list[Any], names: list[str] | None) -> list[Any]:
    """Numbers that stand for the names of classes as those names."""
    if names is None:
        return cells
    return [names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell for cell in cells]


def _label_names(parquet: "pq.ParquetFile") -> dict[str, list[str]]:
    """What the numbers in columns of classes stand for, where the `datasets` library noted it."""
    noted = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(noted)["info"]["features"]
        return {
            name: [str(one) for one in cast(list[object], feature["names"])]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature["names"], list)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _why(error: Exception) -> str:
    return short(f"{error or type(error).__name__}")[1:-1]
