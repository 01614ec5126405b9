"""What several verbs read from their options: artifacts at strengths, prompts and numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neurosteer.errors import UsageError
from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.artifacts.recipes import Recipe, Use
    from neurosteer.hub.references import FeatureUse
    from neurosteer.models.language_model import LanguageModel


def uses_of(texts: Sequence[str]) -> "list[Use | FeatureUse]":
    """What --use names: mistakes show before the model is loaded; features of SAEs are looked up after."""
    from neurosteer.hub.references import parse_use

    return [parse_use(text) for text in texts]


def model_of(uses: "Sequence[Use | FeatureUse]") -> str | None:
    """The model that the first artifact was made on; None (the default) where there are features of SAEs only."""
    from neurosteer.artifacts.recipes import Use

    return next((use.artifact.model.name for use in uses if isinstance(use, Use)), None)


def recipe_of(uses: "Sequence[Use | FeatureUse]", lm: "LanguageModel", progress: Progress) -> "tuple[Recipe, float]":
    """The recipe, and the strength to show beside its texts: its own when it is one artifact, else 1 (as given)."""
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.hub.references import resolve_uses

    return Recipe.of(*resolve_uses(uses, lm, progress=progress)), uses[0].strength if len(uses) == 1 else 1.0


def read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The prompts file {str(path)!r} could not be read as UTF-8 text ({error}).") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"The prompts file {str(path)!r} holds no prompt; write one a line.")
    return found


def floats(text: str, what: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{what} is {text[:60]!r}; give numbers parted by commas, like -1,0,1.") from error
