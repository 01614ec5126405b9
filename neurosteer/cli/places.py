"""Where results are written: looked at before the work begins, so that none is lost for a wrong folder."""

import os
from pathlib import Path

from neurosteer.errors import UsageError


def files_place(folder: Path | None) -> Path | None:
    """`folder`, if files can be written into it; it need not be there. Raises `UsageError`."""
    if folder is None:
        return None
    from neurosteer.examples.files import vectors_folder

    place = _resolved(folder)
    released = vectors_folder().resolve()
    if place == released or released in place.parents:
        raise UsageError(
            f"{str(folder)[:200]!r} is among the artifacts that come with NeuroSteer, which are never changed; choose "
            "another folder with --out."
        )
    existing = next(one for one in (place, *place.parents) if one.exists())
    if not existing.is_dir():
        raise UsageError(f"{str(folder)[:200]!r} cannot be a folder: {existing} is a file; choose another --out.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{str(folder)[:200]!r} cannot be written: {existing} is not yours; choose another --out.")
    return folder


def artifact_place(folder: Path) -> Path:
    """`folder`, if an artifact can be written there: new, empty, or an artifact that is replaced. Raises `UsageError`
    or `ArtifactError`."""
    from neurosteer.artifacts.storage import check_target

    files_place(folder)
    check_target(folder)
    return folder


def folder_of(reference: str) -> Path | None:
    """The local folder of the artifact that `reference` names, which may be changed; None where it is on the Hub.

    Raises as `artifact_place`: also where it came with NeuroSteer.
    """
    from neurosteer.hub.references import artifact_folder

    folder = artifact_folder(reference)
    return None if folder is None else artifact_place(folder)


def _resolved(folder: Path) -> Path:
    try:
        path = folder.expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, NUL in it, an unknown ~user
        raise UsageError(f"{str(folder)[:100]!r} is no folder's name; choose another --out.") from error
    return path
