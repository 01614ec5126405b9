"""Examples to activations to method to artifact: the one composition."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.provenance import Provenance
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.layer_choice import APART, Candidate, best_single_layers, compare, neutral_places, reason
from neurosteer.building.layers import LayerChoice
from neurosteer.building.plan import HELD_OUT_AT_MOST, HELD_OUT_SHARE, BuildPlan, _request, make_plan, read_plan
from neurosteer.building.separation import choose, separations
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.calibration import N_TOKENS, PERCENTILE, TARGET_KL
from neurosteer.measuring.calibration import calibrate as calibrated
from neurosteer.measuring.divergence import UnsteeredTexts, unsteered_texts
from neurosteer.measuring.preference import labelled_texts
from neurosteer.methods.base import Tensors
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.reading.request import Tokens
from neurosteer.reading.statistics import Activations
from neurosteer.saes.words import describe_features, output_scores
from neurosteer.version import VERSION

_SPLIT_SEED = 0
_FEWEST_TO_COMPARE = 50
_COMPARED_ON = 12  # texts per class: every choice of layers costs two forward passes over them
_SINGLE_LAYERS = 2


def build(
    lm: LanguageModel,
    examples: ContrastSet,
    *,
    method: str = "caa",
    layers: LayerChoice = "auto",
    name: str | None = None,
    description: str = "",
    framing: Framing | None = None,
    tokens: Tokens | None = None,
    hold_out: float = 0.0,
    calibrate: bool = True,
    target_kl: float = TARGET_KL,
    percentile: float = PERCENTILE,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
    **parameters: Any,
) -> Artifact:
    """Build an artifact from a contrast set, and set its strength 1 by measurement.

    Args:
        method: `caa`, `pca`, `probe`, `sae` or `cna`.
        layers: `auto`, `all`, a number, a range (`"10-18"` or `range(10, 19)`) or a list. With `auto`, a few choices
            (single layers that separate held-out examples well, spreads over many layers) are brought to the same KL,
            and the one that does most to held-out texts is taken; without `calibrate`, or with fewer than 50 texts of
            a class, the layer of the middle 20 to 80% that separates held-out examples best. For `cna`, the layers
            searched for neurons; with `rank="write"` the last of them is the reference layer. For `sae`, those of its
            SAEs.
        framing: `raw`, `prompt` or `answer` (see `LanguageModel.frame`); by default `answer` for chat models.
        tokens: `mean` over a text's tokens, or the `last`.
        hold_out: the share of each class (`examples.parts(hold_out, seed=HOLD_OUT_SEED)`) that takes no part at all, so
            that a judge can be trained on it.
        calibrate: set strength ±1 to `target_kl` nats (see `calibration.calibrate`); else the default amounts.
        parameters: the method's own, such as `rank`, `operation`, `top_k`, `skip_layers` for `cna`; `sae` (a
            reference as for `load_sae`, or several), `rank`, `top_k`, `weight`, … for `sae`.

    Raises:
        UsageError: a parameter is not one of the allowed values.
        ExamplesError: nothing would be left of a class beside what is held out.
        Cancelled: `cancel` was set.
    """
    plan = make_plan(lm, method, layers, framing, tokens, parameters, progress)
    training = examples.parts(hold_out, seed=HOLD_OUT_SEED)[0] if hold_out else examples
    compared_on = None
    if calibrate and plan.leaves_a_choice and min(len(training.positive), len(training.negative)) >= _FEWEST_TO_COMPARE:
        training, compared_on = training.parts(HELD_OUT_SHARE, seed=HOLD_OUT_SEED, at_most=_COMPARED_ON)
        spread = not plan.method.needs_rows and not plan.method.needs_neurons and not plan.method.needs_features
        plan = replace(plan, everywhere=tuple(range(lm.n_layers)) if spread else ())
    name = safe_name(name or f"{examples.name}-{method}")
    work = _Work(lm, training, plan, name, progress, cancel)
    if not calibrate:
        artifact = work.finished(*work.by_separation(work.read()))
        return replace(artifact, description=description, provenance=_of_all(artifact, examples, hold_out))
    activations = work.read()
    texts = unsteered_texts(lm, calibration_prompts(), N_TOKENS, progress=progress, cancel=cancel)
    if compared_on is not None and set(plan.rows_needed) <= set(activations.rows):
        artifact = work.finished(*work.by_effect(activations, texts, compared_on, target_kl, percentile))
    else:
        artifact = work.finished(*work.by_separation(activations))
    artifact = replace(artifact, description=description, provenance=_of_all(artifact, examples, hold_out))
    return calibrated(
        lm, artifact, target_kl=target_kl, percentile=percentile, texts=texts, progress=progress, cancel=cancel
    )


def _of_all(artifact: Artifact, examples: ContrastSet, hold_out: float) -> Provenance:
    """The provenance with the whole set's hash: by it a judge recognises the texts and what was held out of them."""
    return replace(artifact.provenance, examples_sha256=examples.sha256, hold_out=hold_out)


