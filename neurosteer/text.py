"""Text made fit for a message: on one line and not too long."""


def shown(value: object, limit: int = 60) -> str:
    """A value as it would be written in Python, cut to `limit` characters."""
    return cut(repr(value), limit)


def one_line(value: object, limit: int = 300) -> str:
    """`value` as text (an error's message), every run of white space as one space, cut to `limit` characters."""
    return cut(" ".join(str(value).split()), limit)


def cut(text: str, limit: int) -> str:
    """`text`, or its first characters and an ellipsis: `limit` characters at most."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
