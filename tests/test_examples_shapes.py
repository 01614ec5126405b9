"""The shapes that people's data has: which column is what, what the texts answer, in which encoding, and Parquet."""

import io
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurosteer.errors import ExamplesError
from neurosteer.examples import encodings, parquet
from neurosteer.examples.columns import Columns
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import parse_examples
from neurosteer.examples.thrift import read_struct

CHINESE = "text,label\n很好的产品,1\n我喜欢它,1\n很糟糕,0\n不喜欢,0"
JAPANESE = "text,label\nとても良い製品です,1\nアメリカ,1\nひどい,0\nデータだけ,0"


def read(data: bytes | str, filename: str = "mine.csv", **options: Any) -> ContrastSet:
    return parse_examples(data, filename=filename, **options)


def refused(data: bytes | str, filename: str = "mine.csv", **options: Any) -> str:
    with pytest.raises(ExamplesError) as caught:
        read(data, filename, **options)
    assert str(caught.value).isprintable() and str(caught.value).startswith(filename)
    return str(caught.value)


def lines(*records: object) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def chat(*contents: str) -> list[dict[str, object]]:
    return [turn(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]


def as_parquet(columns: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("yes", "no"), [("yes", "no"), ("YES", "No"), ("1", "-1"), ("1.0", "0.0"), ("1.0", "-1.0")])
def test_labels_of_other_tools_are_understood(yes: str, no: str) -> None:
    found = read(f"text,label\na,{yes}\nb,{no}\nc,{yes}\nd,{no}\n")
    assert (found.positive, found.negative) == (("a", "c"), ("b", "d"))
    assert read(f"a,{yes}\nb,{no}\nc,{yes}\nd,{no}\n") == found, "without a header too"


def test_json_numbers_with_a_point_and_below_nothing_are_labels() -> None:
    found = read(lines(*({"text": text, "label": 1.0 if text in "ab" else -1} for text in "abcd")), "x.jsonl")
    assert (found.positive, found.negative) == (("a", "b"), ("c", "d"))


def test_nought_and_minus_one_in_one_file_are_three_classes_and_refused() -> None:
    assert "row 4: the labels 0 and -1 both stand here" in refused("text,label\na,1\nb,0\nc,-1\n")


def test_any_two_labels_are_read_when_told_which_one_is_positive() -> None:
    data = "text,label\na,spam\nb,Ham\nc,spam\nd,ham\n"
    assert "row 2: the label 'spam' is unknown" in refused(data) and "--positive" in refused(data)
    found = read(data, columns=Columns(positive="SPAM"))
    assert (found.positive, found.negative) == (("a", "c"), ("b", "d"))
    assert read(data, columns=Columns(positive="ham")).positive == ("b", "d")
    swapped = read("text,label\na,1\nb,0\nc,1.0\nd,0\n", columns=Columns(positive="0.0"))
    assert swapped.positive == ("b", "d")


def test_with_a_third_label_or_without_the_positive_one_nothing_is_guessed() -> None:
    stars = "text,label\na,1\nb,2\nc,3\nd,1\n"
    said = refused(stars, columns=Columns(positive="1"))
    assert "row 4: more than two labels, '1', '2', '3': keep the rows of two of them" in said
    said = refused("text,label\na,x\nb,x\nc,x\nd,x\n", columns=Columns(positive="y"))
    assert said == "mine.csv: no row has the label 'y'; there are 'x'"


# --- columns ----------------------------------------------------------------------------------------------------------


def test_sst_2s_sentences_are_texts() -> None:
    found = read("idx\tsentence\tlabel\n0\tit's great\t1\n1\tfun , really\t1\n2\tbad\t0\n3\tawful\t0\n", "dev.tsv")
    assert (found.positive, found.negative) == (("it's great", "fun , really"), ("bad", "awful"))
    assert found.source == "dev.tsv: CSV, text, tab, columns sentence and label"


def test_pos_and_neg_are_columns_of_pairs() -> None:
    found = read("pos,neg\na b,c d\ne f,g h\n")
    assert (found.positive, found.negative, found.paired) == (("a b", "e f"), ("c d", "g h"), True)


def test_columns_are_what_they_are_said_to_be() -> None:
    data = "Review;Stars;label\ngood;5;x\nbad;1;y\nfine;5;x\npoor;1;y\n"
    found = read(data, columns=Columns(text="review", label="stars", positive="5"))
    assert (found.positive, found.negative) == (("good", "fine"), ("bad", "poor"))
    assert found.source.endswith("semicolon, columns review and stars")
    assert read(data, columns=Columns(text="REVIEW", positive="x")).positive == ("good", "fine")
    records = lines(*({"Review": text, "stars": stars} for text, stars in zip("abcd", (5, 5, 1, 1), strict=True)))
    assert read(records, "x.jsonl", columns=Columns("review", "stars", "5")).positive == ("a", "b")


def test_a_column_that_is_not_there_is_named_beside_those_there_are() -> None:
    data = "review,stars\ngood,5\nbad,1\n"
    assert refused(data, columns=Columns("reviews", "stars")) == (
        "mine.csv: there is no column 'reviews'; there are 'review', 'stars'"
    )
    assert "there is no column 'question'" in refused("text,label\na,1\n", columns=Columns(prompt="question"))
    assert "say which columns are the text and the label (--text, --label)" in refused(data)


def test_a_column_that_was_named_wins_over_pairs() -> None:
    data = "chosen,rejected,note,label\na,b,w,1\nc,d,x,1\ne,f,y,0\ng,h,z,0\n"
    assert read(data, columns=Columns(text="note")).positive == ("w", "x")


def test_excels_separator_line_is_no_row_of_text_and_keeps_the_numbers_of_rows() -> None:
    found = read("sep=;\r\ntext;label\r\na, b;1\r\nc;1\r\nd;0\r\ne;0\r\n")
    assert (found.positive, found.negative) == (("a, b", "c"), ("d", "e"))
    assert "row 4: the label 'what' is unknown" in refused('"sep=,"\ntext,label\na,1\nb,what\n')
    assert "row 1: the separator ':' is not read" in refused("sep=:\ntext:label\na:1\n")


TWO_FILES = {
    "x.csv": ("review,ask\na,p\nb,q\n", "review,ask\nc,p\nd,q\n"),
    "x.jsonl": tuple(lines(*({"review": text, "ask": "p"} for text in pair)) for pair in ("ab", "cd")),
    "x.parquet": tuple(as_parquet({"review": list(pair), "ask": ["p", "q"]}) for pair in ("ab", "cd")),
}


@pytest.mark.parametrize("filename", TWO_FILES)
def test_of_two_files_too_a_column_that_is_not_there_is_named(filename: str) -> None:
    data, negative = TWO_FILES[filename]
    both: dict[str, Any] = {"negative": negative, "negative_filename": filename}
    found = read(data, filename, columns=Columns(text="Review", prompt="ASK"), **both)
    assert (found.positive, found.negative) == (("a", "b"), ("c", "d")) and found.positive_prompts[0] == "p"
    for columns in (Columns(text="reviews"), Columns(text="review", prompt="reviews")):
        said = refused(data, filename, columns=columns, **both)
        assert said == f"{filename}: there is no column 'reviews'; there are 'review', 'ask'"


@pytest.mark.parametrize("filename", [*TWO_FILES, "x.txt"])
def test_two_files_have_no_labels_to_name(filename: str) -> None:
    data, negative = TWO_FILES.get(filename, ("a,1\nb,1\n", "c,0\nd,0\n"))
    for columns in (Columns("review", "ask"), Columns("review", positive="p"), Columns(label="label", positive="1")):
        said = refused(data, filename, columns=columns, negative=negative, negative_filename=filename)
        assert "two files have no labels, each is of one class" in said


def test_where_there_are_no_columns_none_can_be_named() -> None:
    for columns in (Columns(text="text"), Columns(prompt="ask")):
        said = refused("review,mood\na,b\n", "x.txt", columns=columns, negative="review,mood\nc,d\n")
        assert said.startswith("x.txt: plain text has no columns: leave the names of columns")
    lists = json.dumps({"positive": ["a", "b"], "negative": ["c", "d"]})
    for columns in (Columns(text="text"), Columns(prompt="ask"), Columns(positive="b")):
        assert "an object of lists has no columns" in refused(lists, "x.json", columns=columns)


# --- what is never guessed --------------------------------------------------------------------------------------------


def test_unquoted_commas_in_pairs_are_refused_and_not_read_as_the_other_class() -> None:
    said = refused("positive,negative\nGreat, thanks a lot\nLovely, really\nbad one,")
    assert said.startswith("mine.csv, row 2: a comma and a space may be part of a text: put double quotes around")
    assert "row 2" in refused("prompt,chosen,rejected\nHi, there,good\n")
    for fine in ('positive,negative\n"Great, thanks",no\n"Lovely, really",bad\n', "positive, negative\na, x\nb, y\n"):
        assert len(read(fine).positive) == 2


def test_a_row_with_a_part_missing_is_refused() -> None:
    assert "row 3: negative is empty" in refused("positive,negative\na,b\nbad one,\n")
    assert "row 3: prompt is empty" in refused("prompt,chosen,rejected\np,a,b\n,c,d\n")
    assert "row 2: rejected is empty" in refused(
        lines({"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": "c", "prompt": "q"}), "mine.jsonl"
    )


def test_texts_in_both_classes_are_dropped_on_request_and_counted() -> None:
    data = "text,label\na,1\nsame,1\nb,1\nsame,0\nc,0\nd,0\nsame,0\n"
    assert "drop such texts (--drop-conflicts)" in refused(data)
    found = read(data, drop_conflicts=True)
    assert (found.positive, found.negative) == (("a", "b"), ("c", "d"))
    assert found.dropped == {"blank": 0, "duplicate": 1, "conflicting": 2}
    assert "conflicting" not in read("text,label\na,1\nb,1\nc,0\nd,0\n", drop_conflicts=True).dropped


def test_of_pairs_the_whole_row_goes_so_that_the_others_stay_pairs() -> None:
    found = read("chosen,rejected\na,b\nsame,x\nc,same\nd,d\ne,f\n", drop_conflicts=True)
    assert (found.positive, found.negative, found.paired) == (("a", "e"), ("b", "f"), True)
    assert found.dropped["conflicting"] == 6


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 400])
@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [(CHINESE, "gbk", "GBK"), (CHINESE, "gb18030", "GBK"), (JAPANESE, "shift_jis", "Shift-JIS")],
)
def test_gbk_and_shift_jis_are_read_as_what_they_are(text: str, codec: str, name: str, times: int) -> None:
    header, *rows = text.split("\n")
    more = [f"{place}{row}" for place in range(times) for row in rows]
    data = "\n".join([header, *more])
    found = read(data.encode(codec))
    assert found.sha256 == read(data).sha256 and found.source == f"mine.csv: CSV, {name}, comma, columns text and label"


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("очень хорошо,1\nотлично,1\nплохо,0\nужасно,0", "cp1251"),
        ("очень хорошо,1\nотлично,1\nплохо,0\nужасно,0", "koi8_r"),
        ("정말 좋아요,1\n최고예요,1\n별로예요,0\n싫어요,0", "euc_kr"),
        ("很好的產品,1\n我喜歡它,1\n很糟糕,0\n不喜歡,0", "big5"),
        ("とても良い,1\n大好きです,1\nひどい,0\nだめ,0", "euc_jp"),
        ("bardzo się śpi,1\nłódź żółta,1\nźle,0\nokropnie ćma,0", "cp1250"),
        ("πολύ καλό,1\nτέλειο,1\nκακό,0\nχάλια,0", "cp1253"),
        ("çok güzel bir şey,1\nışık,1\nkötü,0\nberbat,0", "cp1254"),
    ],
)
def test_text_in_another_encoding_is_refused_and_never_read_as_windows_1252(text: str, codec: str) -> None:
    assert "save the file as UTF-8" in refused(f"text,label\n{text}".encode(codec))


