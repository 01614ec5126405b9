"""What is wrong with a file of examples, said in one line that names the file, the row and the remedy."""

from collections.abc import Collection
from typing import NoReturn

from neurosteer.errors import ExamplesError
from neurosteer.text import cut, printable

MAX_BYTES = 20 * 1024 * 1024
MAX_ROWS = 200_000
MAX_COLUMNS = 2_000
TOO_LARGE = f"larger than {MAX_BYTES // 1024**2} MB: keep fewer or shorter texts"
TOO_MANY_ROWS = f"more than {MAX_ROWS:,} rows: keep fewer, and leave blank ones out"


def refuse(where: str, problem: str) -> NoReturn:
    """Raise, with anything that would break the line or a terminal (line ends, half characters) blanked out."""
    raise ExamplesError(printable(f"{where}: {problem}"))


def short(value: object) -> str:
    """A value for a message. Containers by their type only: writing out a deeply nested one can overflow the stack."""
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    return repr(cut(" ".join(str(value).split()), 40))


def listed(names: Collection[str]) -> str:
    """Names for a message."""
    shown = ", ".join(short(name) for name in list(names)[:8])
    return (shown or "none") + (", …" if len(names) > 8 else "")
