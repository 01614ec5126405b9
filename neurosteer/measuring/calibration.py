"""What strength 1 means: the amount at which steering moves the model by a set KL, found for each sign by itself.

The measure is a percentile, over the tokens of unsteered greedy continuations of fixed neutral prompts, of
KL(steered ‖ unsteered) of the next token. Amounts of both signs are tried together, as rows of the same batches.
"""

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.divergence import UnsteeredTexts, divergences, kl_percentile, unsteered_texts
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.progress import Progress, silent
from neurosteer.validation import check_count, check_number

TARGET_KL = 1.0
PERCENTILE = 95.0
N_TOKENS = 20
TOLERANCE = 0.1
"""How near the KL must come to its target, as a share of it. Which prompts it is measured on decides as much: with the
24 bundled ones, the 95% interval of a 95th percentile of 1.08 nats was 0.96 to 1.22."""

MAX_ROUNDS = 8
_RESAMPLES = 400  # of the prompts, for the interval of a KL
_TOO_LARGE = 1e30  # stands for infinite where NumPy interpolates

# How far from off an operation goes: a dose, a share, an activation, what a multiplier lies from 1, class differences.
# What is tried first, and within which bounds, for strength +1 and −1.
_FIRST = {"add": 0.2, "shift": 5.0, "scale": 1.0, "ablate": 1.0}
_LEAST = {"add": 1e-4, "shift": 1e-3, "scale": 1e-3, "ablate": 1e-3}
_MOST = {"add": (30.0, 30.0), "shift": (1e4, 1e4), "scale": (1e3, 1.0), "ablate": (1.0, 30.0)}
_CLAMP_LEAST, _CLAMP_MOST = 1e-3, 1e3  # of a clamp's own scale
_USUAL_POWER, _POWERS = 2.0, (0.5, 6.0)  # of the amount that KL grows with
_STEP = 8.0
_FAR = math.log(20.0)  # a KL further from the target than that says little of where it is met


@dataclass
class _Side:
    """One sign's search: distances from off that were tried, in their order, with the KL of every token there
    `[n_prompts, n_tokens]` and its percentile."""

    sign: float
    first: float
    least: float
    most: float
    target: float
    tolerance: float
    tried: dict[float, float] = field(default_factory=dict)
    values: dict[float, Tensor] = field(default_factory=dict)

    @property
    def bracket(self) -> tuple[float | None, float | None]:
        """The largest distance below the target, and the least one that reaches it."""
        reaching = [distance for distance, kl in self.tried.items() if kl >= self.target]
        high = min(reaching, default=None)
        below = [distance for distance in self.tried if high is None or distance < high]
        return max(below, default=None), high

    @property
    def best(self) -> float:
        """Of the ends of the bracket, the one whose KL is nearest to the target (in ratio)."""
        return min((end for end in self.bracket if end is not None), key=lambda end: abs(self._lacking(end)))

    @property
    def found(self) -> bool:
        return abs(self.tried[self.best] / self.target - 1.0) <= self.tolerance

    @property
    def ended(self) -> bool:
        """Whether the target is met, or lies beyond what the operation can do."""
        if not self.tried:
            return False
        low, high = self.bracket
        return self.found or (high is None and low == self.most) or (low is None and high == self.least)

    @property
    def next(self) -> float:
        """What to try now: where a line in logarithms through two distances (or one, with the usual slope) meets the
        target, between the bracket's ends or beyond the one that is known."""
        if not self.tried:
            return self.first
        low, high = self.bracket
        if low is not None and high is not None:
            return low * (high / low) ** self._share(low, high)
        last = self.best
        step = math.exp(self._lacking(last) / self._power())
        return min(max(last * min(max(step, 1 / _STEP), _STEP), self.least), self.most)

    def _lacking(self, distance: float) -> float:
        """The logarithm of the target over the KL at `distance`."""
        return math.log(self.target / min(max(self.tried[distance], 1e-12), 1e12))

    def _share(self, low: float, high: float) -> float:
        """How far between the bracket's ends, in logarithms; half where twice running only one end has moved, since
        then the line is no good guide."""
        above = [kl >= self.target for kl in self.tried.values()]
        if len(above) > 2 and above[-1] == above[-2]:
            return 0.5
        below, beyond = (min(max(self._lacking(end), -_FAR), _FAR) for end in (low, high))
        return min(max(below / (below - beyond), 0.1), 0.9)

    def _power(self) -> float:
        """By which power of the distance KL grew between the last two."""
        if len(self.tried) < 2:
            return _USUAL_POWER
        before, last = list(self.tried)[-2:]
        power = (self._lacking(before) - self._lacking(last)) / math.log(last / before)
        return min(max(power, _POWERS[0]), _POWERS[1])

    def interval(self, percentile: float) -> tuple[float, float] | None:
        """The 95% interval of the KL reached, from drawing the prompts again."""
        return kl_interval(self.values[self.best].numpy(), percentile)


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
    check_number("target_kl", target_kl, 0, 50, above=True)
    check_number("percentile", percentile, 0, 100, above=True)
    check_count("n_tokens", n_tokens, 1, 200)
    for artifact in artifacts:
        check_model(artifact, lm.reference)
    chosen = calibration_prompts() if prompts is None else prompts
    if texts is None:
        texts = unsteered_texts(lm, chosen, n_tokens, progress=progress, cancel=cancel)
    sides = [[_side(artifact, sign, target_kl, tolerance) for sign in (1.0, -1.0)] for artifact in artifacts]
    every = [(artifact, side) for artifact, pair in zip(artifacts, sides, strict=True) for side in pair]
    for number in range(MAX_ROUNDS):
        todo = [(artifact, side, side.next) for artifact, side in every if not side.ended]
        if not todo:
            break
        progress(f"Calibrating: trying {len(todo)} amounts", (number + 1) / (MAX_ROUNDS + 1))
        recipes = [_recipe(artifact, side.sign, distance) for artifact, side, distance in todo]
        found = divergences(lm, texts, recipes, cancel=cancel)
        for (_, side, distance), values in zip(todo, found, strict=True):
            side.values[distance] = values
            side.tried[distance] = kl_percentile(values.flatten().tolist(), percentile)
    base = Calibration(
        0.0,
        target_kl=target_kl,
        percentile=percentile,
        n_tokens=texts.n_tokens,
        n_prompts=len(texts.texts),
        prompts_sha256=_sha256(texts),
    )
    return [
        replace(one, calibration=_result(one, base, percentile, *pair))
        for one, pair in zip(artifacts, sides, strict=True)
    ]