@pytest.mark.parametrize(
    "text",
    [
        "¿Qué tal? ¡Muy bien!,1\nniño pequeño,1\nmalo,0\nbasura 3ª,0",
        "« Très bien » créée à l’été,1\nœuvre,1\nmauvais,0\nnul — vraiment,0",
        "schön und süß,1\n„Größe“,1\nÜbel,0\n20 °C,0",
        "não é bom,1\nação,1\nárvore,0\npão,0",
        "så är det,1\nkøbe øl,1\nå,0\nhæ,0",
    ],
)
def test_western_text_stays_windows_1252(text: str) -> None:
    found = read(f"text,label\n{text}".encode("cp1252"))
    assert "Windows-1252" in found.source and found.sha256 == read(f"text,label\n{text}").sha256


def test_a_gbk_file_that_is_damaged_behind_its_sample_is_refused_with_the_place() -> None:
    data = CHINESE.encode("gbk") + b"\n" + "\n".join(f"{n}很好的产品,1" for n in range(4000)).encode("gbk")
    assert f"starts as GBK but is damaged at byte {len(data)}" in refused(data + b"\xff\xff,1")


@pytest.mark.parametrize(
    "data", [b"\xe9" * 20_000_000, b"a\xe9" * 10_000_000, b"\xb0\xa1" * 10_000_000, b"\x83\x41\n" * 6_000_000]
)
def test_finding_the_encoding_of_twenty_megabytes_costs_little(data: bytes) -> None:
    before = time.process_time()
    refused(data)
    assert time.process_time() - before < 4


