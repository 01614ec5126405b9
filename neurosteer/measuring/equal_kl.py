"""Recipes brought to a given KL by their strength, so that what they do can be compared at the same damage."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from neurosteer.artifacts.recipes import Recipe
from neurosteer.measuring.calibration import PERCENTILE
from neurosteer.measuring.divergence import UnsteeredTexts, divergences, kl_percentile
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, silent

TOLERANCE = 0.1
"""How near the KL must come to its target, as a share of it."""

_LEAST, _MOST, _LONGEST_STEP = 1 / 64, 64.0, 8.0
_ROUNDS = 8
_DIGITS = 3  # of a factor, so that the last bits of a machine do not show in it


@dataclass(frozen=True)
class AtKL:
    """A recipe at the strength that was found: `factor` times that of the recipe given, at which the KL is `kl` nats;
    `reached` says whether that is near the target."""

    recipe: Recipe
    factor: float
    kl: float
    reached: bool


@dataclass
class _Search:
    """Factors that were tried for one recipe, with the KL each came to."""

    recipe: Recipe
    target: float
    start: float
    tried: dict[float, float] = field(default_factory=dict)

    @property
    def most(self) -> float:
        """The largest factor that still does more: no more than the whole of a direction can be projected out, and
        neurons cannot be more off than off."""
        limits = [_MOST]
        for use in self.recipe.uses:
            if use.artifact.operation == "ablate" and use.amount > 0:
                limits.append(max(1.0, 1 / use.amount))
            if use.artifact.operation == "scale" and use.amount < 1:
                limits.append(max(1.0, 1 / (1 - use.amount)))
        return min(limits)

    @property
    def best(self) -> float:
        return min(self.tried, key=lambda factor: abs(_log(self.tried[factor] / self.target)))

    @property
    def reached(self) -> bool:
        return abs(self.tried[self.best] / self.target - 1) <= TOLERANCE

    def next(self) -> float | None:
        """What to try now; None where there is nothing more to try."""
        if not self.tried:
            return self._rounded(self.start)
        if self.reached:
            return None
        low = max((factor for factor, kl in self.tried.items() if kl < self.target), default=None)
        high = min((factor for factor, kl in self.tried.items() if kl >= self.target), default=None)
        if low is None or high is None:  # KL grows about as the square of what is added
            end = low if low is not None else high
            assert end is not None
            step = math.sqrt(min(self.target / max(self.tried[end], 1e-12), _LONGEST_STEP**2))
            tried = self._rounded(end * max(step, 1 / _LONGEST_STEP))
        else:
            tried = self._rounded(low * (high / low) ** self._share(low, high))
        return None if tried in self.tried else tried

    def _share(self, low: float, high: float) -> float:
        """How far from `low` to `high`, both in logarithms, a straight line crosses the target."""
        below, above = _log(self.tried[low] / self.target), _log(self.tried[high] / self.target)
        return min(max(-below / (above - below), 0.1), 0.9) if math.isfinite(above) else 0.5

    def _rounded(self, factor: float) -> float:
        most = self.most
        return most if factor >= most else float(f"{max(factor, _LEAST):.{_DIGITS}g}")


def at_kl(
    lm: LanguageModel,
    recipes: Sequence[Recipe],
    targets: Sequence[float],
    texts: UnsteeredTexts,
    *,
    start: Sequence[float] | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> list[AtKL]:
    """Each of `recipes` at the strength at which the 95th percentile of its KL over the tokens of `texts` is its target
    (nats, above 0), or as near as it comes; `start` are the factors to begin with. All are tried in the same batches.
    """
    searches = [
        _Search(recipe, target, first)
        for recipe, target, first in zip(recipes, targets, start or [1.0] * len(recipes), strict=True)
    ]
    for number in range(_ROUNDS):
        todo = [(search, factor) for search in searches if (factor := search.next()) is not None]
        if not todo:
            break
        progress(f"Bringing {len(todo)} controls to the same KL", number / _ROUNDS)
        found = divergences(lm, texts, [one.recipe.scaled(factor) for one, factor in todo], cancel=cancel)
        for (search, factor), nats in zip(todo, found, strict=True):
            search.tried[factor] = kl_percentile(nats.flatten().tolist(), PERCENTILE)
    return [AtKL(one.recipe.scaled(one.best), one.best, one.tried[one.best], one.reached) for one in searches]


def _log(ratio: float) -> float:
    return math.log(max(ratio, 1e-12)) if math.isfinite(ratio) else math.inf
