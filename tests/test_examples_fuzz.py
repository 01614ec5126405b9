"""Whatever bytes arrive, reading them ends in a contrast set or in one clear line. Deterministic and quick."""

import csv
import io
import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurosteer.errors import ExamplesError
from neurosteer.examples.contrast_set import ContrastSet, key
from neurosteer.examples.reading import parse_examples, paste_examples

EXTENSIONS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", "")
steady = settings(derandomize=True, database=None, deadline=None, max_examples=200)

FRAGMENTS = (
    "text",
    "label",
    "positive",
    "negative",
    "pos",
    "0",
    "1",
    "true",
    "a",
    "b",
    "ü",
    " ",
    "\ufeff",
    "\0",
    "é" * 3,
)
MARKS = (",", ";", "\t", "|", '"', '""', "\n", "\r", "\r\n", "{", "}", "[", "]", ":", "\\", "null", "\u2028", "1e999")
almost_files = st.lists(st.sampled_from(FRAGMENTS + MARKS), max_size=40).map("".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["pos", "neg", 1, 0]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["text", "label", "positive", "negative", "Text", "x"]), inner, max_size=4)
    ),
    max_leaves=20,
)


def read_or_refuse(data: bytes | str, filename: str, negative: bytes | str | None = None) -> ContrastSet | None:
    """The set, or None where it was refused properly; any other exception fails the test."""
    try:
        return parse_examples(data, filename=filename, negative=negative)
    except ExamplesError as error:
        message = str(error)
        assert message.isprintable() and 20 < len(message) < 600
        assert ":" in message, "what is wrong comes after where"
        return None