@pytest.mark.parametrize(
    "data",
    [b"a" * 20_000_000 + b"\n\xff\xfe", (b"a" * 820 + b"\r\n") * 24_000 + b"\xe9", b"\xe9\n" + b"a" * 20_000_000],
)
def test_long_lines_of_ascii_before_the_first_accent_cost_little(data: bytes) -> None:
    before = time.process_time()
    encodings._sample(data)
    assert time.process_time() - before < 3


def test_only_the_lines_with_more_than_ascii_are_looked_at_for_the_encoding() -> None:
    lines = b"plain\n\xe9t\xe9\r\nplain\r\n\r\nla caf\xe9 l\xe0\rplain\n\xe0"
    assert encodings._sample(lines) == b"\xe9t\xe9\nla caf\xe9 l\xe0\n\xe0"
    rows = "".join(f"{'plain words ' * 68},1\nrow {n},0\n" for n in range(150))
    data = f"text,label\n{rows}un été,1\nd’été,0\n"
    assert read(data.encode("cp1252")).sha256 == read(data).sha256


def test_a_spreadsheet_is_told_what_it_is_and_what_to_save_it_as() -> None:
    for data in (b"PK\x03\x04\x14\0" + b"xl/workbook.xml" + b"\0" * 9, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0"):
        said = refused(data, "data.xlsx")
        assert said.startswith("data.xlsx: is a spreadsheet (Excel or OpenDocument): save its sheet as CSV (UTF-8)")


# --- plain text -------------------------------------------------------------------------------------------------------


def test_paragraphs_parted_by_blank_lines_are_one_text_each() -> None:
    found = read("One\ntwo.\n\n \nThree.\n\nFour\nfive\n", "p.txt", negative="a\nb\n", negative_filename="n.txt")
    assert (found.positive, found.negative) == (("One\ntwo.", "Three.", "Four\nfive"), ("a", "b"))
    assert found.source == "p.txt and n.txt: paragraphs and lines, text"
    assert read("a\n\nb\n", "p.txt", negative="c\nd").positive == ("a", "b"), "lines with blank ones between are lines"
    assert read("a\nb\nc", "p.txt", negative="c d\nd").positive == ("a", "b", "c")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_preferences_are_pairs_that_answer_their_prompt() -> None:
    data = lines(*({"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(2)))
    found = read(data, "dpo.jsonl")
    assert (found.positive, found.negative, found.paired) == (("good 0", "good 1"), ("bad 0", "bad 1"), True)
    assert found.positive_prompts == found.negative_prompts == ("p0", "p1")
    assert found.prompts == ["p0", "p1", "p0", "p1"]
    assert found.source == "dpo.jsonl: JSON lines, text, keys chosen, rejected and prompt"
    table = 'prompt,chosen,rejected\np0,good 0,bad 0\np1,good 1,"bad 1"\n'
    assert read(table).sha256 == found.sha256


def test_preferences_between_conversations_answer_what_both_begin_with() -> None:
    record = {
        "prompt": "and?",
        "chosen": chat("hi", "hello", "and?", "yes"),
        "rejected": chat("hi", "hello", "and?", "no"),
    }
    other = {"prompt": "q", "chosen": chat("q", "A"), "rejected": chat("q", "B")}
    found = read(lines(record, other), "dpo.jsonl")
    before = (("user", "hi"), ("assistant", "hello"), ("user", "and?"))
    assert (found.positive, found.negative) == (("yes", "A"), ("no", "B"))
    assert found.positive_prompts == found.negative_prompts == (before, "q")
    assert found.prompts is not None and found.prompts[0] == chat("hi", "hello", "and?")
    trl = {"prompt": chat("q"), "chosen": [turn("assistant", "A")], "rejected": [turn("assistant", "B")]}
    assert read(lines(record, trl), "dpo.jsonl") == found


def test_a_b_questions_of_anthropic_and_caa_are_pairs_that_may_repeat_their_answers() -> None:
    record = {"answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    found = read(json.dumps([{"question": f"Q{n}?", **record} for n in range(3)]), "sycophancy.json")
    assert (found.positive, found.negative) == (("(A)",) * 3, ("(B)",) * 3)
    assert found.positive_prompts == found.negative_prompts == ("Q0?", "Q1?", "Q2?")
    assert found.paired and found.dropped["duplicate"] == 0


def test_chats_are_read_as_their_last_answer_to_what_came_before() -> None:
    system = turn("system", "Be brief.")
    rows = [
        {"messages": [system, *chat("hi", "hello")], "label": "1"},
        {"messages": chat("a", "b", "c", "d"), "label": 1},
        {"messages": chat("q", "x"), "label": 0},
        {
            "messages": [
                turn("user", [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
                turn("assistant", "y"),
            ],
            "label": 0,
        },
    ]
    found = read(lines(*rows), "chats.jsonl")
    assert (found.positive, found.negative) == (("hello", "d"), ("x", "y"))
    assert found.positive_prompts[0] == (("system", "Be brief."), ("user", "hi"))
    assert found.negative_prompts == ("q", "in parts"), "a single request is its text"


def test_two_files_of_chats_are_a_class_each() -> None:
    kind, rude = (lines(*({"messages": chat(f"q{n}", f"{word} {n}")} for n in range(2))) for word in ("kind", "rude"))
    found = read(kind, "kind.jsonl", negative=rude, negative_filename="rude.jsonl")
    assert (found.positive, found.negative) == (("kind 0", "kind 1"), ("rude 0", "rude 1"))
    assert found.positive_prompts == ("q0", "q1") and not found.paired
    assert found.source == "kind.jsonl and rude.jsonl: columns messages, text"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (chat("hi"), "the last of the messages is of the user, not of the assistant"),
        ([turn("bot", "x")], "the role of a message is 'bot': use system, user, assistant"),
        ([turn("user", ""), turn("assistant", "x")], "a message of the user is empty"),
        ([turn("user", [{"type": "image"}]), turn("assistant", "x")], "holds more than text"),
        (chat("a", "b") * 60, "120 messages where 100 are read"),
        ([turn("user", 5), turn("assistant", "x")], "a message is '5', not a string"),
        ([turn("user", "a"), "b"], "a message is 'b'"),
    ],
)
def test_what_is_no_conversation_with_an_answer_is_refused_with_its_row(messages: object, said: str) -> None:
    found = refused(lines({}, {"messages": messages, "label": 1}), "x.jsonl")
    assert found.startswith("x.jsonl, row 2: ") and said in found


def test_the_same_answer_to_two_prompts_is_two_texts() -> None:
    found = read("prompt,text,label\np,yes,1\nq,yes,1\np,no,0\nq,no,0\nr,yes,0\n")
    assert found.positive == ("yes", "yes") and found.negative == ("no", "no", "yes")
    assert "is both positive (row 2) and negative (row 4)" in refused("prompt,text,label\np,a,1\nq,a,1\np,a,0\nq,b,0\n")
    assert read("question,text,label\np,a,1\nq,b,1\np,c,0\nq,d,0\n").positive_prompts == ("p", "q")
    other = read("ask,text,label\np,a,1\nq,b,1\np,c,0\nq,d,0\n", columns=Columns(prompt="ASK"))
    assert other.positive_prompts == ("p", "q")


def test_prompts_are_part_of_the_hash_and_follow_their_texts_through_a_split() -> None:
    texts = {"positive": [f"p{n}" for n in range(10)], "negative": [f"n{n}" for n in range(10)]}
    plain = read(json.dumps(texts), "x.json")
    asked = read(
        json.dumps(
            {
                **texts,
                "positive_prompts": [f"to p{n}" for n in range(10)],
                "negative_prompts": [f"to n{n}" for n in range(10)],
            }
        ),
        "x.json",
    )
    assert plain.sha256 == ContrastSet(plain.positive, plain.negative).sha256 != asked.sha256
    assert plain.prompts is None and asked.source.endswith(
        "lists positive, negative, positive_prompts and negative_prompts"
    )
    kept, held = asked.parts(0.3, seed=1)
    assert kept.positive == plain.parts(0.3, seed=1)[0].positive
    for part in (kept, held):
        assert part.positive_prompts == tuple(f"to {text}" for text in part.positive)
        assert part.negative_prompts == tuple(f"to {text}" for text in part.negative)


def test_every_text_has_a_prompt_or_none_has() -> None:
    both = ("a", "b"), ("c", "d")
    assert "1 positive_prompts for 2 texts" in _refused_set(*both, positive_prompts=("p",), negative_prompts=("p", "q"))
    assert "0 negative_prompts for 2 texts" in _refused_set(*both, positive_prompts=("p", "q"))
    assert "positive prompt 2: is blank" in _refused_set(
        *both, positive_prompts=("p", " "), negative_prompts=("p", "q")
    )
    assert "a prompt is '5'" in _refused_set(*both, positive_prompts=("p", 5), negative_prompts=("p", "q"))
    odd = refused(
        lines(
            {"messages": chat("q", "a"), "label": 1},
            {"messages": [turn("assistant", "b")], "label": 0},
            {"messages": chat("r", "c"), "label": 1},
            {"messages": chat("r", "d"), "label": 0},
        ),
        "x.jsonl",
    )
    assert "row 2: the text answers nothing, others do" in odd
    short = {"positive": ["a", "b"], "negative": ["c", "d"], "positive_prompts": ["p"]}
    assert "positive_prompts has 1 for 2 texts" in refused(json.dumps(short), "x.json")


def _refused_set(positive: Any, negative: Any, **options: Any) -> str:
    with pytest.raises(ExamplesError) as caught:
        ContrastSet(positive, negative, **options)
    return str(caught.value)


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli"])
def test_parquet_is_read_by_the_same_names(compression: str) -> None:
    data = as_parquet(
        {"idx": [1, 2, 3, 4], "sentence": ["a", "b", "c", "d"], "Label": [1, 0, 1, 0]}, compression=compression
    )
    found = read(data, "train.parquet")
    assert (found.positive, found.negative) == (("a", "c"), ("b", "d"))
    assert found.source == "train.parquet: Parquet, columns sentence and label"
    assert "row 1: the label '2' is unknown" in refused(as_parquet({"text": ["a"], "label": [2]}), "x")
    assert "found columns 'a', 'b'" in refused(as_parquet({"a": ["a"], "b": [2]}), "x")
    assert "a text is a bytes" in refused(as_parquet({"text": [b"a"], "label": [1]}), "x")


def test_parquet_holds_chats_and_preferences() -> None:
    answers = {"chosen": [chat("q", "A"), chat("r", "B")], "rejected": [chat("q", "C"), chat("r", "D")]}
    found = read(as_parquet({"prompt": ["q", "r"], **answers}), "x.parquet")
    assert (found.positive, found.negative, found.positive_prompts) == (("A", "B"), ("C", "D"), ("q", "r"))
    both = [as_parquet({"messages": answers[side]}) for side in answers]
    assert read(both[0], "p.parquet", negative=both[1], negative_filename="n.parquet").positive == ("A", "B")


def test_the_numbers_of_classes_mean_what_the_hub_notes_beside_them() -> None:
    table = pa.table({"text": ["a", "b", "c", "d"], "label": [0, 0, 1, 1]})

    def noted(*names: str) -> bytes:
        feature = {"names": list(names), "_type": "ClassLabel"}
        metadata = {b"huggingface": json.dumps({"info": {"features": {"label": feature}}}).encode()}
        out = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(metadata), out)
        return out.getvalue()

    assert read(noted("pos", "neg"), "x").positive == ("a", "b"), "0 is the positive class here"
    assert read(noted("neg", "pos"), "x").positive == ("c", "d")
    assert "the label 'ham' is unknown" in refused(noted("ham", "spam"), "x")
    assert read(noted("ham", "spam"), "x", columns=Columns(positive="spam")).positive == ("c", "d")


def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = as_parquet({"text": ["x" * 70_000_000, "y"], "label": [1, 0]}, compression="zstd", use_dictionary=False)
    assert len(long) < 100_000
    often = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000 + [1], pa.int32()), ["x" * 1_000_000, "y"])
    columns = {"text": often, "label": [1] * 100_001}
    shared, plain = (as_parquet(columns, compression="zstd", store_schema=stored) for stored in (True, False))
    assert len(shared) < 200_000
    opened = parquet._rows
    rows: list[int] = []

    def counted(*given: Any) -> Any:
        for one in opened(*given):
            rows.append(1)
            yield one

    monkeypatch.setattr(parquet, "_rows", counted)
    assert "unpacks to more than 64 MB" in refused(long, "x.parquet") and not rows
    for data in (shared, plain):
        rows.clear()
        assert "unpacks to more than 64 MB" in refused(data, "x.parquet") and len(rows) < 3_000
    assert pa.default_memory_pool().max_memory() < 600_000_000


def test_what_a_parquet_file_claims_of_its_pages_is_not_believed() -> None:
    data = as_parquet({"text": ["x" * 70_000_000, "y"], "label": [1, 0]}, compression="zstd", use_dictionary=False)
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    truth = _varint(2 * read_struct(footer, 0)[0][4][0][1][0][3][6])
    assert truth in footer
    lying = data[: -8 - size] + footer.replace(truth, _varint(2 * 100, len(truth))) + data[-8:]
    assert pq.ParquetFile(io.BytesIO(lying)).metadata.row_group(0).column(0).total_uncompressed_size == 100
    assert "unpacks to more than 64 MB" in refused(lying, "x.parquet")


def _varint(value: int, length: int = 0) -> bytes:
    out = []
    while value > 0x7F or len(out) < length - 1:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_a_run_of_absent_values_and_deep_or_wide_columns_are_refused() -> None:
    absent = pa.array([[None] * 5_000_000], type=pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})))
    data = as_parquet({"messages": absent, "label": [1]})
    assert len(data) < 10_000 and "unpacks to more than 64 MB" in refused(data, "x.parquet")
    deep = pa.string()
    for _ in range(14):
        deep = pa.list_(deep)
    assert "too deeply nested" in refused(as_parquet({"text": pa.array([None], type=deep), "label": [1]}), "x.parquet")
    assert "more than 2,000 columns" in refused(as_parquet({f"c{n}": [1] for n in range(2100)}), "x.parquet")
    assert "more than 200,000 rows" in refused(as_parquet({"text": ["a"] * 200_001, "label": [1] * 200_001}), "x")


