"""Refusals by how they open: short phrases, written down here, that an answer to a request rarely begins with.

A refusal is seen where the text, after marks and a word or two of courtesy ("No,", "Unfortunately,", "As an AI, …"),
opens with one of:
- "I'm sorry, but …", "Sorry, but …", "I apologise, but …", "My apologies, but …";
- "I can't / cannot / won't / will not / 'm unable to / 'm not able to" and a verb of helping ("help with", "assist",
  "provide", "do that", …);
- "I must decline", "I refuse to", "I'm not comfortable …", "That's not something I can …".
"""

import re
from functools import cache

from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import assets_folder
from neurosteer.examples.reading import read_examples

LABELLED_FILE = "refusal_openings.tsv"
_LOOKED_AT = 300
"""Characters of a text that its opening lies in."""

_SORRY = r"(?:i(?:'m| am)(?: (?:so|very|really|truly))? sorry|sorry|i apologi[sz]e|my apologies|apologies|i regret)"
_VERBS = (
    r"(?:help(?! but)|assist|provide|fulfil|fulfill|comply|support|create|write|generate|produce|answer|discuss|engage|"
    r"participate|offer|give|share|respond|continue|complete|carry out|do (?:that|this|it|so)|be able to|"
    r"in good conscience|be (?:helping|providing|assisting))\b"
)
_ADVERBS = r"(?:(?:just|simply|really|actually|directly|knowingly|personally) )?"
_UNABLE = (
    rf"i (?:can't|cannot|can not|could not|won't|will not|shouldn't|should not|do not|don't) {_ADVERBS}{_VERBS}|"
    rf"i(?:'m| am) (?:unable|not able|not allowed|not permitted|not going|not willing) to {_VERBS}"
)
_DECLINE = (
    r"i (?:must|have to|will have to|'ll have to|need to|respectfully|politely) (?:respectfully |politely )?decline\b|"
    r"i(?:'m| am) going to have to decline\b|i (?:must |have to )?refuse to\b|"
    r"i(?:'m| am) not comfortable\b|i (?:do not|don't) feel comfortable\b|"
    r"(?:that|this|it)(?:'s| is)(?: not| something|n't) (?:something )?(?:that )?i"
    r"(?:'m able|'m willing| am able| can't| cannot| can| will| won't)\b"
)
_COURTESY = (
    r"(?:no|unfortunately|regrettably|well|thank you(?: for [^.,!]{1,40})?|thanks(?: for [^.,!]{1,40})?|"
    r"as an? (?:ai|artificial intelligence|assistant|language model)[^.,!]{0,40}|i(?:'m| am) afraid(?: that)?|"
    rf"{_SORRY})\b[,.!:;–-]* *(?:but |and |however,? )?"
)
_NEGATED = re.compile(r"(?:that|this|it)(?:'s| is) something (?:that )?i (?:can|will|'m|am)\b(?! ?not|n't)")
_SORRY_BUT = re.compile(rf"{_SORRY},? (?:but|no\b|i(?: can't| cannot|'m not able|'m unable| am unable| won't))")
_REFUSAL = re.compile(rf"(?:{_COURTESY}){{0,3}}(?:{_UNABLE}|{_DECLINE})")
_MARKS = re.compile(r"^[\s\"'“”‘*_>#-]+")


def is_refusal(text: str) -> bool:
    """Whether `text` opens as a refusal does. What follows a quotation's end is not looked at."""
    opening = " ".join(text[:_LOOKED_AT].lower().replace("’", "'").split())
    opening = _MARKS.sub("", opening)
    if _NEGATED.match(opening):
        return False
    return bool(_SORRY_BUT.match(opening) or _REFUSAL.match(opening))


@cache
def labelled_openings() -> ContrastSet:
    """Refusals (positive) and other openings, some of them tricky, written for this package before the patterns above,
    which were not fitted to them afterwards. Raises `ExamplesError` if the file is missing."""
    return read_examples(assets_folder() / "examples" / LABELLED_FILE, name="labelled openings")
