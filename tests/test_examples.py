"""Reading contrast sets: every format and encoding, every refusal, and what a set promises once it exists."""

import ast
import csv
import dataclasses
import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from neurosteer.errors import ExamplesError
from neurosteer.examples import chats, columns, contrast_set, encodings, files, parsing, reading, refusing, thrift
from neurosteer.examples import texts as texts_module
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import parse_examples, paste_examples, read_examples

POSITIVE = ("I love it, truly", 'She said "great"', "two\nlines; and | a pipe")
NEGATIVE = ("I hate it", "'bad', they said:\tawful", "[no] {never}")
UMLAUTS, EMOJI = ("schön und süß", "naïve façade"), ("so good 😀👍🏽", "日本語は一番")

ENCODINGS = {
    "utf-8": (lambda text: text.encode(), True),
    "utf-8 with BOM": (lambda text: text.encode("utf-8-sig"), True),
    "utf-16 with BOM": (lambda text: text.encode("utf-16"), True),
    "utf-16 big-endian with BOM": (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), True),
    "utf-16-le": (lambda text: text.encode("utf-16-le"), True),
    "utf-16-be": (lambda text: text.encode("utf-16-be"), True),
    "cp1252": (lambda text: text.encode("cp1252"), False),
    "latin-1": (lambda text: text.encode("latin-1"), False),
    "text": (lambda text: text, True),
}


def table(rows: list[tuple[str, ...]], delimiter: str = ",", end: str = "\n") -> str:
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL  # else csv leaves a line feed in a text unquoted
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue()