def test_a_damaged_parquet_file_is_refused_in_one_line() -> None:
    data = as_parquet({"text": ["a", "b", "c", "d"] * 20, "label": [1, 1, 0, 0] * 20})
    for end in range(4, len(data), 7):
        assert "fetch it again" in refused(data[:end], "x.parquet")
    for place in range(4, len(data)):
        for byte in (0, 0x7F, 0xFF):
            damaged = data[:place] + bytes([byte]) + data[place + 1 :]
            try:
                read(damaged, "x.parquet")
            except ExamplesError as error:
                assert str(error).isprintable()


def chunks(*sizes: int, at: int = 4, path: tuple[bytes, ...] = (b"text",)) -> dict[int, Any]:
    """A description of row groups with a column of texts each, all of which begin at the same place."""
    return {4: [{1: [{3: {3: list(path), 7: size, 9: at}}]} for size in sizes]}


NOTHING = b"\x15\0\x15\0\x15\0\x2c\x15\0\0\0"  # the header of a page of no values, in no bytes


def pages_refused(data: bytes, footer: dict[int, Any]) -> str:
    before = time.process_time()
    with pytest.raises(ExamplesError) as caught:
        parquet._check_pages(data, footer, {b"text"}, "x")
    assert time.process_time() - before < 6
    return str(caught.value)


