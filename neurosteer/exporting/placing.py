"""Where an export is written: whole or not at all, and never over what is no export."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neurosteer.errors import ArtifactError
from neurosteer.text import error_line

RECORD_FILE = "neurosteer-export.json"
"""What every exported folder holds beside the files of its format: what it is an export of."""


def check_place(place: str | Path, *, folder: bool, is_ours: Callable[[Path], bool]) -> Path:
    """The absolute path of an export: not there yet, an empty folder, or an export of the same kind, which `is_ours`
    tells. Raises `ArtifactError`."""
    try:
        path = Path(place).expanduser().resolve()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, NUL in it, an unknown ~user
        raise ArtifactError(f"{str(place)[:100]!r} is no path ({error_line(error)}); choose another --out.") from error
    if not path.name:
        raise ArtifactError(
            f"{str(place)!r} cannot hold an export; name a {'folder' if folder else 'file'} of its own."
        )
    if exists and path.is_dir() != folder:
        found, wanted = ("file", "folder") if folder else ("folder", "file")
        raise ArtifactError(f"{str(path)!r} is a {found}, and this format is a {wanted}; choose another --out.")
    empty = exists and folder and not any(path.iterdir())
    if exists and not empty and not is_ours(path):
        raise ArtifactError(f"{str(path)!r} exists and is no export of this format; choose another --out.")
    return path


@contextmanager
def placed(place: Path) -> Iterator[Path]:
    """A path beside `place` to write to, which takes its name when the block ends well and is removed when it fails.

    Raises `ArtifactError` where nothing can be written there.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name[:80]}-"))
        try:
            written = beside / "new"
            yield written
            _replace(written, place, beside / "previous")
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"{str(place)!r} could not be written ({error.strerror or error}); nothing was changed."
        ) from error


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Say in an exported folder what it is an export of."""
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Mapping[str, Any]:
    """What `write_record` wrote; empty where it did not."""
    try:
        found = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(new: Path, place: Path, previous: Path) -> None:
    for path in (new, *new.rglob("*")) if new.is_dir() else (new,):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file():
            with path.open("rb") as opened:
                os.fsync(opened.fileno())
    if not place.is_dir():
        new.replace(place)
        return
    place.rename(previous)
    try:
        new.rename(place)
    except OSError:
        previous.rename(place)
        raise
