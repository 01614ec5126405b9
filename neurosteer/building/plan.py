"""What a build was asked to do, and what it has to read for that."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neurosteer.building.layers import LayerChoice, layers_shown, parse_layers
from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet, Split
from neurosteer.methods import find_method
from neurosteer.methods.base import Method
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Progress
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request, Tokens
from neurosteer.reading.statistics import Activations
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.saes.loading import load_sae
from neurosteer.saes.offers import EMBEDDED, embedded_saes

HELD_OUT_SHARE = 0.2
HELD_OUT_AT_MOST = 100
AUTO_RANGE = (0.2, 0.8)
MAX_ROW_BYTES = 1 << 30


@dataclass(frozen=True)
class BuildPlan:
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


# --- what to read ----------------------------------------------------------------------------------------------------


def make_plan(
    lm: LanguageModel,
    method_name: str,
    layers: LayerChoice,
    framing: Framing | None,
    tokens: Tokens | None,
    given: Mapping[str, Any],
    progress: Progress,
) -> BuildPlan:
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
        raise UsageError(f"skip_layers leaves no layer of {layers_shown(parsed)} to search.")
    as_in_paper = method.needs_neurons and parameters.get("rank") != "write"
    reason = "layers as given"
    if as_in_paper and parsed is None:
        parsed, reason = tuple(range(lm.n_layers)), "all layers, ranked together as in the paper"
    default_framing: Framing = ("prompt" if as_in_paper else "answer") if lm.chat else "raw"
    low, high = (min(round(share * lm.n_layers), lm.n_layers - 1) for share in AUTO_RANGE)
    return BuildPlan(
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
        raise UsageError(
            f"layers is {layers_shown(layers)}, but the SAEs named read {layers_shown(tuple(sorted(saes)))}."
        )
    return dict(sorted(saes.items()))


def _request(plan: BuildPlan, n_texts: int, d_model: int) -> Request:
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


def read_plan(
    lm: LanguageModel,
    examples: ContrastSet,
    split: Split,
    plan: BuildPlan,
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