def labelled(positive: tuple[str, ...], negative: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [("text", "label"), *((t, "positive") for t in positive), *((t, "negative") for t in negative)]


def records(positive: tuple[str, ...], negative: tuple[str, ...]) -> list[dict[str, object]]:
    return [{"text": t, "label": True} for t in positive] + [{"text": t, "label": 0} for t in negative]


FORMATS: dict[str, Callable[[tuple[str, ...], tuple[str, ...]], str]] = {
    **{
        f"{name} labels": lambda p, n, d=delimiter: table(labelled(p, n), d)
        for name, delimiter in (("comma", ","), ("tab", "\t"), ("semicolon", ";"), ("pipe", "|"))
    },
    **{
        f"{name} columns": lambda p, n, d=delimiter: table([("Positive", "Negative"), *zip(p, n, strict=True)], d)
        for name, delimiter in (("comma", ","), ("tab", "\t"), ("semicolon", ";"), ("pipe", "|"))
    },
    "no header": lambda p, n: table(labelled(p, n)[1:]),
    "carriage return line feed": lambda p, n: table(labelled(p, n), end="\r\n"),
    "carriage return": lambda p, n: table(labelled(p, n), end="\r"),
    "json list": lambda p, n: json.dumps(records(p, n), ensure_ascii=False, indent=1),
    "json escaped": lambda p, n: json.dumps([*records(p, n), {"text": None}]),
    "json object": lambda p, n: json.dumps({"positive": p, "Negative": n}, ensure_ascii=False),
    "json lines": lambda p, n: "\n".join(json.dumps(r, ensure_ascii=False) for r in records(p, n)),
}


def refusal(
    data: bytes | str,
    filename: str = "reviews.csv",
    negative: bytes | str | None = None,
    negative_filename: str = "negative.txt",
) -> str:
    with pytest.raises(ExamplesError) as caught:
        parse_examples(data, filename=filename, negative=negative, negative_filename=negative_filename)
    return one_line(caught.value)


def one_line(error: ExamplesError) -> str:
    assert str(error).isprintable(), "a message is one line"
    return str(error)


def texts(count: int, word: str) -> tuple[str, ...]:
    return tuple(f"{word} {number}" for number in range(count))


# --- What can be read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_same_texts_come_back_from_every_format_and_encoding(form: str, encoding: str) -> None:
    encode, any_character = ENCODINGS[encoding]
    extra = EMOJI if any_character else UMLAUTS
    positive, negative = (*POSITIVE, UMLAUTS[0], extra[0] + "!"), (*NEGATIVE, UMLAUTS[1], extra[1] + "?")
    for filename in ("right.csv", "wrong.txt", "UPPER.JSON", "no extension"):
        read = parse_examples(encode(FORMATS[form](positive, negative)), filename=filename)
        assert (read.positive, read.negative) == (positive, negative)
        assert read.sha256 == ContrastSet(positive, negative).sha256
        assert read.source.startswith(f"{filename}: ")


def test_the_source_says_how_the_file_was_understood() -> None:
    def source(data: bytes) -> str:
        return parse_examples(data, filename="folder/reviews.csv").source

    assert source(b"text,label\na,1\nb,1\nc,0\nd,0") == "reviews.csv: CSV, UTF-8, comma, columns text and label"
    assert source(b"\xe9;1\nb;1\nc;0\nd;0") == (
        "reviews.csv: CSV, Windows-1252, semicolon, no header, columns text and label"
    )
    assert source(b'{"positive": ["a", "b"], "negative": ["c", "d"]}') == (
        "reviews.csv: JSON, UTF-8, lists positive and negative"
    )


def test_curly_quotes_from_word_are_read_as_windows_1252_and_undefined_bytes_are_refused() -> None:
    assert parse_examples(b"text,label\n\x93a\x94,1\nb,1\nc,0\nd,0\n", filename="x").positive[0] == "\u201ca\u201d"
    assert "its encoding is not clear: save the file as UTF-8" in refusal(b"text,label\n\xe9\x81,1\nb,1\nc,0\n")


@pytest.mark.parametrize(
    "yes, no", [("positive", "NEGATIVE"), ("Pos", "neg"), ("1", "0"), ("TRUE", "False"), (" 1 ", " 0")]
)
def test_every_spelling_of_a_label_is_understood(yes: str, no: str) -> None:
    read = parse_examples(f"text,label\na,{yes}\nb,{no}\nc,{yes}\nd,{no}\n", filename="x.csv")
    assert (read.positive, read.negative) == (("a", "c"), ("b", "d"))


@pytest.mark.parametrize("yes, no", [("pos", "neg"), (1, 0), (True, False), ("1", "0"), ("True", "false")])
def test_json_labels_may_be_words_numbers_or_booleans(yes: object, no: object) -> None:
    rows = [{"text": text, "label": yes if text in "ab" else no} for text in "abcd"]
    assert parse_examples(json.dumps(rows), filename="x.json").positive == ("a", "b")


def test_header_names_ignore_case_and_order_and_other_columns_are_ignored() -> None:
    read = parse_examples('id, LABEL ,note,"Text"\n1,pos,,a\n2,pos,x,b\n3,neg,,c\n4,neg,y,d,,\n', filename="x.csv")
    assert (read.positive, read.negative) == (("a", "b"), ("c", "d"))


def test_a_space_after_the_delimiter_does_not_undo_the_quotes() -> None:
    read = parse_examples('label, text\n1, "a, b"\n1, c\n0, "d"\n0, "e"', filename="x.csv")
    assert (read.positive, read.negative) == (("a, b", "c"), ("d", "e"))


def test_text_and_label_win_over_other_columns_called_positive_and_negative() -> None:
    read = parse_examples("positive,negative,text,label\n9,9,a,1\n9,9,b,1\n9,9,c,0\n9,9,d,0\n", filename="x.csv")
    assert read.positive == ("a", "b")


def test_two_columns_without_a_header_may_have_the_label_first() -> None:
    read = parse_examples("1\tgood, really\n0\tbad; sad\n1\tfine\n0\tno\n", filename="x.tsv")
    assert (read.positive, read.negative) == (("good, really", "fine"), ("bad; sad", "no"))


def test_a_row_with_an_empty_part_is_refused_and_an_empty_row_left_out() -> None:
    for rows, row, name in (("a,x\nb,\n", 3, "negative"), (",x\nb,y\n", 2, "positive"), ("a,x\nb,y\nc", 4, "negative")):
        said = refusal(f"positive,negative\n{rows}")
        assert said.startswith(f"reviews.csv, row {row}: {name} is empty: fill every column, leave the row out")
    assert "row 2: negative is empty" in refusal('{"positive": "a", "negative": "b"}\n{"positive": "c"}', "x.jsonl")
    read = parse_examples("positive,negative\na,x\n,\n\nb,y\n", filename="x.csv")
    assert read.dropped == {"blank": 2, "duplicate": 0} and read.paired


def test_columns_are_paired_as_long_as_no_row_lost_its_partner() -> None:
    def paired(rows: str) -> bool:
        return parse_examples(f"positive,negative\na,x\nb,y\n{rows}", filename="x.csv").paired

    assert paired("") and paired("c,z\n") and paired(",\n\nc,z\n") and paired("a,x\n")
    assert not paired("a,z\n"), "a duplicate left z alone"
    assert not paired("a,z\nc,x\n"), "as many on both sides, but c belongs to x"


def test_objects_with_both_keys_are_paired_and_two_lists_are_not() -> None:
    lines = '{"positive": "a", "negative": "x"}\n{"Positive": "b", "negative": "y"}\n'
    assert parse_examples(lines, filename="x.jsonl").paired
    assert parse_examples(f"[{lines.strip().replace(chr(10), ',')}]", filename="x.json").paired
    assert not parse_examples('{"positive": ["a", "b"], "negative": ["x", "y"]}', filename="x.json").paired


def test_blank_rows_and_duplicates_are_dropped_and_counted() -> None:
    rows = "a,1\n  ,1\nb,1\n,\n\na ,1\nc,0\nd,0\n c,0\n"
    read = parse_examples(f"text,label\n{rows}", filename="x.csv")
    assert (read.positive, read.negative) == (("a", "b"), ("c", "d"))
    assert read.dropped == {"blank": 3, "duplicate": 2}


def test_duplicates_are_compared_after_nfc_and_whitespace_and_the_first_spelling_is_kept() -> None:
    read = paste_examples("caf\u00e9 au  lait\ncafe\u0301 au lait\nb", "c\nC")
    assert read.positive == ("caf\u00e9 au  lait", "b")
    assert read.negative == ("c", "C")
    assert read.dropped == {"blank": 0, "duplicate": 1}


def test_line_ends_inside_quotes_do_not_change_the_hash() -> None:
    mac, dos, unix = (f'text,label{e}"a{e}b",1{e}c,1{e}d,0{e}e,0{e}'.encode() for e in ("\r", "\r\n", "\n"))
    hashes = {parse_examples(data, filename="x.csv").sha256 for data in (mac, dos, unix)}
    assert hashes == {hashlib.sha256(b'[["a\\nb","c"],["d","e"]]').hexdigest()}


def test_the_hash_depends_on_order_and_class_only() -> None:
    one = ContrastSet(("a", "b"), ("c", "d"))
    assert one.sha256 == ContrastSet(("a", "b"), ("c", "d"), "other", True, source="x").sha256
    others = [
        ContrastSet(("b", "a"), ("c", "d")),
        ContrastSet(("c", "d"), ("a", "b")),
        ContrastSet(("ab", "c"), ("d", "e")),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 4


def test_unicode_line_separators_do_not_split_a_line_of_text_or_of_json() -> None:
    assert paste_examples("a\u2028b\nc\x0bd", "e\nf\x85g").positive == ("a\u2028b", "c\x0bd")
    lines = '{"text": "a\u2028b", "label": 1}\n{"text": "c", "label": 1}\n{"text": "d", "label": 0}\n'
    assert parse_examples(lines + '{"text": "e", "label": 0}', filename="x.jsonl").positive == ("a\u2028b", "c")


def test_a_table_may_start_with_a_bracket_or_a_brace() -> None:
    for opening in ("[laughs]", "{sic}"):
        for filename in ("x.csv", "x.txt"):
            assert parse_examples(f"{opening} a,1\nb,1\nc,0\nd,0\n", filename=filename).positive == (
                f"{opening} a",
                "b",
            )


def test_pasted_text_is_one_example_a_line() -> None:
    read = paste_examples("Great, thanks!\r\n\r\n Lovely \r\n", "text,label\nno")
    assert (read.positive, read.negative) == (("Great, thanks!", "Lovely"), ("text,label", "no"))
    assert (read.name, read.dropped["blank"], read.paired) == ("pasted", 1, False)


# --- Files and bundled sets -------------------------------------------------------------------------------------------


def test_two_plain_text_files_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "warm.txt").write_bytes(b"\xef\xbb\xbfhello, you\r\n\r\nwelcome\r\n")
    (tmp_path / "cold").write_bytes("geh weg\nnö\n".encode("utf-16"))
    read = read_examples(tmp_path / "warm.txt", str(tmp_path / "cold"))
    assert (read.positive, read.negative) == (("hello, you", "welcome"), ("geh weg", "nö"))
    assert (read.name, read.dropped) == ("warm-cold", {"blank": 1, "duplicate": 0})
    assert read.source == "warm.txt and cold: lines, UTF-8 and UTF-16"


def test_a_file_gives_the_set_its_name_unless_one_is_given(tmp_path: Path) -> None:
    path = tmp_path / "film reviews.csv"
    path.write_text("a,1\nb,1\nc,0\nd,0\n")
    assert read_examples(path).name == "film reviews"
    assert read_examples(str(path), name="films").name == "films"
    assert read_examples(path) == parse_examples(path.read_bytes(), filename="film reviews.csv")


def test_a_bundled_set_is_found_by_name_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "examples").mkdir(parents=True)
    (tmp_path / "assets" / "examples" / "mood.csv").write_text("a,1\nb,1\nc,0\nd,0\n")
    (tmp_path / "assets" / "examples" / "neutral_prompts.txt").write_text("Say a word.\n\n And another. \n")
    monkeypatch.setattr(files, "assets_folder", lambda: tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert files.bundled_sets() == ("mood",)
    assert files.neutral_prompts() == ("Say a word.", "And another.")
    assert read_examples("mood").positive == ("a", "b")
    (tmp_path / "mood").mkdir()
    assert read_examples("mood").positive == ("a", "b"), "a folder of that name holds no examples"
    (tmp_path / "mood").rmdir()
    (tmp_path / "mood").write_text("e,1\nf,1\nc,0\nd,0\n")
    assert read_examples("mood").positive == ("e", "f")


def test_an_unknown_name_lists_the_bundled_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "bundled_sets", lambda: ("formality", "mood"))
    with pytest.raises(ExamplesError, match=r"nosuch: no such file.*formality, mood"):
        read_examples("nosuch")