@dataclass(frozen=True)
class _Work:
    """Building one artifact, step by step."""

    lm: LanguageModel
    examples: ContrastSet
    plan: BuildPlan
    name: str
    progress: Progress
    cancel: threading.Event | None

    def read(self, layers: tuple[int, ...] | None = None) -> Activations:
        plan = self.plan if layers is None else replace(self.plan, layers=layers)
        split = self.examples.split(HELD_OUT_SHARE, seed=_SPLIT_SEED, at_most=HELD_OUT_AT_MOST)
        return read_plan(self.lm, self.examples, split, plan, self.progress, self.cancel)

    def by_separation(self, activations: Activations) -> tuple[Artifact, Activations, Provenance]:
        """At the layers given, or at the one that separates held-out examples best."""
        separation = separations(activations)
        chosen, why = choose(self.plan, separation, activations.held_out)
        provenance = _provenance(self.examples, activations, self.plan, separation, why)
        if self.plan.method.needs_rows and not set(chosen) <= set(activations.rows):
            activations = self.read(chosen)
        check_cancelled(self.cancel, "Building")
        self.progress(f"Computing {self.plan.method.name}")
        return _computed(self.lm, self.plan, activations, chosen, self.name), activations, provenance

    def by_effect(
        self,
        activations: Activations,
        texts: UnsteeredTexts,
        compared_on: ContrastSet,
        target_kl: float,
        percentile: float,
    ) -> tuple[Artifact, Activations, Provenance]:
        """At the choice of layers that does most to held-out texts at equal KL."""
        separation = separations(activations)
        neutral = neutral_places(self.lm, texts, activations.residual, self.plan.framing, cancel=self.cancel)
        candidates = [
            Candidate(label, chosen, _computed(self.lm, self.plan, activations, chosen, self.name))
            for label, chosen in _candidates(self.plan, separation, neutral)
        ]
        held_out = labelled_texts(
            self.lm, compared_on.positive, compared_on.negative, self.plan.framing, name=self.examples.name
        )
        compared = compare(
            self.lm, candidates, texts, held_out, neutral,
            target_kl=target_kl, percentile=percentile, progress=self.progress, cancel=self.cancel,
        )  # fmt: skip
        provenance = _provenance(self.examples, activations, self.plan, separation, reason(compared))
        figures = tuple(one.figures(separation) for one in compared)
        return compared[0].artifact, activations, replace(provenance, candidates=figures)

    def finished(self, artifact: Artifact, activations: Activations, provenance: Provenance) -> Artifact:
        artifact = _described(self.lm, self.examples, self.plan, activations, artifact)
        return replace(artifact, provenance=provenance)


