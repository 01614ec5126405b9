"""From bytes to text: which encoding a file is in. What cannot be told for sure is refused, never guessed."""

import codecs
import re

from neurosteer.examples.refusing import MAX_BYTES, TOO_LARGE, refuse

_SAMPLE_BYTES = 16_384
_CLOSEST = 0.03  # two encodings whose text is this much alike in disorder cannot be told apart
_CANDIDATES = (
    "gb18030", "cp932", "big5", "cp949", "euc_jp", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r",
    "tis_620",
)  # fmt: skip
_IN_WORDS = {"gb18030": "GBK", "cp932": "Shift-JIS"}
_RUNS = re.compile(rb"[\x80-\xff]+")
_LINE_END = re.compile(rb"[\n\r]")
_WESTERN = re.compile("[À-ÏÑ-Üß-ïñ-üÿŒœŠšŽžŸ‘’‚“”„‹›«»–—…•€£¢¥§°·´¨¸¿¡©®™²³¹ªºµ¼½¾×÷±\xa0\xad]")
_SIGN_IN_A_WORD = re.compile("[A-Za-zÀ-ÿ][¢£¥§°´¨¸¿¡©®²³¹ªºµ¼½¾×÷±¦¤][A-Za-zÀ-ÿ]")
_OFTEN_CHINESE = re.compile("[的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得好很没]")
_KANA = re.compile("[\u3041-\u30ff]")
_EXCEL = (b"xl/workbook", b"opendocument.spreadsheet")
_OLD_EXCEL = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def decode(data: bytes | str, file: str) -> tuple[str, str]:
    """The text, with line feeds as its only line ends, and its encoding in words.

    Raises `ExamplesError` for more than 20 MB, what is no text, and text whose encoding is not clear.
    """
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
    _refuse_spreadsheet(data, file)
    if b"\0" in data:
        return _decode_utf16_without_bom(data) or "\0", "UTF-16"
    try:
        return data.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError:
        return _decode_8_bit(data, file)


def _refuse_spreadsheet(data: bytes, file: str) -> None:
    if data.startswith(_OLD_EXCEL) or (data.startswith(b"PK\x03\x04") and any(mark in data for mark in _EXCEL)):
        refuse(file, "is a spreadsheet (Excel or OpenDocument): save its sheet as CSV (UTF-8) there, and give that")


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


def _decode_8_bit(data: bytes, file: str) -> tuple[str, str]:
    sample = _sample(data)
    if _is_western(sample):
        codec, name = "cp1252", "Windows-1252"
    else:
        codec = _other(sample)
        name = _IN_WORDS.get(codec, "")
    if not name:
        seems = f"seems to be {codec.replace('_', '-').upper()}, which is not read" if codec else "is not clear"
        refuse(file, f"its encoding {seems}: save the file as UTF-8")
    try:
        return data.decode(codec), name
    except UnicodeDecodeError as error:
        refuse(file, f"starts as {name} but is damaged at byte {error.start}: save the file as UTF-8")


def _sample(data: bytes) -> bytes:
    """The beginnings of lines that hold more than ASCII; cut at line ends and commas, which are part of no character of
    any encoding told apart here."""
    found, size, at = [], 0, 0
    while size < _SAMPLE_BYTES and (high := _RUNS.search(data, at)):
        start = max(at, data.rfind(b"\n", at, high.start()) + 1, data.rfind(b"\r", at, high.start()) + 1)
        end = _LINE_END.search(data, high.end())
        at = end.start() if end else len(data)
        found.append(data[start : min(at, start + _SAMPLE_BYTES - size)])
        size += len(found[-1]) + 1
    sample = b"\n".join(found)
    return sample if size < _SAMPLE_BYTES else re.sub(rb"(?<=[,\n])[^,\n]*\Z", b"", sample)


def _is_western(sample: bytes) -> bool:
    """Whether bytes beyond ASCII stand as they do in the languages of Western Europe: mostly one by one between ASCII
    letters, as letters with accents and as typographic marks. Characters of two bytes, and other alphabets, come in
    runs, or are signs in the middle of words when they are read so. The letters of Icelandic alone do not count: they
    stand where Turkish has its own."""
    runs = _RUNS.findall(sample)
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        return False
    high = sum(map(len, runs))
    single = sum(len(run) == 1 for run in runs)
    western, odd = len(_WESTERN.findall(text)), len(_SIGN_IN_A_WORD.findall(text))
    return bool(runs) and 2 * single >= len(runs) and 20 * western >= 19 * high and 50 * odd <= high


def _other(sample: bytes) -> str:
    """The codec of a text in another script; empty where two are alike, or it holds nothing typical of its language."""
    from charset_normalizer import from_bytes

    found = sorted(from_bytes(sample, cp_isolation=list(_CANDIDATES)) if sample else (), key=lambda match: match.chaos)
    if not found:
        return ""
    codec = found[0].encoding
    text = "".join(character for character in sample.decode(codec, "replace") if character > "\x7f")
    if codec == "gb18030" and 10 * len(text.encode("gb2312", "ignore")) < 9 * len(text.encode("gb18030", "ignore")):
        return ""
    if codec == "cp932" and 10 * len(_KANA.findall(text)) < len(text):
        return ""
    if codec == "gb18030" and 10 * len(_OFTEN_CHINESE.findall(text)) >= len(text):
        return codec
    return codec if len(found) == 1 or found[1].chaos - found[0].chaos >= _CLOSEST else ""