def test_missing_assets_are_no_bundled_sets_and_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "assets_folder", lambda: tmp_path / "none")
    assert files.bundled_sets() == ()
    with pytest.raises(ExamplesError, match=r"neutral_prompts\.txt"):
        files.neutral_prompts()


def test_every_bundled_set_can_be_read_without_a_warning() -> None:
    for name in files.bundled_sets():
        read = read_examples(name)
        assert (read.name, read.warnings, read.dropped) == (name, (), {"blank": 0, "duplicate": 0})


@pytest.mark.parametrize("path", ["missing.csv", ".", "a\0b", "a\nb", "x" * 5000, "/dev/null", "file/inside.csv"])
def test_what_is_no_readable_file_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    for arguments in ((path,), ("file", path), (path, "file")):
        with pytest.raises(ExamplesError) as caught:
            read_examples(*arguments)
        one_line(caught.value)


def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.csv").touch()
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ExamplesError, match=r"secret.csv: cannot be read \(Permission denied\)"):
        read_examples(tmp_path / "secret.csv")


def test_a_file_over_20_mb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.truncate(20 * 1024 * 1024 + 1)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ExamplesError, match=r"huge.csv: larger than 20 MB"):
        read_examples(path)
    assert "larger than 20 MB" in refusal(b"a" * (20 * 1024 * 1024 + 1))
    assert "larger than 20 MB" in refusal(b"a\nb", "p.txt", negative="é" * (20 * 1024 * 1024 + 1))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_label_is_refused_with_file_row_value_and_the_accepted_labels() -> None:
    message = refusal("text,label\na,1\n\nb,postive\n")
    assert (
        message
        == "reviews.csv, row 4: the label 'postive' is unknown: use positive/negative, pos/neg, 1/0, 1/-1, true/false "
        "or yes/no, or say which one is positive (--positive)"
    )
    long = refusal("text,label\na," + "x" * 500)
    assert "'" + "x" * 39 + "…'" in long and len(long) < 200
    assert "row 3" in refusal("a,1\nb,0\nc,maybe\n"), "the first row shows that there is no header"
    assert "row 2: the label is missing" in refusal("text,label\na,\n")
    assert "row 2: the label 'nan'" in refusal('[{"text": "a", "label": 1}, {"text": "b", "label": NaN}]', "x.json")
    assert "row 1: the label a list" in refusal('[{"text": "a", "label": [1]}]', "x.json")
    assert "row 1: the label is missing" in refusal('[{"text": "a"}, {"label": 1}]', "x.json")


