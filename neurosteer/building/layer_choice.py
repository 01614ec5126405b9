"""Which layers to steer at: candidates brought to the same KL, and compared by what they do to held-out texts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.measuring.calibration import calibrate_each
from neurosteer.measuring.divergence import UnsteeredTexts
from neurosteer.measuring.preference import LabelledText, Preference, preferences
from neurosteer.methods.base import APART
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Job
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.reading.statistics import ClassMeans

_EVERY = 3  # of the calibration prompts, every third brings an artifact near enough to the KL
TOLERANCE = 0.15
"""How near `at_equal_kl` brings an artifact to the KL, as a share of it."""
WORTH_LOSING = 0.05
"""The share of the largest effect that fewer layers may cost. Where texts are few or noisy a standard error is wide,
and a layer that does half as much may lie within it (`tests/benchmarks/README.md` tells of one)."""


@dataclass(frozen=True)
class Candidate:
    """Layers to steer at, in words, and the artifact there."""

    label: str
    layers: tuple[int, ...]
    artifact: Artifact


@dataclass(frozen=True)
class Compared:
    """A candidate at the KL that all were brought to: its artifact with amounts near those, what it does, and where
    the neutral mean lies between the classes (0 the negative mean, 1 the positive one; a mean over the layers)."""

    candidate: Candidate
    artifact: Artifact
    preference: Preference
    neutral: float | None

    @property
    def effect(self) -> float:
        """Of the preference; below all others where it is no number."""
        return self.preference.effect if math.isfinite(self.preference.effect) else -math.inf

    @property
    def beyond(self) -> bool:
        """Whether it was not brought down to the KL, so that its effect cannot be compared."""
        calibration = self.artifact.calibration
        return overshoots(calibration.target_kl or math.inf, calibration.kl, calibration.kl_down)

    def figures(self, separation: Mapping[int, float]) -> dict[str, Any]:
        """For the artifact's provenance, JSON-ready."""
        known = [separation[layer] for layer in self.candidate.layers if layer in separation]
        calibration, preference = self.artifact.calibration, self.preference
        return {
            "label": self.candidate.label,
            "layers": list(self.candidate.layers),
            "separation": _rounded(_mean(known)),
            "neutral": _rounded(self.neutral),
            "effect": _rounded(preference.effect),
            "effect_error": _rounded(preference.error),
            "damage": _rounded(preference.damage),
            "kl": [_rounded(calibration.kl), _rounded(calibration.kl_down)],
            "beyond_kl": self.beyond,
        }


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def at_equal_kl(
    lm: LanguageModel,
    artifacts: Sequence[Artifact],
    texts: UnsteeredTexts,
    *,
    target_kl: float,
    percentile: float,
    job: Job,
) -> list[Artifact]:
    """All `artifacts` brought to about `target_kl` at both signs, in the same batches, on a part of `texts`."""
    return calibrate_each(
        lm, artifacts, target_kl=target_kl, percentile=percentile, texts=texts[::_EVERY], tolerance=TOLERANCE,
        **job.named,
    )  # fmt: skip


def overshoots(target_kl: float, *kls: float | None) -> bool:
    """Whether any of `kls` (None: beyond all numbers) is more than `at_equal_kl` allows."""
    return any(kl is None or kl > target_kl * (1 + TOLERANCE) for kl in kls)


def best_single_layers(separation: Mapping[int, float], neutral: Mapping[int, float], count: int) -> list[int]:
    """The layers that separate best, at least `APART` from one another; where the neutral mean lies between the classes
    at some layers, only those."""
    between = [layer for layer in separation if 0 < neutral.get(layer, -1.0) < 1]
    found: list[int] = []
    for layer in sorted(between or separation, key=lambda layer: (-separation[layer], layer)):
        if len(found) < count and all(abs(layer - other) >= APART for other in found):
            found.append(layer)
    return found


