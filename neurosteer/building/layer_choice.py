"""Which layers to steer at: candidates brought to the same KL, and compared by what they do to held-out texts."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.measuring.calibration import calibrate_each
from neurosteer.measuring.divergence import UnsteeredTexts
from neurosteer.measuring.preference import LabelledText, Preference, preferences
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.reading.statistics import ClassMeans

APART = 3
"""How many layers lie at least between two single layers that are both worth comparing."""

_EVERY = 3  # of the calibration prompts, every third brings a candidate near enough to the KL
_TOLERANCE = 0.15


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

    def figures(self, separation: Mapping[int, float]) -> dict[str, Any]:
        """For the artifact's provenance, JSON-ready."""
        known = [separation[layer] for layer in self.candidate.layers if layer in separation]
        calibration = self.artifact.calibration
        return {
            "label": self.candidate.label,
            "layers": list(self.candidate.layers),
            "separation": round(sum(known) / len(known), 4) if known else None,
            "neutral": None if self.neutral is None else round(self.neutral, 4),
            "effect": round(self.preference.effect, 5),
            "damage": round(self.preference.damage, 5),
            "kl": [None if kl is None else round(kl, 3) for kl in (calibration.kl, calibration.kl_down)],
        }


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
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> list[Compared]:
    """Bring every candidate to about `target_kl` on a part of `texts`, then measure it on `held_out`, which took no
    part in building; all candidates in the same batches. The best comes first: the largest effect at equal KL."""
    progress(f"Comparing {len(candidates)} choices of layers at equal KL")
    artifacts = calibrate_each(
        lm, [candidate.artifact for candidate in candidates], target_kl=target_kl, percentile=percentile,
        texts=texts[::_EVERY], tolerance=_TOLERANCE, progress=progress, cancel=cancel,
    )  # fmt: skip
    progress(f"Measuring {len(candidates)} choices of layers on held-out texts")
    pairs = [(Recipe.of((artifact, 1.0)), Recipe.of((artifact, -1.0))) for artifact in artifacts]
    found = preferences(lm, held_out, pairs, what="Choosing layers", cancel=cancel)
    compared = [
        Compared(candidate, artifact, preference, _mean([neutral[x] for x in candidate.layers if x in neutral]))
        for candidate, artifact, preference in zip(candidates, artifacts, found, strict=True)
    ]
    return sorted(compared, key=lambda one: -one.preference.effect)


def neutral_places(
    lm: LanguageModel,
    texts: UnsteeredTexts,
    means: Mapping[int, ClassMeans],
    framing: Framing,
    *,
    cancel: threading.Event | None = None,
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
    read = read_activations(lm, written[:half], written[half:], request, cancel=cancel)
    shares = (half / len(written), 1 - half / len(written))
    places = {}
    for layer, (one, other) in ((layer, (found.positive, found.negative)) for layer, found in read.residual.items()):
        places[layer] = _place(shares[0] * one + shares[1] * other, means[layer])
    return places


def _place(neutral: Tensor, classes: ClassMeans) -> float:
    difference = classes.difference.double()
    return float((neutral.double() - classes.negative) @ difference / difference.square().sum().clamp(min=1e-30))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def reason(compared: Sequence[Compared]) -> str:
    """Why the first of `compared` was chosen, in a sentence without its stop."""
    best, rest = compared[0], compared[1:]
    others = ", ".join(f"{one.candidate.label} {one.preference.effect:+.3f}" for one in rest)
    return (
        f"{best.candidate.label}: the largest effect at equal KL on held-out texts, {best.preference.effect:+.3f} nats "
        f"per token" + (f" ({others})" if others else "")
    )