def test_a_text_in_both_classes_is_refused_with_both_rows() -> None:
    message = refusal("text,label\na,1\nsame \u0065\u0301,1\nb,0\n same  \u00e9,0\n")
    assert (
        message
        == "reviews.csv: the text 'same é' is both positive (row 3) and negative (row 5): keep it in one class, "
        "or drop such texts (--drop-conflicts)"
    )
    message = refusal(b"a\n\nb", "warm.txt", negative=b"c\nd\nb", negative_filename="cold.txt")
    assert message.startswith("warm.txt and cold.txt: the text 'b' is both positive (row 3) and negative (row 3)")


def test_missing_columns_are_refused_with_those_found_and_those_needed() -> None:
    message = refusal("review;sentiment\ngood;1\n")
    assert message.startswith(
        "reviews.csv: found columns 'review', 'sentiment'; needed: text and label, or positive and"
    )
    assert "found columns 'text'; needed" in refusal("text\na\nb\n")
    assert "found columns 'text'; needed" in refusal('{"text": "a"}\n', "x.jsonl")
    assert "'c7', …;" in refusal(",".join(f"c{i}" for i in range(2000)))
    assert "row 1: more than 2,000 cells" in refusal(",".join(f"c{i}" for i in range(2001)))


def test_an_unclosed_quote_is_refused_with_the_row_it_opens_in() -> None:
    body = "".join(f"t{i},{i % 2}\n" for i in range(100))
    assert "row 3: a quote that opens here is never closed" in refusal(f'text,label\na,1\n"b,1\n{body}')
    assert "row 3: text after a closing quote" in refusal(f'text,label\na,1\n"b,1\n"c",0\n{body}')
    assert "row 1: a quote that opens here" in refusal(f'"text,label\n{body}')


