"""What a build was asked to do, and what it has to read for that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.building.layers import LayerChoice, layers_shown, parse_layers
from neurosteer.errors import ExamplesError, UsageError
from neurosteer.examples.contrast_set import MIN_PER_CLASS, ContrastSet
from neurosteer.methods import find_method
from neurosteer.methods.base import Method, Places
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Job, Progress
from neurosteer.reading.loop import read_activations, readable
from neurosteer.reading.request import Request, Tokens
from neurosteer.reading.statistics import Activations
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.saes.loading import load_sae
from neurosteer.saes.offers import EMBEDDED, embedded_saes

HELD_OUT_SHARE = 0.2
HELD_OUT_AT_MOST = 100
AUTO_RANGE = (0.2, 0.8)
MAX_ROW_BYTES = 1 << 30
TOO_SHORT = "too short to be read"
_SPLIT_SEED = 0


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

    def warnings(self, examples: ContrastSet) -> tuple[str, ...]:
        """Sentences about what makes the method weak on such examples."""
        return (self.method.unpaired,) if self.method.unpaired and not examples.paired else ()

    def request(self) -> Request:
        """What to read, by the method's own rules."""
        places = Places(self.layers, self.candidates, self.everywhere)
        asked = self.method.request(self.parameters, places, self.saes)
        return replace(asked, framing=self.framing, tokens=self.tokens)


def make_plan(
    lm: LanguageModel,
    method_name: str,
    layers: LayerChoice,
    framing: Framing | None,
    tokens: Tokens | None,
    given: Mapping[str, Any],
    progress: Progress,
) -> BuildPlan:
    """Everything that can be refused is refused here, before the model runs.

    Raises `UsageError`, and `ModelError` for a circuit on a model that has no neurons for one.
    """
    method = find_method(method_name)
    if method.kind == NeuronCircuit.kind:
        _ = lm.down_projections  # which raises where the model has none
    parameters = method.parameters(given)
    parsed, reason = parse_layers(layers, lm.n_layers), "layers as given"
    saes: dict[int, SparseAutoencoder] = {}
    if method.needs_features:
        every = isinstance(layers, str) and layers.strip().lower() == "all"
        saes = _saes(lm, parameters["sae"], None if every else parsed, progress)
        parameters["sae"] = [sae.name for sae in saes.values()]
        parsed = tuple(saes) if every else parsed
    if parsed is None:
        parsed, reason = method.layers_without_choice(parameters, lm.n_layers) or (None, reason)
    else:
        method.usable(parsed, parameters)
    low, high = (min(round(share * lm.n_layers), lm.n_layers - 1) for share in AUTO_RANGE)
    return BuildPlan(
        method=method,
        parameters=parameters,
        framing=framing or method.default_framing(parameters, chat=lm.chat),
        tokens=tokens or method.default_tokens(parameters, framing),
        layers=parsed,
        candidates=parsed or tuple(saes) or tuple(range(low, high + 1)),
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


def without_short(lm: LanguageModel, examples: ContrastSet, plan: BuildPlan, progress: Progress) -> ContrastSet:
    """The examples without those that are too short to be read under the plan's framing, which `dropped` counts.

    Raises `ExamplesError` where fewer than 2 of a class are left.
    """
    sides = (examples.positive, examples.negative)
    kept = readable(lm, *sides, plan.request(), paired=examples.paired, prompts=examples.prompts)
    n_short = sum(map(len, sides)) - sum(map(len, kept))
    if not n_short:
        return examples
    if min(map(len, kept)) < MIN_PER_CLASS:
        raise ExamplesError(
            f"Only {len(kept[0])} positive and {len(kept[1])} negative texts of {examples.name!r} are long enough to "
            f"be read (of one token none is); {MIN_PER_CLASS} of each are needed: give longer texts."
        )
    progress(f"Left out {n_short} texts that are too short to be read")
    dropped = {**examples.dropped, TOO_SHORT: examples.dropped.get(TOO_SHORT, 0) + n_short}
    return examples.at(*kept, dropped=dropped)


def read_plan(
    lm: LanguageModel, examples: ContrastSet, plan: BuildPlan, job: Job, *, every_residual: bool = False
) -> Activations:
    """The activations that `plan` asks for, and rows of some held-out texts to measure separation on.

    With `every_residual`, class means and separations at all the plan's layers, whatever its method needs.
    """
    request = plan.request()
    if every_residual:
        request = replace(request, residual=plan.candidates)
    n_texts = len(examples.positive) + len(examples.negative)
    if plan.layers is None and len(request.rows) * n_texts * lm.shape.d_model * 4 > MAX_ROW_BYTES:
        request = replace(request, rows=())  # too many to keep everywhere: choose the layer, then read again there
    split = examples.split(HELD_OUT_SHARE, seed=_SPLIT_SEED, at_most=HELD_OUT_AT_MOST)
    return read_activations(
        lm,
        examples.positive,
        examples.negative,
        request,
        prompts=examples.prompts,
        held_out_positive=split.held_out_positive,
        held_out_negative=split.held_out_negative,
        paired=examples.paired,
        **job.named,
    )
