"""What strength 1 means: the amount at which steering moves the model by a set KL, found for each sign by itself.

The measure is a percentile, over the tokens of unsteered greedy continuations of fixed neutral prompts, of
KL(steered ‖ unsteered) of the next token. Doses of both signs are tried together, as rows of the same batches.
"""

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.errors import UsageError
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.divergence import UnsteeredTexts, divergences, kl_percentile, unsteered_texts
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.progress import Progress, silent

TARGET_KL = 1.0
PERCENTILE = 95.0
N_TOKENS = 20
TOLERANCE = 0.03
"""How near the KL must come to its target, as a share of it."""

MAX_ROUNDS = 10
_NARROWEST = 1.002
"""Where doses this near to each other lie on two sides of the target, there is nothing between them."""

# How far from off an operation goes: a dose, a share, an activation, what a multiplier lies from 1, class differences.
# What is tried first, and within which bounds, for strength +1 and −1.
_FIRST = {"add": (0.08, 0.16, 0.32), "shift": (2.0, 5.0, 12.0), "scale": (0.4, 1.0, 3.0), "ablate": (0.3, 1.0)}
_LEAST = {"add": 1e-4, "shift": 1e-3, "scale": 1e-3, "ablate": 1e-3}
_MOST = {"add": (30.0, 30.0), "shift": (1e4, 1e4), "scale": (1e3, 1.0), "ablate": (1.0, 30.0)}
_CLAMP_FACTORS, _CLAMP_LEAST, _CLAMP_MOST = (0.5, 1.0, 2.0), 1e-3, 1e3
_STEP = 4.0
_GUESSES = (
    7  # so many amounts are tried as if KL grew as the square of the distance, or straight between two in logarithms
)


@dataclass
class _Side:
    """One sign's search: distances from off that were tried, with the KL each came to."""

    sign: float
    least: float
    most: float
    target: float
    tolerance: float
    tried: dict[float, float] = field(default_factory=dict)

    @property
    def bracket(self) -> tuple[float | None, float | None]:
        """The least distance that reaches the target, and the largest one below it."""
        reaching = [distance for distance, kl in self.tried.items() if kl >= self.target]
        high = min(reaching, default=None)
        below = [distance for distance in self.tried if high is None or distance < high]
        return max(below, default=None), high

    @property
    def best(self) -> float:
        """Of the ends of the bracket, the one whose KL is nearest to the target (in ratio)."""
        ends = [distance for distance in self.bracket if distance is not None]
        return min(ends, key=lambda distance: abs(math.log(max(self.tried[distance], 1e-12) / self.target)))

    @property
    def found(self) -> bool:
        return abs(self.tried[self.best] / self.target - 1.0) <= self.tolerance

    @property
    def ended(self) -> bool:
        low, high = self.bracket
        if self.found or (low is not None and high is not None and high / low < _NARROWEST):
            return True
        return (high is None and low is not None and low >= self.most) or (low is None and high == self.least)

    def next(self) -> list[float]:
        """What to try now."""
        low, high = self.bracket
        if low is not None and high is not None:
            return [self._between(low, high)]
        end = low if low is not None else high
        assert end is not None
        near = 0.05 < self.tried[end] / self.target < 20.0 and len(self.tried) <= _GUESSES
        factor = math.sqrt(self.target / self.tried[end]) if near else (_STEP if high is None else 1 / _STEP)
        steps = [end * factor] if near else [end * factor, end * factor**2]
        return sorted({min(max(step, self.least), self.most) for step in steps})

    def _between(self, low: float, high: float) -> float:
        """Along the line through the bracket's ends in logarithms."""
        ends = [math.log(max(self.tried[end], 1e-12) / self.target) for end in (low, high)]
        share = 0.5
        if len(self.tried) <= _GUESSES and all(map(math.isfinite, ends)):
            share = min(max(-ends[0] / (ends[1] - ends[0]), 0.05), 0.95)
        return low * (high / low) ** share