def _candidates(
    plan: BuildPlan, separation: Mapping[int, float], neutral: Mapping[int, float]
) -> list[tuple[str, tuple[int, ...]]]:
    """A few choices of layers worth comparing, each with its name."""
    last = plan.candidates[-1]
    if plan.method.needs_features:
        singles, spreads = list(plan.candidates), [plan.candidates] if len(plan.candidates) > 1 else []
    else:
        singles = best_single_layers({layer: separation[layer] for layer in plan.candidates}, neutral, _SINGLE_LAYERS)
        upper_half = plan.everywhere[len(plan.everywhere) // 2 :]
        spreads = [
            layers for layers in dict.fromkeys((plan.candidates, upper_half, plan.everywhere)) if len(layers) > 1
        ]
    if plan.method.needs_neurons:
        singles += [last] if all(abs(last - single) >= APART for single in singles) else []
        return [(f"neurons up to layer {single}", tuple(range(single + 1))) for single in sorted(singles)]
    found: list[tuple[str, tuple[int, ...]]] = [(f"layer {single}", (single,)) for single in singles]
    for layers in spreads:
        whole = len(layers) == layers[-1] - layers[0] + 1
        named = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
        found.append((f"layers {named} together", tuple(layers)))
    return found


def build_each(
    lm: LanguageModel,
    examples: ContrastSet,
    *,
    method: str = "caa",
    layers: LayerChoice = "all",
    framing: Framing | None = None,
    tokens: Tokens | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
    **parameters: Any,
) -> dict[int, Artifact]:
    """An artifact for every one of `layers` by itself, from one reading; arguments and errors as for `build`.

    For `sae`, `all` means every layer that has an SAE. For `cna`, the neurons of that layer alone (with
    `rank="write"`, those that write its own class difference).
    """
    plan = make_plan(lm, method, layers, framing, tokens, parameters, progress)
    plan = replace(plan, layers=plan.candidates, reason="every layer by itself")
    split = examples.split(HELD_OUT_SHARE, seed=_SPLIT_SEED, at_most=HELD_OUT_AT_MOST)
    activations = read_plan(lm, examples, split, plan, progress, cancel, every_residual=True)
    provenance = _provenance(examples, activations, plan, separations(activations), plan.reason)
    skipped = set(plan.parameters.get("skip_layers", ()))
    artifacts = {}
    for layer in (layer for layer in plan.candidates if layer not in skipped):
        check_cancelled(cancel, "Building")
        progress(f"Computing {method} at layer {layer}")
        name = safe_name(f"{examples.name}-{method}-{layer}")
        artifact = _computed(lm, plan, activations, (layer,), name)
        artifacts[layer] = replace(_described(lm, examples, plan, activations, artifact), provenance=provenance)
    return artifacts


def _computed(
    lm: LanguageModel, plan: BuildPlan, activations: Activations, layers: tuple[int, ...], name: str
) -> Artifact:
    return plan.method.function(
        activations,
        layers,
        name=name,
        tensors=Tensors(
            columns=lm.write_columns,
            decoders={layer: sae.decoder for layer, sae in plan.saes.items()},
            output_scores=lambda layer, rows: output_scores(lm, layer, rows, activations.norms[layer]),
        ),
        parameters=plan.parameters,
    )


def _described(
    lm: LanguageModel, examples: ContrastSet, plan: BuildPlan, activations: Activations, artifact: Artifact
) -> Artifact:
    """The artifact with its features, where it has some, in words."""
    if not isinstance(artifact, SteeringVector) or not artifact.features:
        return artifact
    texts = [*examples.positive, *examples.negative]
    features = describe_features(
        lm,
        artifact.features,
        plan.saes,
        activations,
        texts,
        _request(plan, len(texts), lm.shape.d_model),
        contexts=plan.parameters["contexts"],
    )
    names = {str(layer): plan.saes[layer].name for layer in artifact.layers}
    return replace(artifact, features=features, parameters={**artifact.parameters, "sae": names})


def _provenance(
    examples: ContrastSet,
    activations: Activations,
    plan: BuildPlan,
    separation: Mapping[int, float],
    reason: str,
) -> Provenance:
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=VERSION,
        examples=examples.name,
        examples_sha256=examples.sha256,
        n_positive=len(examples.positive),
        n_negative=len(examples.negative),
        n_cut=activations.n_cut,
        dropped=dict(examples.dropped),
        framing=plan.framing,
        tokens=plan.tokens,
        layer_choice=reason,
        separation={layer: round(value, 4) for layer, value in separation.items()},
    )
