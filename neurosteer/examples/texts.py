"""Single texts as they are kept, and the two classes of them."""

from neurosteer.examples.refusing import refuse, short

SIDES = ("positive", "negative")

MAX_CHARACTERS = 20_000
"""Of one text: far more than the 512 tokens that reading keeps; the rest is cut off."""


def clean_text(value: object, where: str) -> str:
    """A cell as it will be kept: at most `MAX_CHARACTERS` of it; empty if it is blank or absent."""
    return whole(value, where, "a text")[:MAX_CHARACTERS].strip().replace("\r\n", "\n").replace("\r", "\n")


def clean_prompt(value: object, where: str) -> str:
    """As `clean_text`, of what a text answers: of one that is too long the end is kept."""
    return whole(value, where, "a prompt")[-MAX_CHARACTERS:].strip().replace("\r\n", "\n").replace("\r", "\n")


def whole(value: object, where: str, what: str) -> str:
    """The string in a cell; empty if there is none. Raises `ExamplesError` for what is no string, or half of one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        refuse(where, f"{what} is {short(value)}, not a string: put it in quotes")
    text = value.strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(where, f"{what} holds half of a character (a lone surrogate): remove or retype it")
    return text
