"""A visitor's artifacts: kept in the page's state by a label, and offered as zip files.

A released artifact's label is its name and a pulled one's the reference it was pulled by; those can be shared as they
are. What a visitor built or uploaded has a name, numbered where that is taken.
"""

import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.examples.files import vectors_folder
from neurosteer.models.catalog import find_model
from neurosteer.ui.jobs import new_folder

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact

Shelf = Mapping[str, "Artifact"]
RELEASED, PULLED, OWN = "released", "pulled", "mine"
MOST_ARTIFACTS, MOST_BYTES = 16, 32 << 20
"""What a visitor's shelf holds beside the released artifacts, which all visitors share."""

_zips: "weakref.WeakKeyDictionary[Artifact, Path]" = weakref.WeakKeyDictionary()
_zips_lock = threading.Lock()


@cache
def released() -> dict[str, "Artifact"]:
    """The artifacts that come with NeuroSteer, by name; those that cannot be read are left out."""
    from neurosteer.artifacts.storage import is_artifact, load

    found, folder = {}, vectors_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_artifact(path):
            try:
                found[path.name] = load(path)
            except NeuroSteerError:
                continue
    return found


def released_for(model: str) -> dict[str, "Artifact"]:
    """Those of the released artifacts that were made on the model of that name; it need not be loaded."""
    wanted = _catalog_name(model)
    return {name: artifact for name, artifact in released().items() if _catalog_name(artifact.model.name) == wanted}


def _catalog_name(model: str) -> str:
    known = find_model(model)
    return known.name if known else model


def origin(label: str) -> str:
    """Where what stands on a shelf under `label` comes from: RELEASED, PULLED or OWN."""
    if "/" in label:
        return PULLED
    return RELEASED if label in released() else OWN


def put(shelf: Shelf, artifact: "Artifact", label: str | None = None) -> tuple[dict[str, "Artifact"], str]:
    """A new shelf with `artifact` on it, and its label: the one given, in whose place it then stands, or else its name,
    numbered where that is taken.

    Raises `UsageError` naming what could be taken off where that is more than a shelf holds.
    """
    if label is None:
        label, number = artifact.name, 2
        while label in shelf or label in released():
            label, number = f"{artifact.name} ({number})", number + 1
    fuller = {**shelf, label: artifact}
    _check_room(fuller, label)
    return fuller, label


def _check_room(shelf: Shelf, newest: str) -> None:
    own = {label: artifact for label, artifact in shelf.items() if released().get(label) is not artifact}
    sizes = {label: size_in_memory(artifact) for label, artifact in own.items()}
    if len(own) <= MOST_ARTIFACTS and sum(sizes.values()) <= MOST_BYTES:
        return
    largest = sorted((label for label in own if label != newest), key=lambda label: -sizes[label])[:3]
    remedy = f"take some off on the Library tab, like {', '.join(largest)}" if largest else "use a smaller one"
    raise UsageError(
        f"{newest[:100]} does not fit on the shelf, which holds {MOST_ARTIFACTS} artifacts and {MOST_BYTES >> 20} MB "
        f"beside the released ones: {remedy[:300]}."
    )


def size_in_memory(artifact: "Artifact") -> int:
    """The bytes that an artifact takes up: its tensors, and what its config holds as Python's objects."""
    from neurosteer.artifacts.storage import artifact_data

    total, todo = sum(_tensor_bytes(artifact)), [artifact_data(artifact)]
    while todo:
        value: Any = todo.pop()
        total += sys.getsizeof(value)
        if isinstance(value, Mapping):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value
    return total


def _tensor_bytes(artifact: "Artifact") -> Iterator[int]:
    for value in vars(artifact).values():
        for one in value.values() if isinstance(value, Mapping) else (value,):
            yield getattr(getattr(one, "weights", one), "nbytes", 0)  # an encoder holds its tensor


def zip_file(artifact: "Artifact") -> str:
    """The path of a zip file of `artifact`, written where there is none and gone with the artifact."""
    from neurosteer.artifacts.storage import pack

    with _zips_lock:
        if artifact not in _zips:
            folder = new_folder()
            weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
            _zips[artifact] = folder / f"{artifact.name}.zip"
        path = _zips[artifact]
    if not path.exists():  # not yet, or no longer: its visitor's connection broke off
        _write_whole(path, pack(artifact))
    return str(path)


def _write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all: another visitor may be fetching the same file, and a disk may be full."""
    path.parent.mkdir(exist_ok=True)
    number, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
