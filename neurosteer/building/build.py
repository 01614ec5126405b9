"""Examples to activations to method to artifact: the one composition."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.provenance import Provenance, made_now
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.layer_choice import Candidate, best_single_layers, compare, neutral_places, reason
from neurosteer.building.layers import LayerChoice
from neurosteer.building.plan import HELD_OUT_SHARE, BuildPlan, make_plan, read_plan, without_short
from neurosteer.building.separation import choose, separations
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.calibration import N_TOKENS, PERCENTILE, TARGET_KL
from neurosteer.measuring.calibration import calibrate as calibrated
from neurosteer.measuring.divergence import UnsteeredTexts, unsteered_texts
from neurosteer.measuring.preference import labelled_texts
from neurosteer.methods.base import Given
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Job, Progress, silent
from neurosteer.reading.request import Tokens
from neurosteer.reading.statistics import Activations
from neurosteer.saes.words import describe_features, output_scores

_FEWEST_TO_COMPARE = 50
_COMPARED_ON = 24  # texts per class: every choice of layers costs two forward passes over them
_SINGLE_LAYERS = 2

logger = logging.getLogger(__name__)


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
            (single layers that separate held-out examples well, spreads over many layers) are brought to the same KL
            and measured on held-out texts; of those within one standard error and a twentieth of the largest effect,
            the one with the fewest layers is taken. Without `calibrate`, or with fewer than 50 texts of a class, the
            layer of the middle 20 to 80% that separates held-out examples best. For `cna`, the layers
            searched for neurons; with `rank="write"` the last of them is the reference layer. For `sae`, those of its
            SAEs.
        framing: `raw`, `prompt` or `answer` (see `LanguageModel.frame`); by default `answer` for chat models. Examples
            with prompts are read after them; only their own tokens count.
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
    job = Job(progress, cancel)
    plan = make_plan(lm, method, layers, framing, tokens, parameters, progress)
    for warning in plan.warnings(examples):
        logger.warning(warning)
    training = examples.parts(hold_out, seed=HOLD_OUT_SEED)[0] if hold_out else examples
    training = without_short(lm, training, plan, progress)
    compared_on = None
    if calibrate and plan.leaves_a_choice and min(len(training.positive), len(training.negative)) >= _FEWEST_TO_COMPARE:
        training, compared_on = training.parts(HELD_OUT_SHARE, seed=HOLD_OUT_SEED, at_most=_COMPARED_ON)
        if plan.method.spreads and not plan.method.needs_rows:
            plan = replace(plan, everywhere=tuple(range(lm.n_layers)))
    work = _Work(lm, training, plan, job)
    activations = work.read()
    texts = unsteered_texts(lm, calibration_prompts(), N_TOKENS, **job.named) if calibrate else None
    named = safe_name(name or f"{examples.name}-{method}")
    if texts is not None and compared_on is not None and set(plan.request().rows) <= set(activations.rows):
        made = work.by_effect(activations, named, texts, compared_on, target_kl, percentile)
    else:
        made = work.by_separation(activations, named)
    artifact = work.finished(made)
    # By the hash of the whole set a judge recognises the texts, and by the share what was held out of them.
    source = replace(artifact.provenance, examples_sha256=examples.sha256, hold_out=hold_out)
    artifact = replace(artifact, description=description, provenance=source)
    if texts is None:
        return artifact
    return calibrated(lm, artifact, target_kl=target_kl, percentile=percentile, texts=texts, **job.named)


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
    job = Job(progress, cancel)
    plan = make_plan(lm, method, layers, framing, tokens, parameters, progress)
    plan = replace(plan, layers=plan.candidates, reason="every layer by itself")
    work = _Work(lm, without_short(lm, examples, plan, progress), plan, job)
    activations = work.read(every_residual=True)
    artifacts = {}
    for layer in plan.method.usable(plan.candidates, plan.parameters):
        job.check("Building")
        progress(f"Computing {method} at layer {layer}")
        artifact = work.computed(activations, (layer,), safe_name(f"{examples.name}-{method}-{layer}"))
        artifact = work.finished(_Made(artifact, activations, plan.reason))
        artifacts[layer] = replace(artifact, provenance=replace(artifact.provenance, examples_sha256=examples.sha256))
    return artifacts


class _Made(NamedTuple):
    """An artifact as its method computed it, what it was computed from, and why at these layers."""

    artifact: Artifact
    activations: Activations
    reason: str
    candidates: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class _Work:
    """Building from one set of examples, step by step."""

    lm: LanguageModel
    examples: ContrastSet
    plan: BuildPlan
    job: Job

    def read(self, layers: tuple[int, ...] | None = None, *, every_residual: bool = False) -> Activations:
        plan = self.plan if layers is None else replace(self.plan, layers=layers, candidates=layers)
        return read_plan(self.lm, self.examples, plan, self.job, every_residual=every_residual)

    def by_separation(self, activations: Activations, name: str) -> _Made:
        """At the layers given, or at the one that separates held-out examples best."""
        chosen, why = choose(self.plan, separations(activations), activations.held_out)
        rows = activations
        if self.plan.method.needs_rows and not set(chosen) <= set(activations.rows):
            rows = self.read(chosen)
        self.job.check("Building")
        self.job.progress(f"Computing {self.plan.method.name}")
        return _Made(self.computed(rows, chosen, name), activations, why)

    def by_effect(
        self,
        activations: Activations,
        name: str,
        texts: UnsteeredTexts,
        compared_on: ContrastSet,
        target_kl: float,
        percentile: float,
    ) -> _Made:
        """At the choice of layers that does most to held-out texts at equal KL, or a simpler one that does as much."""
        lm, plan, separation = self.lm, self.plan, separations(activations)
        neutral = neutral_places(lm, texts, activations.residual, plan.framing, self.job)
        separating = {layer: separation[layer] for layer in plan.candidates}
        best = best_single_layers(separating, neutral, _SINGLE_LAYERS)
        candidates = [
            Candidate(label, layers, self.computed(activations, layers, name))
            for label, layers in plan.method.layer_choices(plan.candidates, plan.everywhere, best)
        ]
        held_out = labelled_texts(
            lm, compared_on.positive, compared_on.negative, plan.framing, name=self.examples.name,
            prompts=compared_on.prompts,
        )  # fmt: skip
        compared = compare(
            lm, candidates, texts, held_out, neutral, target_kl=target_kl, percentile=percentile, job=self.job
        )
        figures = tuple(one.figures(separation) for one in compared)
        return _Made(compared[0].artifact, activations, reason(compared), figures)

    def computed(self, activations: Activations, layers: tuple[int, ...], name: str) -> Artifact:
        lm, plan = self.lm, self.plan
        given = Given(
            activations,
            layers,
            name,
            plan.parameters,
            columns=lm.write_columns,
            decoders={layer: sae.decoder for layer, sae in plan.saes.items()},
            output_scores=lambda layer, rows: output_scores(lm, layer, rows, activations.norms[layer]),
        )
        return plan.method.function(given)

    def finished(self, made: _Made) -> Artifact:
        """With its features, where it has some, in words, and with where it comes from."""
        artifact, plan = made.artifact, self.plan
        if isinstance(artifact, SteeringVector) and artifact.features:
            features = describe_features(
                self.lm,
                artifact.features,
                plan.saes,
                made.activations,
                [*self.examples.positive, *self.examples.negative],
                plan.request(),
                prompts=self.examples.prompts,
                contexts=plan.parameters["contexts"],
            )
            names = {str(layer): plan.saes[layer].name for layer in artifact.layers}
            artifact = replace(artifact, features=features, parameters={**artifact.parameters, "sae": names})
        return replace(artifact, provenance=self._provenance(made))

    def _provenance(self, made: _Made) -> Provenance:
        examples, plan = self.examples, self.plan
        return made_now(
            examples=examples.name,
            examples_sha256=examples.sha256,
            n_positive=len(examples.positive),
            n_negative=len(examples.negative),
            n_cut=made.activations.n_cut,
            dropped=dict(examples.dropped),
            framing=plan.framing,
            tokens=plan.tokens,
            layer_choice=made.reason,
            separation={layer: round(value, 4) for layer, value in separations(made.activations).items()},
            candidates=made.candidates,
            n_prompts=len({*examples.positive_prompts, *examples.negative_prompts}),
            warnings=plan.warnings(examples),
            template_options=dict(self.lm.template_options) if self.lm.chat else {},
        )