def test_rows_are_counted_as_a_spreadsheet_does_when_a_cell_has_lines() -> None:
    assert "row 3" in refusal('text,label\n"a\n\nb",1\nc,what\n')


def test_an_unquoted_comma_in_a_text_is_refused_instead_of_cutting_the_text() -> None:
    assert "row 2: 3 cells where 2 are expected" in refusal("positive,negative\nI like, it,no\n")
    assert "row 2: 3 cells where 2 are expected" in refusal("positive,negative,\nI like, it,no\n")
    assert "row 2: 3 cells where 2 are expected" in refusal("a,1\nb, c,0\n")


def test_a_cell_beyond_the_csv_limit_is_refused_with_its_row() -> None:
    assert "row 2: a cell has over 131,072 characters" in refusal("text,label\n" + "x" * 131_073 + ",1\n")


@pytest.mark.parametrize(
    "data",
    [
        b"text,label\na\0b,1\nc,0\n",
        b"text,label\na\0bc,1\nc,0\n",
        b"PK\x03\x04\x14\0\0\0\x08\0" * 9,
        b"\0",
        b"\0\0\0\0",
        "text,label\na\0,1",
        b"\xff\xfe\0\0a\0",
    ],
)
def test_a_binary_file_is_refused_as_such(data: bytes | str) -> None:
    assert refusal(data).startswith("reviews.csv: holds NUL bytes, so it is not a text file")


