"""Examples to activations to method to artifact: the one composition."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurosteer.activations import Activations, HeldOut, Request, Tokens, read_activations
from neurosteer.artifacts import Artifact, Provenance, SteeringVector, safe_name
from neurosteer.calibration import N_TOKENS, PERCENTILE, TARGET_KL
from neurosteer.calibration import calibrate as calibrated
from neurosteer.divergence import UnsteeredTexts, unsteered_texts
from neurosteer.errors import UsageError
from neurosteer.examples import HOLD_OUT_SEED, ContrastSet, Split, calibration_prompts
from neurosteer.layer_choice import APART, Candidate, best_single_layers, compare, neutral_places, reason
from neurosteer.methods import find_method
from neurosteer.methods.base import Method, Tensors
from neurosteer.models import Framing, LanguageModel
from neurosteer.preference import labelled_texts
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.readable import describe_features, output_scores
from neurosteer.saes import EMBEDDED, SparseAutoencoder, embedded_saes, load_sae
from neurosteer.version import VERSION

LayerChoice = str | int | Iterable[int]

HELD_OUT_SHARE = 0.2
HELD_OUT_AT_MOST = 100
AUTO_RANGE = (0.2, 0.8)
MAX_ROW_BYTES = 1 << 30
_SPLIT_SEED = 0
_FEWEST_TO_COMPARE = 50
_COMPARED_ON = 12  # texts per class: every choice of layers costs two forward passes over them
_SINGLE_LAYERS = 2


@dataclass(frozen=True)
class _Plan:
    """What to read for a method, and which layers it may use."""

    method: Method
    parameters: dict[str, Any]
    framing: Framing
    tokens: Tokens
    layers: tuple[int, ...] | None  # None: chosen after reading
    candidates: tuple[int, ...]
    reason: str = "layers as given"
    saes: Mapping[int, SparseAutoencoder] = field(default_factory=dict)
    everywhere: tuple[int, ...] = ()  # all layers, where a spread over them is one of the choices

    @property
    def leaves_a_choice(self) -> bool:
        """Whether there are layers to compare."""
        return self.layers is None and len(self.candidates) > 1

    @property
    def rows_needed(self) -> tuple[int, ...]:
        """At which layers every text must be kept to compute the method at any candidate."""
        return self.candidates if self.method.needs_rows else ()


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
    plan = _plan(lm, method, layers, framing, tokens, parameters, progress)
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
    plan: _Plan
    name: str
    progress: Progress
    cancel: threading.Event | None

    def read(self, layers: tuple[int, ...] | None = None) -> Activations:
        plan = self.plan if layers is None else replace(self.plan, layers=layers)
        split = self.examples.split(HELD_OUT_SHARE, seed=_SPLIT_SEED, at_most=HELD_OUT_AT_MOST)
        return _read(self.lm, self.examples, split, plan, self.progress, self.cancel)

    def by_separation(self, activations: Activations) -> tuple[Artifact, Activations, Provenance]:
        """At the layers given, or at the one that separates held-out examples best."""
        separation = _separations(activations)
        chosen, why = _choose(self.plan, separation, activations.held_out)
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
        separation = _separations(activations)
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


def _separations(activations: Activations) -> dict[int, float]:
    return {layer: separation_of(held_out) for layer, held_out in activations.held_out.items()}


def _candidates(
    plan: _Plan, separation: Mapping[int, float], neutral: Mapping[int, float]
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
    plan = _plan(lm, method, layers, framing, tokens, parameters, progress)
    plan = replace(plan, layers=plan.candidates, reason="every layer by itself")
    split = examples.split(HELD_OUT_SHARE, seed=_SPLIT_SEED, at_most=HELD_OUT_AT_MOST)
    activations = _read(lm, examples, split, plan, progress, cancel, every_residual=True)
    provenance = _provenance(examples, activations, plan, _separations(activations), plan.reason)
    skipped = set(plan.parameters.get("skip_layers", ()))
    artifacts = {}
    for layer in (layer for layer in plan.candidates if layer not in skipped):
        check_cancelled(cancel, "Building")
        progress(f"Computing {method} at layer {layer}")
        name = safe_name(f"{examples.name}-{method}-{layer}")
        artifact = _computed(lm, plan, activations, (layer,), name)
        artifacts[layer] = replace(_described(lm, examples, plan, activations, artifact), provenance=provenance)
    return artifacts


def _computed(lm: LanguageModel, plan: _Plan, activations: Activations, layers: tuple[int, ...], name: str) -> Artifact:
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
    lm: LanguageModel, examples: ContrastSet, plan: _Plan, activations: Activations, artifact: Artifact
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


def separation_of(held_out: HeldOut) -> float:
    """How well a layer's class difference orders held-out texts: the share of (positive, negative) pairs in the right
    order along it (ROC AUC; 0.5 is chance)."""
    positive, negative = (rows @ held_out.difference for rows in (held_out.rows.positive, held_out.rows.negative))
    above = (positive[:, None] > negative).float().mean()
    ties = (positive[:, None] == negative).float().mean()
    return float(above + ties / 2)


def parse_layers(layers: LayerChoice, n_layers: int) -> tuple[int, ...] | None:
    """Layer numbers in ascending order, or None for `auto`. Raises `UsageError` naming the allowed forms."""
    if isinstance(layers, str):
        text = layers.strip().lower()
        if text == "auto":
            return None
        if text == "all":
            return tuple(range(n_layers))
        layers = _parse_layer_text(text)
    numbers = (layers,) if isinstance(layers, int) else tuple(layers) if isinstance(layers, Iterable) else (layers,)
    if not numbers or not all(type(number) is int and 0 <= number < n_layers for number in numbers):
        raise UsageError(f"layers is {_shown(numbers)}; the model has layers 0 to {n_layers - 1}.")
    return tuple(sorted(set(numbers)))


def _parse_layer_text(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise UsageError(
                f"layers is {text[:60]!r}; use auto, all, a number (14), a range (10-18) or a list (3,7,9)."
            )
        if dash and not int(first) <= int(last) < int(first) + 10_000:
            raise UsageError(f"layers is {text[:60]!r}; a range runs from the lower layer to the higher.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _shown(numbers: tuple[object, ...]) -> str:
    return (
        ", ".join(f"{number!r:.40}" for number in numbers[:8]) + (", …" if numbers[8:] else "") if numbers else "empty"
    )


# --- what to read ----------------------------------------------------------------------------------------------------


def _plan(
    lm: LanguageModel,
    method_name: str,
    layers: LayerChoice,
    framing: Framing | None,
    tokens: Tokens | None,
    given: Mapping[str, Any],
    progress: Progress,
) -> _Plan:
    method = find_method(method_name)
    parameters = method.parameters(given)
    parsed = parse_layers(layers, lm.n_layers)
    saes: dict[int, SparseAutoencoder] = {}
    if method.needs_features:
        every = isinstance(layers, str) and layers.strip().lower() == "all"
        saes = _saes(lm, parameters["sae"], None if every else parsed, progress)
        parameters["sae"] = [sae.name for sae in saes.values()]
        parsed = tuple(saes) if every else parsed
    if parsed is not None and set(parsed) <= set(parameters.get("skip_layers", ())):
        raise UsageError(f"skip_layers leaves no layer of {_shown(parsed)} to search.")
    as_in_paper = method.needs_neurons and parameters.get("rank") != "write"
    reason = "layers as given"
    if as_in_paper and parsed is None:
        parsed, reason = tuple(range(lm.n_layers)), "all layers, ranked together as in the paper"
    default_framing: Framing = ("prompt" if as_in_paper else "answer") if lm.chat else "raw"
    low, high = (min(round(share * lm.n_layers), lm.n_layers - 1) for share in AUTO_RANGE)
    return _Plan(
        method=method,
        parameters=parameters,
        framing=framing or default_framing,
        tokens=tokens or ("last" if as_in_paper or framing == "prompt" else "mean"),
        layers=parsed,
        candidates=tuple(saes) or parsed or tuple(range(low, high + 1)),
        reason=reason,
        saes=saes,
    )


def _saes(
    lm: LanguageModel,
    named: str | Path | Sequence[str | Path] | None,
    layers: tuple[int, ...] | None,
    progress: Progress,
) -> dict[int, SparseAutoencoder]:
    """The SAEs named, or those shipped for the model, at `layers` (None: all of them), by layer."""
    if named is None and layers is None:
        named = [f"{EMBEDDED}/{layer}" for layer in embedded_saes(lm)] or EMBEDDED  # the latter says what is lacking
    elif named is None:
        named = [f"{EMBEDDED}/{layer}" for layer in layers or ()]
    names = [str(name) for name in ([named] if isinstance(named, str | Path) else named)]
    saes: dict[int, SparseAutoencoder] = {}
    for name in names:
        sae = load_sae(lm, name, progress=progress)
        if sae.layer in saes:
            raise UsageError(
                f"The SAEs {saes[sae.layer].name} and {name} both read layer {sae.layer}; name one a layer."
            )
        saes[sae.layer] = sae
    if layers is not None and set(layers) != set(saes):
        raise UsageError(f"layers is {_shown(layers)}, but the SAEs named read {_shown(tuple(sorted(saes)))}.")
    return dict(sorted(saes.items()))


def _request(plan: _Plan, n_texts: int, d_model: int) -> Request:
    last = plan.candidates[-1]
    if plan.method.needs_features:
        return Request(
            residual=plan.candidates,
            framing=plan.framing,
            tokens=plan.tokens,
            encoders=plan.saes,
            feature_rows=plan.parameters["rank"] == "probe",
            prepend_bos=all(sae.prepend_bos for sae in plan.saes.values()),
        )
    if plan.method.needs_neurons:
        # Only the last layer's class difference serves ranking by write; with `auto` it is chosen among all.
        residual = plan.candidates if plan.layers is None else (last,)
        searched = plan.candidates if plan.layers is not None else tuple(range(last + 1))
        return Request(residual=residual, neurons=searched, framing=plan.framing, tokens=plan.tokens)
    residual = plan.layers or plan.everywhere or tuple(range(last + 1))
    wanted = plan.candidates if plan.method.needs_rows else ()
    if plan.layers is None and len(wanted) * n_texts * d_model * 4 > MAX_ROW_BYTES:
        wanted = ()  # too many to keep at every candidate: choose the layer first, then read again there
    return Request(residual=residual, rows=wanted, framing=plan.framing, tokens=plan.tokens)


def _read(
    lm: LanguageModel,
    examples: ContrastSet,
    split: Split,
    plan: _Plan,
    progress: Progress,
    cancel: threading.Event | None,
    *,
    every_residual: bool = False,
) -> Activations:
    n_texts = len(examples.positive) + len(examples.negative)
    if plan.layers is not None:
        plan = replace(plan, candidates=plan.layers)
    request = _request(plan, n_texts, lm.shape.d_model)
    return read_activations(
        lm,
        examples.positive,
        examples.negative,
        replace(request, residual=plan.candidates) if every_residual else request,
        held_out_positive=split.held_out_positive,
        held_out_negative=split.held_out_negative,
        paired=examples.paired,
        progress=progress,
        cancel=cancel,
    )


# --- what was chosen -------------------------------------------------------------------------------------------------


def _choose(
    plan: _Plan, separation: Mapping[int, float], held_out: Mapping[int, HeldOut]
) -> tuple[tuple[int, ...], str]:
    if plan.layers is not None:
        return plan.layers, plan.reason
    best = max(plan.candidates, key=lambda layer: (separation[layer], _distance(held_out[layer])))
    first, last = plan.candidates[0], plan.candidates[-1]
    whole = len(plan.candidates) == last - first + 1 > 1
    layers = f"{first} to {last}" if whole else ", ".join(map(str, plan.candidates))
    among = f"best among layers {layers} (AUC {separation[best]:.2f})"
    if plan.method.needs_neurons:
        return tuple(range(best + 1)), f"neurons up to layer {best}, which separates held-out examples {among}"
    return (best,), f"layer {best} separates held-out examples {among}"


def _distance(held_out: HeldOut) -> float:
    """Held-out d′ along the class difference: breaks ties where several layers separate perfectly."""
    positive, negative = (
        _along(rows, held_out.difference) for rows in (held_out.rows.positive, held_out.rows.negative)
    )
    spread = ((positive.var(correction=0) + negative.var(correction=0)) / 2).sqrt().clamp(min=1e-12)
    return float((positive.mean() - negative.mean()) / spread)


def _along(rows: Tensor, direction: Tensor) -> Tensor:
    return torch.mv(rows, direction / direction.norm().clamp(min=1e-30))


def _provenance(
    examples: ContrastSet,
    activations: Activations,
    plan: _Plan,
    separation: Mapping[int, float],
    reason: str,
) -> Provenance:
    return Provenance(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
