"""What people write for an artifact: a folder, a name in `vectors/`, a repo on the Hub (or its address), or a feature
of an SAE, with `:strength` behind it where one applies."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.combining import orthogonalised
from neurosteer.artifacts.recipe_text import Group, Term, parse_recipe
from neurosteer.artifacts.recipes import Positions, Recipe, Use
from neurosteer.artifacts.storage import load
from neurosteer.errors import ArtifactError, HubError, UsageError
from neurosteer.examples.files import vectors_folder
from neurosteer.progress import Progress, silent

if TYPE_CHECKING:
    from neurosteer.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

VECTORS_FOLDER = "vectors"

_EMBEDDED_SAES = "embedded/"
_HUB_LIKE = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
_MARKS = re.compile(r"^-|[\s\"×*(),]")  # of a recipe that is more than one artifact at a strength
_FEATURE = re.compile(r"(?P<sae>.+)#(?P<index>[0-9]{1,12})(?:=(?P<value>[^#/\\]*))?", re.DOTALL)


@dataclass(frozen=True)
class FeatureUse:
    """One feature of the SAE named `sae` at a strength: added, or clamped to `value`. It becomes a `Use` once the
    model is there (`resolve_uses`)."""

    sae: str
    index: int
    value: float | None = None
    strength: float = 1.0


def resolve(reference: str, *, progress: Progress = silent) -> Artifact:
    """The artifact that `reference` names: a folder, a name in `vectors/`, or else one on the Hub, which is pulled with
    the token of the login on this machine.

    Raises `ArtifactError` saying where it was looked for, and what `pull` raises.
    """
    folder = artifact_folder(reference)
    if folder is not None:
        _say_what_it_hides(reference, folder)
        return load(folder)
    if _FEATURE.fullmatch(reference):
        raise UsageError(f"{reference[:200]!r} is a feature of an SAE, no artifact; steer with it (--use).")
    if "/" in reference and not reference.startswith(_EMBEDDED_SAES):
        return _pulled(reference, progress)
    raise _nowhere(reference)


def _pulled(reference: str, progress: Progress) -> Artifact:
    from neurosteer.hub import parse_reference, pull

    try:
        parse_reference(reference)
    except UsageError:
        raise _nowhere(reference) from None
    try:
        return pull(reference, progress=progress)
    except HubError as error:
        nowhere = "" if "://" in reference else f"There is no folder {reference[:200]!r}. "
        raise type(error)(f"{nowhere}{error}", error.status) from error


def _nowhere(reference: str) -> ArtifactError:
    close = get_close_matches(reference, _released_names(), n=2)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    return ArtifactError(
        f"There is no artifact {reference[:200]!r}: neither a folder nor a name in {VECTORS_FOLDER}/, nor on the Hub "
        f"(user/repo).{meant}"
    )


def _released_names() -> list[str]:
    return sorted({one.name for folder in _released_folders() if folder.is_dir() for one in folder.iterdir()})


def _released_folders() -> tuple[Path, Path]:
    return Path(VECTORS_FOLDER), vectors_folder()


def _say_what_it_hides(reference: str, folder: Path) -> None:
    """A line where a folder that happens to lie here is taken for what the same words name elsewhere: whoever gets a
    folder from others should see that it is not the artifact they know."""
    if reference.startswith((".", "~")) or Path(reference).is_absolute():
        return
    released = vectors_folder() / reference
    if _is_plain(reference) and _folder(str(released)) is not None and not released.samefile(folder):
        logger.warning(
            "Warning: %s is the folder %s here, not what comes with NeuroSteer under that name (%s).",
            reference, folder, released,
        )  # fmt: skip
    elif _HUB_LIKE.fullmatch(reference):
        logger.warning(
            "Warning: %s is the folder of that name here, not a repo on the Hub (write ./%s, or hf://%s).",
            *[reference] * 3,
        )  # fmt: skip


def parse_use(text: str) -> Use | FeatureUse:
    """`REF` or `REF:STRENGTH` (strength 1 when left out). REF names an artifact, or is `SAE#INDEX` (one feature, added)
    or `SAE#INDEX=VALUE` (the feature clamped to a value).

    Raises `UsageError` for a strength or a value that is no number.
    """
    reference, colon, strength = text.rpartition(":")
    if not colon or _folder(text) is not None or any(mark in strength for mark in "/\\#"):
        return _use(text, 1.0)
    try:
        value = float(strength)
    except ValueError as error:
        raise UsageError(
            f"The strength in {text[:200]!r} is {strength[:40]!r}; write REF:STRENGTH, like mood:1.5."
        ) from error
    return _use(reference, value)


@dataclass(frozen=True)
class Named:
    """What a recipe in words names: uses that are there, or features that still need a model; those at `groups` are to
    have no overlap with one another; and which tokens are steered."""

    uses: tuple[Use | FeatureUse, ...]
    groups: tuple[range, ...] = ()
    positions: Positions = "all"

    @property
    def model(self) -> str | None:
        """The model that the first artifact was made on; None where there are features of SAEs only."""
        return next((use.artifact.model.name for use in self.uses if isinstance(use, Use)), None)

    def recipe(self, lm: "LanguageModel", *, progress: Progress = silent) -> Recipe:
        """With features of SAEs made into artifacts for `lm`. Raises as `resolve_uses` and `orthogonalise` do."""
        uses = resolve_uses(self.uses, lm, progress=progress)
        for group in self.groups:
            uses[group.start : group.stop] = orthogonalised(Recipe(tuple(uses[group.start : group.stop]))).uses
        return Recipe(tuple(uses))


def look_up(text: str) -> Named:
    """What a recipe in words names (`artifacts.recipe_text` says how it is written).

    Raises `UsageError` pointing at the character that cannot be read, and what `resolve` raises.
    """
    folder, _, strength = text.rpartition(":")
    names = [text] if not folder or _number(strength) is None else [text, folder]
    is_folder = any(_folder(name) is not None for name in names)
    if is_folder or not _MARKS.search(text):
        return Named((parse_use(text),))
    read = parse_recipe(text)
    groups, place = [], 0
    for part in read.parts:
        count = len(part.terms) if isinstance(part, Group) else 1
        if isinstance(part, Group):
            groups.append(range(place, place + count))
        place += count
    return Named(tuple(map(_named, read.terms)), tuple(groups), read.positions)


def look_up_all(texts: Sequence[str]) -> Named:
    """Several of them as one. Raises `UsageError` where they say different positions, and as `look_up` does."""
    found = [look_up(text) for text in texts]
    where = dict.fromkeys(one.positions for one in found if one.positions != "all")
    if len(where) > 1:
        raise UsageError(f"The recipes steer {' and '.join(where)}; what is steered together is steered in one place.")
    uses: list[Use | FeatureUse] = []
    groups: list[range] = []
    for one in found:
        groups += [range(group.start + len(uses), group.stop + len(uses)) for group in one.groups]
        uses += one.uses
    return Named(tuple(uses), tuple(groups), next(iter(where), "all"))


def _named(term: Term) -> Use | FeatureUse:
    found = _use(term.reference, term.strength)
    if term.multiplier is None:
        return found
    if isinstance(found, FeatureUse):
        raise UsageError(f"{term.reference[:200]!r} is a feature, which is not multiplied; give it a strength (:1).")
    return replace(found, multiplier=term.multiplier)


def resolve_uses(uses: Sequence[Use | FeatureUse], lm: "LanguageModel", *, progress: Progress = silent) -> list[Use]:
    """The uses with features of SAEs made into artifacts for `lm`; each SAE is loaded once.

    Raises as `load_sae` and `feature_vector` do.
    """
    from neurosteer.saes.feature_vector import feature_vector
    from neurosteer.saes.loading import load_sae

    names = dict.fromkeys(use.sae for use in uses if isinstance(use, FeatureUse))
    saes = {name: load_sae(lm, name, progress=progress) for name in names}
    return [
        use
        if isinstance(use, Use)
        else Use(
            feature_vector(
                lm,
                saes[use.sae],
                use.index,
                operation="add" if use.value is None else "clamp",
                value=use.value,
                progress=progress,
            ),
            use.strength,
        )
        for use in uses
    ]


def _use(reference: str, strength: float) -> Use | FeatureUse:
    in_name = re.split(r"[/\\]", reference)[-1]
    if "#" not in in_name or artifact_folder(reference) is not None:
        return Use(resolve(reference), strength)
    found = _FEATURE.fullmatch(reference)
    value = _number(found["value"]) if found and found["value"] is not None else None
    if not found or (found["value"] is not None and value is None):
        raise UsageError(
            f"{reference[:200]!r} is no feature of an SAE; write SAE#INDEX, or SAE#INDEX=VALUE with a number, like "
            "embedded/14#1234 or embedded/14#1234=8."
        )
    if not math.isfinite(strength):
        raise UsageError(f"The strength of {reference[:200]!r} is {strength!r}; it must be a finite number.")
    return FeatureUse(found["sae"], int(found["index"]), value, strength)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def artifact_folder(reference: str) -> Path | None:
    """The folder on this machine that `reference` is, or names in `vectors/`, if there is one."""
    folder = _folder(reference)
    if folder is not None:
        return folder
    for released in _released_folders():
        if _is_plain(reference) and _folder(str(released / reference)) is not None:
            return released / reference
    return None


def _folder(text: str) -> Path | None:
    """The folder of that path, if there is one."""
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, NUL in it
        return None


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name