def test_damage_behind_a_byte_order_mark_is_refused_with_its_place() -> None:
    assert "starts as UTF-8 but is damaged at byte 4" in refusal(b"\xef\xbb\xbfa\xff")
    assert "starts as UTF-16 but is damaged at byte 4" in refusal(b"\xff\xfea\0b")


def test_damaged_json_is_refused_with_its_place() -> None:
    assert "x.json: is not valid JSON (Expecting value at line 2, column 1)" in refusal("[\n", "x.json")
    assert "x.jsonl, row 3: is not valid JSON (" in refusal('{"text": "a", "label": 1}\n\n{"text"\n', "x.jsonl")
    assert "x, row 2: is not valid JSON (" in refusal('{"text": "a", "label": 1}\n{"text"\n', "x")
    assert "too deeply nested" in refusal("[" * 100_000, "x.json")
    assert "too large" in refusal(f"[{'9' * 5000}]", "x.json")


def test_json_of_the_wrong_shape_is_refused_with_its_row() -> None:
    assert "row 2: is a list, not an object" in refusal('[{"text": "a", "label": 1}, []]', "x.json")
    assert "row 1: is 'a', not an object" in refusal('["a"]', "x.json")
    assert "row 1: a text is '5', not a string" in refusal('[{"text": 5, "label": 1}]', "x.json")
    assert "negative row 2: a text is a dict" in refusal('{"positive": ["a", "b"], "negative": ["c", {}]}', "x.json")
    assert "found columns none" in refusal("[]", "x.json")
    assert "row 1: a text is a list" in refusal('{"positive": ["a"], "negative": "b"}', "x.json")


def test_half_a_character_is_refused_because_nothing_can_encode_it() -> None:
    assert "row 1: a text holds half of a character" in refusal('[{"text": "a\\ud83d", "label": 1}]', "x.json")
    assert "row 2: a text holds half" in refusal("text,label\na\ud83d,1\n")
    assert "is unknown" in refusal('[{"text": "a", "label": "\\ud83d\\n\\u001b[31m"}]', "x.json")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"  ", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_an_empty_file_is_refused(data: bytes) -> None:
    assert refusal(data).startswith("reviews.csv: is empty")


def test_two_files_that_are_no_plain_text_are_refused() -> None:
    assert refusal("text,label\na,1\n", "p.csv", negative="b\nc").startswith("p.csv: two files have to be plain text")
    assert refusal("a\nb", "p.txt", negative="{}", negative_filename="n.JSONL").startswith("n.JSONL: two files have")


def test_too_few_and_too_many_texts_are_refused_with_the_class() -> None:
    assert "1 different positive text(s) where at least 2" in refusal("a,1\na,1\nb,0\nc,0\n")
    assert "0 different negative text(s)" in refusal("a,1\nb,1\n")
    many = "text,label\n" + "".join(f"t{i},0\n" for i in range(20_001))
    assert "more than 20,000 negative texts" in refusal(many)
    assert len(parse_examples(many.replace("t20000,0", "a,1\nb,1"), filename="x.csv").negative) == 20_000


def test_a_file_name_cannot_break_the_line() -> None:
    assert refusal("", "a\nb\x1b[31m\ud83d.csv").startswith("a b [31m .csv: is empty")


# --- The set itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positive, negative, said",
    [
        (("a",), ("b", "c"), "1 different positive"),
        (("a", "b"), (), "0 different negative"),
        (texts(20_001, "p"), ("b", "c"), "more than 20,000 positive"),
        (("a", " \n"), ("b", "c"), "positive text 2: is blank"),
        (("a", "b"), ("", "c"), "negative text 1: is blank"),
        (("a", 5), ("b", "c"), "positive text 2: a text is '5', not a string"),
        (("a", None), ("b", "c"), "positive text 2: is blank"),
        (("a", "b\ud800"), ("c", "d"), "positive text 2: a text holds half"),
        (("a", "x  \u00e9"), ("c", "x e\u0301"), "both positive (text 2) and negative (text 2)"),
        ("ab", ("c", "d"), "positive is one string"),
    ],
)
def test_what_is_no_contrast_set_cannot_be_constructed(positive: tuple, negative: tuple, said: str) -> None:
    with pytest.raises(ExamplesError) as caught:
        ContrastSet(positive, negative, "mine")
    assert one_line(caught.value).startswith("mine") and said in str(caught.value)