@pytest.mark.parametrize("extension", EXTENSIONS)
@steady
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused_in_one_line(extension: str, data: bytes) -> None:
    read_or_refuse(data, f"file{extension}")
    read_or_refuse(data, f"file{extension}", negative=data[::-1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@steady
@given(text=almost_files, extension=st.sampled_from(EXTENSIONS))
def test_what_almost_looks_like_a_file_is_read_or_refused_in_one_line(encoding: str, text: str, extension: str) -> None:
    read_or_refuse(text.encode(encoding), f"file{extension}")


@steady
@given(text=st.text(st.characters(), max_size=60), filename=st.text(st.characters(), max_size=20))
def test_arbitrary_text_under_any_file_name_is_read_or_refused_in_one_line(text: str, filename: str) -> None:
    read_or_refuse(text, filename)
    read_or_refuse(f"text,label\n{text},{text}\n", filename)


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv"])
@steady
@given(value=json_values, lines=st.booleans())
def test_json_of_any_shape_is_read_or_refused_in_one_line(extension: str, value: object, lines: bool) -> None:
    values = value if isinstance(value, list) and lines else [value]
    read_or_refuse("\n".join(json.dumps(v) for v in values), f"file{extension}")


LABELLED = b'text,label\n"a, ""quoted""",positive\nplain,positive\n"two\nlines",negative\nlast,negative\n'
COLUMNS = 'positive;negative\r\nsch\u00f6n;\u00fcbel\r\n"a;b";c\r\n;\u4e00\r\n'.encode()
LINES = b'{"text": "a", "label": 1}\n{"text": "b\\n\\u00e9", "label": "pos"}\n{"text": "c", "label": 0}\n' * 2
VALID = {
    "labelled.csv": LABELLED,
    "columns.csv": COLUMNS,
    "lines.jsonl": LINES,
    "wide.csv": COLUMNS.decode().encode("utf-16"),
}


@pytest.mark.parametrize("filename", VALID)
def test_a_file_cut_off_at_any_byte_is_read_or_refused_in_one_line(filename: str) -> None:
    for end in range(len(VALID[filename])):
        read_or_refuse(VALID[filename][:end], filename)
        read_or_refuse(VALID[filename][end:], filename)


@pytest.mark.parametrize("filename", VALID)
def test_a_file_with_any_byte_replaced_is_read_or_refused_in_one_line(filename: str) -> None:
    data = VALID[filename]
    for at in range(len(data)):
        for byte in (b"\0", b"\n", b"\r", b'"', b",", b";", b"\xff", b"\xd8", b"{", b""):
            read_or_refuse(data[:at] + byte + data[at + 1 :], filename)


def test_a_table_cut_off_at_any_byte_never_yields_a_text_that_it_did_not_hold() -> None:
    whole = parse_examples(LABELLED, filename="labelled.csv")
    accepted = 0
    for end in range(len(LABELLED)):
        if read := read_or_refuse(LABELLED[:end], "labelled.csv"):
            accepted += 1
            assert (read.positive, read.negative) == (whole.positive, whole.negative)
    assert accepted, "the last line end, and the end of the word negative, may be missing"


@st.composite
def rows_with_repeats(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Rows of text and label, many blank or repeated, none in both classes."""
    words = st.sampled_from(["", " ", "a", " a", "a  b", "a b", "e\u0301", "\u00e9", "c\nd", "c d", 'say "x", y', "z"])
    labels = draw(st.lists(st.sampled_from(["pos", "neg"]), min_size=1, max_size=30))
    rows = []
    for label in labels:
        word = draw(words)
        rows.append((f"{label} {word}" if word.strip() else word, label))
    return rows


@steady
@given(rows=rows_with_repeats(), delimiter=st.sampled_from(",;\t|"), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_rows_kept_and_rows_dropped_add_up(rows: list[tuple[str, str]], delimiter: str, end: str) -> None:
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL  # else csv leaves a line feed in a text unquoted
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([("text", "label"), *rows])
    expected: dict[str, set[str]] = {"pos": set(), "neg": set()}
    for text, label in rows:
        if text.strip():
            expected[label].add(" ".join(text.replace("e\u0301", "\u00e9").split()))
    read = read_or_refuse(out.getvalue().encode(), "rows.csv")
    assert (read is not None) == (min(map(len, expected.values())) >= 2)
    if read is not None:
        assert (len(read.positive), len(read.negative)) == (len(expected["pos"]), len(expected["neg"]))
        assert len(read.positive) + len(read.negative) + sum(read.dropped.values()) == len(rows)
        assert read.dropped["blank"] == sum(not text.strip() for text, _ in rows)


text_lists = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), max_size=8
)


@steady
@given(positive=text_lists, negative=text_lists)
def test_the_same_lists_as_json_and_as_labelled_rows_give_the_same_set(
    positive: list[str], negative: list[str]
) -> None:
    rows = [(text, side) for side, texts in (("pos", positive), ("neg", negative)) for text in texts]
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    as_table = read_or_refuse(out.getvalue().encode(), "x.csv")
    as_json = read_or_refuse(json.dumps({"positive": positive, "negative": negative}).encode(), "x.json")
    assert (as_table is None) == (as_json is None)
    if as_table is not None and as_json is not None:
        assert as_table.sha256 == as_json.sha256
        assert as_table.dropped["duplicate"] == as_json.dropped["duplicate"]


@steady
@given(positive=st.text(st.characters(), max_size=40), negative=st.text(st.characters(), max_size=40))
def test_pasted_lines_are_read_or_refused_in_one_line(positive: str, negative: str) -> None:
    try:
        read = paste_examples(positive, negative)
    except ExamplesError as error:
        assert str(error).isprintable()
        return
    for given_text, kept in ((positive, read.positive), (negative, read.negative)):
        lines = given_text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert all(text in [line.strip() for line in lines] for text in kept)


@steady
@given(
    sizes=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    at_most=st.none() | st.integers(1, 50),
    seed=st.integers(),
    paired=st.booleans(),
)
def test_every_split_is_a_partition_with_something_on_each_side(
    sizes: tuple[int, int], fraction: float, at_most: int | None, seed: int, paired: bool
) -> None:
    positive, negative = (sizes[0], sizes[0]) if paired else sizes
    contrast = ContrastSet(
        tuple(f"p{i}" for i in range(positive)), tuple(f"n{i}" for i in range(negative)), paired=paired
    )
    split = contrast.split(fraction, seed=seed, at_most=at_most)
    sides = (
        (positive, split.train_positive, split.held_out_positive),
        (negative, split.train_negative, split.held_out_negative),
    )
    for count, train, held_out in sides:
        assert sorted(train + held_out) == list(range(count))
        assert train and 1 <= len(held_out) <= (at_most or count)


# --- what a hostile file may cost ------------------------------------------------------------------------------------

ACCENTS = "\u0301\u0323"  # in alternating order, Python's own normalisation takes time with the square of such a run


def said(call: Callable[[], object]) -> str:
    """What an error says; nothing where there is none."""
    try:
        call()
    except ExamplesError as error:
        return str(error)
    return ""


HOSTILE: dict[str, Callable[[int], object]] = {  # each of about so many bytes
    "marks": lambda n: paste_examples(ACCENTS * (n // 4) + "\nb", "c\nd"),
    "marks in JSON": lambda n: parse_examples(
        json.dumps([{"text": ACCENTS * (n // 12), "label": 1}]), filename="a.json"
    ),
    "many runs of marks": lambda n: paste_examples("\n".join(f"{k}a{ACCENTS * 400}" for k in range(n // 1600)), "c\nd"),
    "line ends": lambda n: paste_examples("\n" * n, "c\nd"),
    "line ends in a table": lambda n: parse_examples("\n" * n + "a,b", filename="a.csv"),
    "empty objects": lambda n: parse_examples("{}\n" * (n // 3), filename="a.jsonl"),
    "empty lists": lambda n: parse_examples("[" + "[]," * (n // 3) + "[]]", filename="a.json"),
    "brackets": lambda n: parse_examples("[" * n, filename="a.json"),
    "an open quote": lambda n: parse_examples('"' + "a\n" * (n // 2), filename="a.csv"),
    "separators": lambda n: parse_examples("," * n, filename="a.csv"),
    "all separators": lambda n: parse_examples(",;|\t" * (n // 4), filename="a.csv"),
    "separators between quotes": lambda n: parse_examples('a"' + ",;|\t" * (n // 4), filename="a.csv"),
    "separators after a header": lambda n: parse_examples("text,label\n" + ",a" * (n // 2), filename="a.csv"),
    "a row of many lines": lambda n: parse_examples('"' + (',,,,"\n"' * (n // 7)) + '"', filename="a.csv"),
    "one long text": lambda n: paste_examples("a " * (n // 2) + "\nb", "c\nd"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_megabyte_of_anything_costs_little_time_and_memory(what: str) -> None:
    key("é" * 31)  # what is prepared once
    before = time.process_time()
    said(lambda: HOSTILE[what](1_000_000))
    assert time.process_time() - before < 6  # what takes time with the square takes minutes
    tracemalloc.start()
    said(lambda: HOSTILE[what](50_000))  # tracing takes time
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 50_000, "a hundred times its bytes at most"


def test_too_many_rows_and_too_many_brackets_are_refused_in_words() -> None:
    assert "more than 200,000 rows" in said(lambda: paste_examples("\n" * 500_000, "c\nd"))
    assert "lists and objects" in said(lambda: parse_examples("[" + "[]," * 1_000_000 + "[]]", filename="a.json"))


def test_more_than_two_thousand_cells_are_refused_before_they_are_made() -> None:
    for data in (",;|\t" * 500_000, "x,;|\t y" * 50_000):
        tracemalloc.start()
        assert "row 1: more than 2,000 cells" in said(lambda data=data: parse_examples(data, filename="a.csv"))
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
        tracemalloc.stop()
    header = "text,label\n"
    assert "a.csv, row 3: more than 2,000 cells" in said(
        lambda: parse_examples(f"{header}a,1\n" + "b," * 2_001, filename="a.csv")
    )
    spread = '\n"' + "," * 900 + '"'  # a row of several lines
    assert "row 2: more than 2,000 cells" in said(
        lambda: parse_examples(f'{header}"a{spread}b{spread}c{spread}d{spread}', filename="a.csv")
    )


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_any_number_of_separators_may_stand_in_quotes_and_two_thousand_cells_in_a_row(delimiter: str) -> None:
    numbers = delimiter.join(map(str, range(5_000)))
    rows = [f'"{side} {n} ""quoted"" {numbers}\n{numbers}"{delimiter} {side}' for side in (1, 0) for n in range(2)]
    found = parse_examples("\n".join(rows), filename="a.csv")
    assert found.positive[0].startswith('1 0 "quoted" 0') and len(found.negative) == 2
    wide = delimiter.join(["text", "label", *(f"c{n}" for n in range(1_998))])
    rows = [delimiter.join([f"text {n}", str(n % 2), *"9" * 1_998]) for n in range(4)]
    assert parse_examples("\n".join([wide, *rows]), filename="a.csv").positive == ("text 1", "text 3")


def test_a_text_is_kept_to_twenty_thousand_characters() -> None:
    examples = paste_examples("a" * 50_000 + "\nb", "c\nd")
    assert [len(text) for text in examples.positive] == [20_000, 1]
    assert len(paste_examples("a" * 30_000 + "\n" + "a" * 40_000 + "\nb", "c\nd").positive) == 2, "one is a duplicate"


def test_texts_that_differ_by_their_normal_form_are_the_same_unless_marks_run_on() -> None:
    assert key("e\u0301") == key("é") and key("ø\u0301 x") == key("ǿ\n x")
    assert key("a" + "\u0301\u0323" * 15) == key("a" + "\u0323\u0301" * 15)
    zalgo = "a" + ACCENTS * 40
    assert key(zalgo) == zalgo
