"""`cna`: the MLP neurons that tell the classes apart (Contrastive Neuron Attribution, arXiv 2605.12290)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.circuit import CIRCUIT_OPERATIONS, NeuronCircuit
from neurosteer.artifacts.strength import default_calibration
from neurosteer.errors import UsageError
from neurosteer.methods.base import APART, Given, Layers, Method, Places
from neurosteer.models.language_model import Framing
from neurosteer.reading.request import Request, Tokens
from neurosteer.validation import check_option, is_finite

RANKS = ("difference", "dprime", "write")
SKIPPED_LAYERS = (0, 1)


def contrastive_neurons(given: Given) -> NeuronCircuit:
    """The `top_k` neurons (a count, or a share below 1 of all the model's neurons) of `layers` by `rank`.

    `difference`: by |mean over positives − mean over negatives|, as in the paper. `dprime`: that, divided by the
    neuron's pooled standard deviation. `write`: difference × (down-projection column · unit class difference of the
    residual stream at the last of `layers`), positive values only.
    """
    activations, parameters = given.activations, given.parameters
    searched = _searched(given.layers, parameters)
    scores = torch.cat([_scores(given, layer) for layer in searched])
    differences = torch.cat([activations.neurons[layer].difference for layer in searched])
    chosen = _strongest(scores, _count(given), positive_only=parameters["rank"] == "write")
    width, skipped = activations.model.d_mlp, sorted(set(parameters["skip_layers"]))
    return NeuronCircuit(
        name=given.name,
        model=activations.model,
        method="cna",
        parameters={**parameters, "skip_layers": skipped, "searched_layers": list(searched)},
        neuron_layers=torch.tensor(searched, dtype=torch.int32)[chosen // width],
        neurons=(chosen % width).int(),
        scores=scores[chosen],
        differences=differences[chosen],
        operation=parameters["operation"],
        calibration=default_calibration(parameters["operation"]),
    )


def _searched(layers: Layers, parameters: Mapping[str, Any]) -> Layers:
    found = tuple(layer for layer in layers if layer not in parameters["skip_layers"])
    if not found:
        raise UsageError(f"skip_layers leaves no layer of {', '.join(map(str, layers))} to search.")
    return found


def _scores(given: Given, layer: int) -> Tensor:
    moments, rank = given.activations.neurons[layer], given.parameters["rank"]
    if rank == "difference":
        return moments.difference
    if rank == "dprime":
        spread = ((moments.positive_variance + moments.negative_variance) / 2).sqrt()
        return moments.difference / spread.clamp(min=float(spread.mean()) * 1e-3 + 1e-30)
    target, written = given.activations.residual[given.layers[-1]].difference, given.columns(layer)
    along = written @ (target / target.norm()).to(written.device)  # there: the columns are hundreds of megabytes
    return moments.difference * along.cpu()


def _strongest(scores: Tensor, count: int, *, positive_only: bool) -> Tensor:
    """Positions of the `count` highest |scores| (or positive scores), strongest first."""
    magnitudes = scores.clamp(min=0) if positive_only else scores.abs()
    values, positions = magnitudes.topk(min(count, len(magnitudes)))
    positions = positions[values > 0]
    if not len(positions):
        raise UsageError("No neuron tells the two classes apart; are the two sets of examples different?")
    return positions


def _count(given: Given) -> int:
    top_k, model = given.parameters["top_k"], given.activations.model
    total = model.n_layers * model.d_mlp
    return max(1, int(top_k * total)) if top_k < 1 else int(top_k)


def _check(parameters: Mapping[str, Any]) -> None:
    check_option("rank", parameters["rank"], RANKS)
    check_option("operation", parameters["operation"], CIRCUIT_OPERATIONS)
    top_k = parameters["top_k"]
    if not is_finite(top_k) or not 0 < top_k < 1e9:
        raise UsageError(f"top_k is {top_k!r}; give a count of neurons, or a share below 1 of all neurons.")
    skipped = parameters["skip_layers"]
    if not isinstance(skipped, Sequence) or not all(isinstance(layer, int) for layer in skipped):
        raise UsageError(f"skip_layers is {skipped!r}; give a list of layer numbers.")


class _Neurons(Method):
    """Reads neurons, and searches all layers up to one. Ranked otherwise than by `write` it works as in the paper: over
    all layers, at the last token of a prompt."""

    spreads = False

    def default_framing(self, parameters: Mapping[str, Any], *, chat: bool) -> Framing:
        return "prompt" if chat and _as_in_paper(parameters) else super().default_framing(parameters, chat=chat)

    def default_tokens(self, parameters: Mapping[str, Any], framing: Framing | None) -> Tokens:
        return "last" if _as_in_paper(parameters) else super().default_tokens(parameters, framing)

    def layers_without_choice(self, parameters: Mapping[str, Any], n_layers: int) -> tuple[Layers, str] | None:
        if not _as_in_paper(parameters):
            return None
        return tuple(range(n_layers)), "all layers, ranked together as in the paper"

    def usable(self, layers: Layers, parameters: Mapping[str, Any]) -> Layers:
        return _searched(layers, parameters)

    def request(self, parameters: Mapping[str, Any], places: Places, saes: object) -> Request:
        if places.chosen is None:
            return Request(residual=places.candidates, neurons=tuple(range(places.candidates[-1] + 1)))
        return Request(
            residual=places.chosen[-1:], neurons=places.chosen
        )  # ranking by write needs the last class difference

    def up_to(self, layer: int) -> tuple[Layers, str]:
        return tuple(range(layer + 1)), f"neurons up to layer {layer}, which separates held-out examples"

    def layer_choices(self, candidates: Layers, everywhere: Layers, best: Sequence[int]) -> list[tuple[str, Layers]]:
        last = candidates[-1]
        ends = [*best, last] if all(abs(last - layer) >= APART for layer in best) else best
        return [(f"neurons up to layer {layer}", tuple(range(layer + 1))) for layer in sorted(ends)]


def _as_in_paper(parameters: Mapping[str, Any]) -> bool:
    return parameters["rank"] != "write"


METHOD = _Neurons(
    name="cna",
    function=contrastive_neurons,
    explanation="A circuit: the few hundred single neurons that write the behaviour, instead of one direction.",
    source="Contrastive Neuron Attribution, arXiv 2605.12290",
    kind=NeuronCircuit.kind,
    defaults={"rank": "write", "operation": "shift", "top_k": 0.005, "skip_layers": SKIPPED_LAYERS},
    check=_check,
)