def compare(
    lm: LanguageModel,
    candidates: Sequence[Candidate],
    texts: UnsteeredTexts,
    held_out: Sequence[LabelledText],
    neutral: Mapping[int, float],
    *,
    target_kl: float,
    percentile: float,
    job: Job,
) -> list[Compared]:
    """Bring every candidate to about `target_kl`, then measure it on `held_out`, which took no part in building; all
    candidates in the same batches. What `pick` takes comes first, the others follow by their effect."""
    job.progress(f"Comparing {len(candidates)} choices of layers at equal KL")
    made = [candidate.artifact for candidate in candidates]
    artifacts = at_equal_kl(lm, made, texts, target_kl=target_kl, percentile=percentile, job=job)
    job.progress(f"Measuring {len(candidates)} choices of layers on held-out texts")
    pairs = [(Recipe.of((artifact, 1.0)), Recipe.of((artifact, -1.0))) for artifact in artifacts]
    found = preferences(lm, held_out, pairs, what="Choosing layers", cancel=job.cancel)
    compared = [
        Compared(candidate, artifact, preference, _mean([neutral[x] for x in candidate.layers if x in neutral]))
        for candidate, artifact, preference in zip(candidates, artifacts, found, strict=True)
    ]
    picked = pick(compared)
    return [picked, *sorted((one for one in compared if one is not picked), key=lambda one: -one.effect)]


def pick(compared: Sequence[Compared]) -> Compared:
    """Of the candidates whose effect lies within one standard error of the largest (of the difference to it, paired
    text by text) and within a twentieth of it, the one with the fewest layers. Candidates beyond the KL are passed over
    where there are others."""
    best = largest(compared)

    def is_near(one: Compared) -> bool:
        behind = best.effect - one.effect
        allowed = min(best.preference.error_of_difference(one.preference), WORTH_LOSING * abs(best.effect))
        return one.beyond <= best.beyond and behind <= allowed

    tied = [one for one in compared if one is best or is_near(one)]
    return min(tied, key=lambda one: (len(one.candidate.layers), -one.effect))


def largest(compared: Sequence[Compared]) -> Compared:
    """The candidate with the largest effect at equal KL."""
    return max(compared, key=lambda one: (not one.beyond, one.effect))


def neutral_places(
    lm: LanguageModel,
    texts: UnsteeredTexts,
    means: Mapping[int, ClassMeans],
    framing: Framing,
    job: Job,
) -> dict[int, float]:
    """Where what the model writes by itself lies on the line from the negative class mean (0) to the positive one (1),
    by layer. Between 0 and 1, both signs of steering have somewhere to go; beyond, one of them leads away from both
    classes. Empty where the model writes next to nothing.
    """
    own = [lm.tokenizer.decode(text.ids[text.first : text.end], skip_special_tokens=True) for text in texts.texts]
    written = [text for text in own if len(lm.token_ids(text)) > 1]
    if len(written) < 2:
        return {}
    half = len(written) // 2
    request = Request(residual=tuple(means), framing="answer" if framing == "answer" else "raw")
    read = read_activations(lm, written[:half], written[half:], request, cancel=job.cancel)
    shares = (half / len(written), 1 - half / len(written))
    return {
        layer: _place(shares[0] * found.positive + shares[1] * found.negative, means[layer])
        for layer, found in read.residual.items()
    }


def _place(neutral: Tensor, classes: ClassMeans) -> float:
    difference = classes.difference.double()
    return float((neutral.double() - classes.negative) @ difference / difference.square().sum().clamp(min=1e-30))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def reason(compared: Sequence[Compared]) -> str:
    """Why the first of `compared` was chosen, in a sentence without its stop."""
    chosen, rest = compared[0], compared[1:]
    most = chosen is largest(compared)
    why = "the largest effect" if most else "the fewest layers that do as much, within a standard error and 5%,"
    others = ", ".join(
        f"{one.candidate.label} {one.effect:+.3f}" + (" beyond that KL" if one.beyond else "") for one in rest
    )
    return (
        f"{chosen.candidate.label}: {why} at equal KL on held-out texts, {chosen.effect:+.3f} ± "
        f"{chosen.preference.error:.3f} nats per token (chosen by it, so rather high"
        + (f"; others: {others})" if others else ")")
    )
