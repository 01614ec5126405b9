"""Results as files in a folder: each whole or not there."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neurosteer.errors import UsageError


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> tuple[Path, ...]:
    """Write files by name into `folder`, which is made where it is not there; returns their paths, in order. A file
    that is there already is replaced. Raises `UsageError` where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary = folder / f".{name}.new"
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
            temporary.replace(folder / name)
    except OSError as error:
        raise UsageError(f"{str(folder)!r} could not be written ({error.strerror}); choose another folder.") from error
    return tuple(folder / name for name in contents)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table with a heading, of what each row holds under `columns`."""
    buffer = io.StringIO()
    # With the csv module's own line ends, or a lone carriage return in a text would not be quoted.
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