def test_paired_texts_need_as_many_of_each_class_and_dropped_its_two_keys() -> None:
    with pytest.raises(ExamplesError, match="2 positive and 3 negative"):
        ContrastSet(("a", "b"), ("c", "d", "e"), paired=True)
    with pytest.raises(ExamplesError, match="keys blank and duplicate, not 'empty'"):
        ContrastSet(("a", "b"), ("c", "d"), dropped={"empty": 1})


def test_a_set_is_a_value_frozen_hashable_and_safe_to_copy() -> None:
    one = parse_examples("a,1\nb,1\nb,1\nc,0\nd,0\n", filename="x.csv")
    assert one == ContrastSet(("a", "b"), ("c", "d"), "x") and hash(one) == hash(
        ContrastSet(("a", "b"), ("c", "d"), "x")
    )
    copied = pickle.loads(pickle.dumps(one))
    assert dataclasses.asdict(copied) == dataclasses.asdict(one)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "y"  # pyright: ignore[reportAttributeAccessIssue]


def test_fewer_than_20_per_class_is_warned_about() -> None:
    assert ContrastSet(texts(20, "p"), texts(20, "n")).warnings == ()
    (warning,) = ContrastSet(texts(20, "p"), texts(19, "n")).warnings
    assert "20 positive and 19 negative" in warning and warning.endswith(".")


def test_a_split_is_a_seeded_partition_of_each_class() -> None:
    contrast = ContrastSet(texts(100, "p"), texts(40, "n"))
    split = contrast.split(0.25, seed=1)
    assert len(split.held_out_positive) == 25 and len(split.held_out_negative) == 10
    assert sorted(split.train_positive + split.held_out_positive) == list(range(100))
    assert sorted(split.train_negative + split.held_out_negative) == list(range(40))
    assert split == contrast.split(0.25, seed=1) != contrast.split(0.25, seed=2)


def test_a_split_keeps_pairs_together_and_unpaired_classes_apart() -> None:
    split = ContrastSet(texts(50, "p"), texts(50, "n"), paired=True).split(0.5)
    assert (split.train_positive, split.held_out_positive) == (split.train_negative, split.held_out_negative)
    split = ContrastSet(texts(50, "p"), texts(50, "n")).split(0.5)
    assert split.held_out_positive != split.held_out_negative


def test_at_most_caps_each_class_with_a_subset_of_the_same_split() -> None:
    contrast = ContrastSet(texts(100, "p"), texts(6, "n"))
    full, capped = contrast.split(0.5), contrast.split(0.5, at_most=4)
    assert len(capped.held_out_positive) == 4 and len(capped.held_out_negative) == 3
    assert set(capped.held_out_positive) < set(full.held_out_positive)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_a_split_of_two_texts_leaves_one_on_each_side(fraction: float) -> None:
    split = ContrastSet(("a", "b"), ("c", "d")).split(fraction)
    assert [len(indices) for indices in dataclasses.astuple(split)] == [1, 1, 1, 1]


@pytest.mark.parametrize("fraction, at_most", [(0, None), (1, None), (-1, None), (float("nan"), None), (0.5, 0)])
def test_a_split_that_cannot_be_is_refused(fraction: float, at_most: int | None) -> None:
    with pytest.raises(ExamplesError):
        ContrastSet(("a", "b"), ("c", "d")).split(fraction, at_most=at_most)


def test_reading_examples_needs_the_standard_library_and_our_errors_only() -> None:
    for module in (chats, columns, contrast_set, encodings, files, parsing, reading, refusing, texts_module, thrift):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not imported & {"torch", "transformers", "numpy", "pandas", "pyarrow"}
