"""Text made fit for a message: on one line and not too long."""


def shown(value: object, limit: int = 60) -> str:
    """A value as it would be written in Python, cut to `limit` characters."""
    return cut(repr(value), limit)


def one_line(value: object, limit: int = 300) -> str:
    """`value` as text (an error's message) on one line, cut to `limit` characters."""
    return cut(flat(value), limit)


def flat(value: object) -> str:
    """`value` as text on one line, however long: every run of white space as one space, nothing a terminal acts on."""
    return " ".join(printable(str(value)).split())


def printable(text: str) -> str:
    """`text` with a space for every character that a terminal would act on, line feeds among them."""
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


def error_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line and not too long."""
    return one_line(error, 200) or type(error).__name__


def quoted(token: str) -> str:
    """A token in quotes, with what cannot be seen in it written out."""
    return repr(token) if token.isprintable() else ascii(token)


def cut(text: str, limit: int) -> str:
    """`text`, or its first characters and an ellipsis: `limit` characters at most."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
