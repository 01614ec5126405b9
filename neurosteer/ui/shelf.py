"""A visitor's artifacts: kept in the page's state by a label, and offered as zip files.

A released artifact's label is its name and a pulled one's the reference it was pulled by; those can be shared as they
are. What a visitor built or uploaded has a name, numbered where that is taken.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gradio.utils import get_upload_folder

from neurosteer.errors import NeuroSteerError
from neurosteer.examples.files import assets_folder
from neurosteer.models.catalog import find_model

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact

Shelf = Mapping[str, "Artifact"]
RELEASED, PULLED, OWN = "released", "pulled", "mine"

_zips: "weakref.WeakKeyDictionary[Artifact, Path]" = weakref.WeakKeyDictionary()


@cache
def released() -> dict[str, "Artifact"]:
    """The artifacts that come with NeuroSteer, by name; those that cannot be read are left out."""
    from neurosteer.artifacts.storage import is_artifact, load
    from neurosteer.hub.references import VECTORS_FOLDER

    found = {}
    folder = assets_folder().parent / VECTORS_FOLDER
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


def put(shelf: Shelf, artifact: "Artifact") -> tuple[dict[str, "Artifact"], str]:
    """A new shelf with `artifact` on it, and its label: its name, numbered where that is taken."""
    label, number = artifact.name, 2
    while label in shelf or label in released():
        label, number = f"{artifact.name} ({number})", number + 1
    return {**shelf, label: artifact}, label


def zip_file(artifact: "Artifact") -> str:
    """The path of a zip file of `artifact`, written where there is none and gone with the artifact."""
    from neurosteer.artifacts.storage import pack

    if artifact not in _zips:
        Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=get_upload_folder(), prefix="neurosteer-"))  # else gradio copies it there
        weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
        _zips[artifact] = folder / f"{artifact.name}.zip"
    path = _zips[artifact]
    if not path.exists():  # not yet, or no longer: its visitor's connection broke off
        path.write_bytes(pack(artifact))
    return str(path)
