"""What people write for an artifact: a folder or a name in `vectors/`, with `:strength` behind it where one applies."""

from pathlib import Path

from neurosteer.artifacts import Artifact
from neurosteer.errors import ArtifactError, UsageError
from neurosteer.examples import assets_folder
from neurosteer.recipes import Use
from neurosteer.storage import load

VECTORS_FOLDER = "vectors"


def resolve(reference: str) -> Artifact:
    """The artifact that `reference` names. Raises `ArtifactError` saying where it was looked for."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return load(folder)
    for released in (Path(VECTORS_FOLDER), assets_folder().parent / VECTORS_FOLDER):
        if _is_plain(reference) and (released / reference).is_dir():
            return load(released / reference)
    raise ArtifactError(f"There is no artifact {reference[:200]!r}: neither a folder nor a name in {VECTORS_FOLDER}/.")


def parse_use(text: str) -> Use:
    """`REF` or `REF:STRENGTH` (strength 1 when left out). Raises `UsageError` for a strength that is no number."""
    reference, colon, strength = text.rpartition(":")
    if not colon or Path(text).expanduser().is_dir() or "/" in strength or "\\" in strength:
        return Use(resolve(text))
    try:
        value = float(strength)
    except ValueError as error:
        raise UsageError(
            f"The strength in {text[:200]!r} is {strength[:40]!r}; write REF:STRENGTH, like mood:1.5."
        ) from error
    return Use(resolve(reference), value)


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name