def kl_interval(nats: np.ndarray, percentile: float) -> tuple[float, float] | None:
    """The 95% interval of the percentile of KL `[n_prompts, n_tokens]`, NaN where no token is, from drawing the prompts
    again (a percentile bootstrap). None where there is only one prompt, or where the interval is not finite."""
    if len(nats) < 2:
        return None
    draw, finite = np.random.default_rng(0), np.minimum(nats.astype(np.float64), _TOO_LARGE)
    drawn = (finite[draw.integers(len(nats), size=len(nats))] for _ in range(_RESAMPLES))
    low, high = np.percentile([np.nanpercentile(values, percentile) for values in drawn], (2.5, 97.5)).tolist()
    return (low, high) if high < math.sqrt(_TOO_LARGE) else None


def _side(artifact: Artifact, sign: float, target: float, tolerance: float) -> _Side:
    operation, known = artifact.operation, artifact.calibration
    if operation == "clamp":
        unit = abs(known.amount) or 1.0  # what it holds its feature at now: by default the feature's highest activation
        first, least, most = unit, _CLAMP_LEAST * unit, _CLAMP_MOST * unit
    else:
        first, least, most = _FIRST[operation], _LEAST[operation], _MOST[operation][0 if sign > 0 else 1]
    if known.measured and known.amount_down is not None:  # near it, most likely
        amount = known.amount if sign > 0 else known.amount_down
        first = abs(amount - 1.0) if operation == "scale" else abs(amount)
    return _Side(sign, min(max(first, least), most), least, most, target, tolerance)


def _recipe(artifact: Artifact, sign: float, distance: float) -> Recipe:
    amount = 1.0 + distance if artifact.operation == "scale" else distance
    return Recipe.of((replace(artifact, calibration=Calibration(amount)), sign))


def _result(artifact: Artifact, base: Calibration, percentile: float, up: _Side, down: _Side) -> Calibration:
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
        kl_interval=up.interval(percentile),
        kl_down_interval=down.interval(percentile),
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
    """Of the prompts' token ids, as the model saw them."""
    rows = "\n".join(",".join(map(str, text.ids[: text.first])) for text in texts.texts)
    return hashlib.sha256(rows.encode()).hexdigest()
