"""A visitor's artifacts: kept in the page's state by a label, and offered as zip files."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurosteer.artifacts import Artifact

Shelf = Mapping[str, "Artifact"]

_zips: "weakref.WeakKeyDictionary[Artifact, Path]" = weakref.WeakKeyDictionary()


def put(shelf: Shelf, artifact: "Artifact") -> tuple[dict[str, "Artifact"], str]:
    """A new shelf with `artifact` on it, and its label: its name, numbered where that is taken."""
    label, number = artifact.name, 2
    while label in shelf:
        label, number = f"{artifact.name} ({number})", number + 1
    return {**shelf, label: artifact}, label


def zip_file(artifact: "Artifact") -> str:
    """The path of a zip file of `artifact`, written once and gone with the artifact."""
    from neurosteer.storage import pack

    if artifact not in _zips:
        folder = Path(tempfile.mkdtemp(prefix="neurosteer-"))
        weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
        path = folder / f"{artifact.name}.zip"
        path.write_bytes(pack(artifact))
        _zips[artifact] = path
    return str(_zips[artifact])
