"""Layer by layer: how well a method separates the examples there, what steering there does, and what it costs.

All artifacts are brought to the same KL first, since an equal share of the residual stream's norm moves the model very
differently at different layers. The effect is measured without a judge, on texts the method did not see: how much
strength +1 against −1 shifts what the model itself finds likely, from the held-out negative texts to the held-out
positive ones. Beside it stands the same figure for a random direction (or random neurons) at the same KL, since any
push of that size moves something.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.twins import random_twin
from neurosteer.building.build import build_each
from neurosteer.building.layer_choice import at_equal_kl, overshoots
from neurosteer.building.layers import LayerChoice, parse_layers
from neurosteer.building.plan import HELD_OUT_SHARE
from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet, Split
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.calibration import N_TOKENS, PERCENTILE, TARGET_KL
from neurosteer.measuring.divergence import unsteered_texts
from neurosteer.measuring.preference import LabelledText, labelled_texts, log_likelihoods, preferences
from neurosteer.methods import find_method
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Job, Progress, silent

HELD_OUT_TEXTS = 32
"""Per class, at most: every layer costs four forward passes over them."""

_WHAT = "Measuring layers"


@dataclass(frozen=True)
class LayerFigures:
    """An artifact of one layer alone, brought to the profile's KL. `separation` is a ROC AUC (0.5 is chance), the KLs
    are in nats, the others in nats per token.

    `effect`, its standard error and `damage` are those of `measuring.preference.Preference`; `kl` and `kl_down` what
    strength +1 and −1 came to (None: beyond all numbers). The `random_` figures are those of random directions or
    neurons, brought to the same KL.
    """

    layer: int
    separation: float
    effect: float
    effect_error: float
    damage: float
    kl: float | None
    kl_down: float | None
    random_effect: float
    random_effect_error: float
    random_damage: float
    random_kl: float | None
    random_kl_down: float | None


@dataclass(frozen=True)
class LayerProfile:
    """Figures per layer, ascending, the KL at which layers are compared, and what they were measured on: numbers of
    (positive, negative) texts."""

    model: str
    method: str
    kind: str
    examples: str
    framing: str
    n_train: tuple[int, int]
    n_held_out: tuple[int, int]
    seed: int
    target_kl: float
    layers: tuple[LayerFigures, ...]

    @property
    def best_separation(self) -> int:
        """The layer at which the classes are told apart best, the lowest of several."""
        return max(self.layers, key=lambda figures: figures.separation).layer

    @property
    def best_effect(self) -> int:
        """The layer at which steering shifts the preference most; layers beyond the KL only where all are."""
        return max(self.layers, key=lambda figures: (not self.beyond(figures), figures.effect)).layer

    def beyond(self, figures: LayerFigures) -> bool:
        """Whether the layer's artifact could not be brought down to the KL, so that its effect is no comparison."""
        return overshoots(self.target_kl, figures.kl, figures.kl_down)


def profile_layers(
    lm: LanguageModel,
    examples: ContrastSet,
    *,
    method: str = "caa",
    layers: LayerChoice = "all",
    seed: int = 0,
    target_kl: float = TARGET_KL,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
    **parameters: Any,
) -> LayerProfile:
    """Build at every one of `layers` (for `sae`, at every SAE), bring each to `target_kl` and measure it by itself.

    A fifth of each class, at most `HELD_OUT_TEXTS`, is kept for effect and damage and takes no part in building.
    Separation is what building reports: measured on a part of the other texts, against the rest of them. `seed` draws
    the random control; other arguments and errors as for `building.build_each`.
    """
    chosen, job = parse_layers(layers, lm.n_layers), Job(progress, cancel)
    if chosen is None:
        raise UsageError("layers is 'auto', which is what this view is to help with; name layers, or 'all'.")
    if "contexts" in find_method(method).defaults:
        parameters = {"contexts": 0, **parameters}  # words for features are of no use here and cost a pass
    split = examples.split(HELD_OUT_SHARE, at_most=HELD_OUT_TEXTS)
    training = examples.at(split.train_positive, split.train_negative)
    artifacts = build_each(
        lm, training, method=method, layers="all" if len(chosen) == lm.n_layers else chosen,
        **job.named, **parameters,
    )  # fmt: skip
    source = next(iter(artifacts.values()))
    as_read: Framing = source.provenance.framing  # type: ignore[assignment]
    texts = _held_out(lm, examples, split, as_read)
    found = _measure(lm, artifacts, texts, seed, target_kl, job)
    return LayerProfile(
        model=lm.name,
        method=method,
        kind=source.kind,
        examples=examples.name,
        framing=as_read,
        n_train=(len(training.positive), len(training.negative)),
        n_held_out=(len(split.held_out_positive), len(split.held_out_negative)),
        seed=seed,
        target_kl=target_kl,
        layers=tuple(found),
    )


def _held_out(lm: LanguageModel, examples: ContrastSet, split: Split, framing: Framing) -> list[LabelledText]:
    """The texts to measure on. One of a class is enough, so they need not be a `ContrastSet`."""
    sides = ("positive", split.held_out_positive), ("negative", split.held_out_negative)
    positive, negative = ([getattr(examples, side)[place] for place in places] for side, places in sides)
    prompts = examples.prompts
    if prompts is not None:
        first = len(examples.positive)
        negative_places = [first + place for place in split.held_out_negative]
        prompts = [prompts[place] for place in (*split.held_out_positive, *negative_places)]
    return labelled_texts(lm, positive, negative, framing, name=examples.name, prompts=prompts)


def _measure(
    lm: LanguageModel,
    artifacts: Mapping[int, Artifact],
    texts: Sequence[LabelledText],
    seed: int,
    target_kl: float,
    job: Job,
) -> Iterator[LayerFigures]:
    made = [*artifacts.values(), *(random_twin(artifact, seed) for artifact in artifacts.values())]
    neutral = unsteered_texts(lm, calibration_prompts(), N_TOKENS, **job.named)
    brought = at_equal_kl(lm, made, neutral, target_kl=target_kl, percentile=PERCENTILE, job=job)
    plain = log_likelihoods(lm, texts, [UNSTEERED], what=_WHAT, cancel=job.cancel)[0]
    both = zip(brought[: len(artifacts)], brought[len(artifacts) :], strict=True)
    for done, (layer, pair) in enumerate(zip(artifacts, both, strict=True)):
        job.progress(f"Measuring layer {layer}", done / len(artifacts))
        recipes = [(Recipe.of((which, 1.0)), Recipe.of((which, -1.0))) for which in pair]
        found = preferences(lm, texts, recipes, plain=plain, what=_WHAT, cancel=job.cancel)
        own, other = (
            (one.effect, one.error, one.damage, which.calibration.kl, which.calibration.kl_down)
            for one, which in zip(found, pair, strict=True)
        )
        yield LayerFigures(layer, artifacts[layer].provenance.separation[layer], *own, *other)


def profile_data(profile: LayerProfile) -> dict[str, Any]:
    """The profile as JSON-ready data, with the best layers."""
    best = {"separation": profile.best_separation, "effect": profile.best_effect}
    return {**asdict(profile), "best": best}