def calibrate(
    lm: LanguageModel,
    artifact: Artifact,
    *,
    target_kl: float = TARGET_KL,
    percentile: float = PERCENTILE,
    prompts: Sequence[Prompt] | None = None,
    n_tokens: int = N_TOKENS,
    texts: UnsteeredTexts | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Artifact:
    """`artifact` with its strength +1 and −1 set to `target_kl` nats each.

    Where an operation saturates before (a direction that is projected out whole, neurons that are off), strength 1 is
    all it can do, and the calibration's `note` says so, as it does where no amount comes near the target.

    Args:
        target_kl: what `percentile` (0 to 100) of the KL of all tokens is to be, in nats.
        prompts: what to continue; a fixed set of neutral prompts by default.
        n_tokens: how many tokens of each continuation count.
        texts: the prompts' continuations, where several artifacts are calibrated on the same ones.

    Raises:
        UsageError: a parameter out of its range.
        MismatchError: the artifact was made on a model of another shape.
        Cancelled: `cancel` was set.
    """
    return calibrate_each(
        lm,
        [artifact],
        target_kl=target_kl,
        percentile=percentile,
        prompts=prompts,
        n_tokens=n_tokens,
        texts=texts,
        progress=progress,
        cancel=cancel,
    )[0]


def calibrate_each(
    lm: LanguageModel,
    artifacts: Sequence[Artifact],
    *,
    target_kl: float = TARGET_KL,
    percentile: float = PERCENTILE,
    prompts: Sequence[Prompt] | None = None,
    n_tokens: int = N_TOKENS,
    texts: UnsteeredTexts | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> list[Artifact]:
    """As `calibrate`, for several artifacts whose doses are tried in the same batches.

    Where an artifact's amounts were measured before (such as on fewer prompts), the search begins there.
    """
    _check(target_kl, percentile, n_tokens)
    for artifact in artifacts:
        check_model(artifact, lm.reference)
    chosen = calibration_prompts() if prompts is None else prompts
    if texts is None:
        texts = unsteered_texts(lm, chosen, n_tokens, progress=progress, cancel=cancel)
    sides = [[_side(artifact, sign, target_kl, tolerance) for sign in (1.0, -1.0)] for artifact in artifacts]
    for number in range(MAX_ROUNDS):
        todo = [
            (side, artifact, distance)
            for artifact, pair in zip(artifacts, sides, strict=True)
            for side in pair
            if number == 0 or not side.ended
            for distance in (side.next() if number else _first(artifact, side))
        ]
        if not todo:
            break
        progress(f"Calibrating: trying {len(todo)} amounts", (number + 1) / (MAX_ROUNDS + 1))
        recipes = [_recipe(artifact, side.sign, distance) for side, artifact, distance in todo]
        found = divergences(lm, texts, recipes, cancel=cancel)
        for (side, _, distance), values in zip(todo, found, strict=True):
            side.tried[distance] = kl_percentile(values.flatten().tolist(), percentile)
    base = Calibration(
        0.0,
        target_kl=target_kl,
        percentile=percentile,
        n_tokens=texts.n_tokens,
        n_prompts=len(texts.texts),
        prompts_sha256=_sha256(texts),
    )
    return [replace(one, calibration=_result(one, base, *pair)) for one, pair in zip(artifacts, sides, strict=True)]


def _check(target_kl: float, percentile: float, n_tokens: int) -> None:
    for name, value, low, high in (("target_kl", target_kl, 0.0, 50.0), ("percentile", percentile, 0.0, 100.0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
            raise UsageError(f"{name} is {value!r:.40}; it must be above {low:g} and at most {high:g}.")
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or not 1 <= n_tokens <= 200:
        raise UsageError(f"n_tokens is {n_tokens!r:.40}; it must be a whole number from 1 to 200.")


def _unit_of(artifact: Artifact) -> float:
    """A clamp's own scale: the activation it holds its feature at now, which by default is the feature's highest."""
    return abs(artifact.calibration.amount) or 1.0


def _side(artifact: Artifact, sign: float, target: float, tolerance: float) -> _Side:
    if artifact.operation == "clamp":
        unit = _unit_of(artifact)
        return _Side(sign, _CLAMP_LEAST * unit, _CLAMP_MOST * unit, target, tolerance)
    most = _MOST[artifact.operation][0 if sign > 0 else 1]
    return _Side(sign, _LEAST[artifact.operation], most, target, tolerance)


def _first(artifact: Artifact, side: _Side) -> list[float]:
    known = artifact.calibration
    if known.measured and known.amount_down is not None:
        amount = known.amount if side.sign > 0 else known.amount_down
        distance = abs(amount - 1.0) if artifact.operation == "scale" else abs(amount)
        return [min(max(distance, side.least), side.most)]
    if artifact.operation == "clamp":
        return [factor * _unit_of(artifact) for factor in _CLAMP_FACTORS]
    return [distance for distance in _FIRST[artifact.operation] if distance <= side.most]


def _recipe(artifact: Artifact, sign: float, distance: float) -> Recipe:
    amount = 1.0 + distance if artifact.operation == "scale" else distance
    return Recipe.of((replace(artifact, calibration=Calibration(amount)), sign))


def _result(artifact: Artifact, base: Calibration, up: _Side, down: _Side) -> Calibration:
    amounts = [up.best, down.best]
    if artifact.operation == "scale":
        amounts = [1.0 + amounts[0], 1.0 - amounts[1]]
    notes = [note for side in (up, down) if (note := _note(artifact, side))]
    kls = [side.tried[side.best] for side in (up, down)]
    return replace(
        base,
        amount=amounts[0],
        amount_down=amounts[1],
        measured=True,
        kl=kls[0] if math.isfinite(kls[0]) else None,
        kl_down=kls[1] if math.isfinite(kls[1]) else None,
        note=" ".join(notes),
    )


def _note(artifact: Artifact, side: _Side) -> str:
    """Why a side missed the target; empty where it did not."""
    if side.found:
        return ""
    low, high = side.bracket
    strength, kl, target = f"Strength {side.sign:+.0f}", side.tried[side.best], f"{side.target:g} nats"
    if high is None and side.most <= 1.0:
        return f"{strength} saturates: all this artifact can do comes to {kl:.2g} of {target}."
    if high is None:
        return f"{strength} does not reach {target}: even an amount of {side.best:g} comes to {kl:.2g}."
    if low is None:
        return f"{strength} cannot be as little as {target}: the smallest amount, {side.best:g}, comes to {kl:.3g}."
    return f"{strength} comes to {kl:.3g} instead of {target}: the KL jumps between {low:.4g} and {high:.4g}."


def _sha256(texts: UnsteeredTexts) -> str:
    """Of the prompts' and continuations' token ids, which hold the prompts as the model saw them."""
    rows = "\n".join(",".join(map(str, text.ids[: text.first])) for text in texts.texts)
    return hashlib.sha256(rows.encode()).hexdigest()