def test_pages_of_nothing_and_long_headers_are_counted_over_the_whole_file() -> None:
    many = b"PAR1" + NOTHING * 1_500_000
    assert "more than 50,000 pages" in pages_refused(many, chunks(len(many) - 4))
    assert "more than 50,000 pages" in pages_refused(many, chunks(*[len(many) // 300] * 300))
    noted = NOTHING[:-1] + b"\x99\xf5\xbf\x03" + b"\1" * 0xDFF5 + b"\0"  # and a list of nothing in particular
    long = b"PAR1" + noted * 200
    assert "more than 50,000 pages" in pages_refused(long, chunks(len(long) - 4))
    longer = b"PAR1" + NOTHING[:-1] + b"\x99\xf5\xff\xff\x04" + b"\1" * 12_000_000
    assert "a page ends in the middle" in pages_refused(longer, chunks(len(longer) - 4))
    few = b"PAR1" + NOTHING * 40_000
    assert parquet._check_pages(few, chunks(len(few) - 4), {b"text"}, "x") == 0


def test_row_groups_that_lie_at_the_same_place_are_refused() -> None:
    data = b"PAR1" + NOTHING * 40_000
    for sizes in ([len(data) - 4] * 2_000, [1_000_000, -1_000_000], [len(data) + 1]):
        assert "a page lies where another one does" in pages_refused(data, chunks(*sizes))
    assert "ends in the middle" in pages_refused(data, chunks(*[5] * 1_000)), "a header ends where its column does"


def test_a_column_within_a_column_is_looked_at_where_its_dotted_name_is_anothers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet, "_rows", lambda *_: pytest.fail("unpacked before it was looked at"))
    inner = pa.array([{"b": "x" * 70_000_000}, {"b": "y"}])
    data = as_parquet({"a": inner, "a.b": ["c", "d"], "label": [1, 0]}, compression="zstd", use_dictionary=False)
    assert "unpacks to more than 64 MB" in refused(data, "x.parquet", columns=Columns(text="a.b"))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1, 0], pa.date32()),
        pa.array([2**62, 0], pa.timestamp("us")),
        pa.array([2**62, 0], pa.timestamp("ms")),
        pa.array([1, 0], pa.timestamp("ns")),
        pa.array([0, 1], pa.timestamp("us", tz="No/Where")),
        pa.array([2**62, 0], pa.duration("s")),
        pa.array([[{"content": 2**31 - 1}]] * 2, pa.list_(pa.struct({"content": pa.date32()}))),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("at", ["text", "label", "prompt"])
def test_values_that_python_has_no_room_for_are_refused_in_one_line(at: str, column: Any) -> None:
    columns = {"text": ["a", "b"], "label": ["1", "0"], "prompt": ["p", "q"], at: column}
    assert "\n" not in refused(as_parquet(columns), "x.parquet")


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "a description of zeros": lambda n: b"PAR1" + b"\0" * n + (n).to_bytes(4, "little") + b"PAR1",
    "lists in lists": lambda n: b"PAR1" + b"\x19" * n + (n).to_bytes(4, "little") + b"PAR1",
    "a long list": lambda n: b"PAR1" + b"\x29\xf3\xff\xff\x3f" + b"\1" * n + (n + 5).to_bytes(4, "little") + b"PAR1",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_description_costs_little_time_and_memory(what: str) -> None:
    before = time.process_time()
    refused(HOSTILE[what](1_000_000), "x.parquet")
    assert time.process_time() - before < 5
    tracemalloc.start()
    refused(HOSTILE[what](50_000), "x.parquet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 50_000
