"""Recipes: which artifacts at which strengths, applied together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.errors import UsageError
from neurosteer.models.reference import ModelReference
from neurosteer.validation import is_finite

Positions = str
"""Which tokens are steered: `all`, the `prompt`'s, those `generated`, their `first:N`, or the prompt's `last:N`."""

MAX_STRENGTH = 100
"""The largest strength, of either sign, that pages, endpoints and the command line take. In Python any will do that the
model's dtype can hold."""


@dataclass(frozen=True)
class Use:
    """One artifact at one strength. `multiplier` sets a scaling circuit's multiplier directly instead."""

    artifact: Artifact
    strength: float = 1.0
    multiplier: float | None = None

    def __post_init__(self) -> None:
        for what, value in (("strength", self.strength), ("multiplier", self.multiplier)):
            left_out = value is None and what == "multiplier"
            if not left_out and not is_finite(value):
                raise UsageError(f"The {what} of {self.artifact.name!r} is {value!r:.60}; it must be a finite number.")
        if self.multiplier is not None and self.artifact.operation != "scale":
            raise UsageError(f"{self.artifact.name!r} does not scale neurons; give it a strength, not a multiplier.")

    @property
    def amount(self) -> float:
        """What the strength comes to: a dose, a share to project out, the activation a feature is held at, a multiplier
        or a number of differences.

        Strengths below 0 go by what was calibrated for −1 where that was measured by itself.

        A clamp's strengths within ±1 say how much of the way to the calibrated value a feature goes (`share`), those
        beyond multiply the value: so 0 is off and nothing jumps in between, whatever the value.
        """
        calibration = self.artifact.calibration
        down = self.strength < 0 and calibration.amount_down is not None
        if self.artifact.operation == "scale":
            if self.multiplier is not None:
                return self.multiplier
            opposite = 2.0 - calibration.amount_down if down else calibration.amount  # type: ignore[operator]
            return 1.0 + self.strength * (opposite - 1.0)
        calibrated = calibration.amount_down if down else calibration.amount
        assert calibrated is not None
        if self.artifact.operation == "clamp":
            return math.copysign(max(abs(self.strength), 1.0), self.strength) * calibrated
        return self.strength * calibrated

    @property
    def share(self) -> float:
        """How much of the way to its value a clamped feature goes, from 0 to 1."""
        return min(abs(self.strength), 1.0)

    @property
    def has_effect(self) -> bool:
        """Whether the use changes anything at all."""
        if self.artifact.operation == "clamp":
            return self.strength != 0
        return self.amount != (1.0 if self.artifact.operation == "scale" else 0.0)


@dataclass(frozen=True)
class Recipe:
    """Artifacts at strengths. The empty recipe is the unsteered model."""

    uses: tuple[Use, ...] = ()

    @staticmethod
    def of(*uses: Use | Artifact | tuple[Artifact, float]) -> "Recipe":
        """A recipe of uses, of artifacts at strength 1, or of (artifact, strength) pairs."""
        return Recipe(tuple(_as_use(use) for use in uses))

    def scaled(self, factor: float) -> "Recipe":
        """The recipe with every strength (or distance of a multiplier from 1) `factor` times as large."""
        return Recipe(tuple(_scaled(use, factor) for use in self.uses))


UNSTEERED = Recipe()


def check_recipes_fit(recipes: Iterable[Recipe], model: ModelReference) -> list[str]:
    """As `check_model` for every artifact of `recipes`: the warnings, each once."""
    artifacts = {id(use.artifact): use.artifact for recipe in recipes for use in recipe.uses}
    found = (check_model(artifact, model) for artifact in artifacts.values())
    return list(dict.fromkeys(warning for warning in found if warning))


def _as_use(use: Use | Artifact | tuple[Artifact, float]) -> Use:
    if isinstance(use, Use):
        return use
    if isinstance(use, tuple):
        return Use(use[0], use[1])
    return Use(use)


def _scaled(use: Use, factor: float) -> Use:
    if isinstance(use.artifact, NeuronCircuit) and use.multiplier is not None:
        return replace(use, multiplier=1.0 + factor * (use.multiplier - 1.0))
    return replace(use, strength=use.strength * factor)
