"""One pass forth and back: what a batch of prompts owes its next tokens to, neuron by neuron."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.circuits.relp.choices import Choice, NextToken
from neurosteer.circuits.relp.linearised import Attention, batch_tokens_for, linear_pass
from neurosteer.models.batching import length_batches
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.memory import halving
from neurosteer.progress import Progress, check_cancelled, silent

Metric = Literal["difference", "logit"]
METRICS: tuple[Metric, ...] = ("difference", "logit")

PER_POSITION = 200
"""How many neurons of a layer are kept at each position, the strongest ones."""


class NeuronScore(NamedTuple):
    """A neuron at a position of the prompt, and its share in the metric."""

    layer: int
    position: int
    neuron: int
    score: float


@dataclass(frozen=True, eq=False)
class PromptAttribution:
    """The shares of one prompt's neurons in its metric.

    `layers`, `positions`, `neurons` int32 and `scores` float32, all `[n]`, strongest first, hold the `per_position`
    strongest of each layer and position; the first position is left out. `strongest` float32 `[n_layers, d_mlp]` is
    each neuron's score at the position where it is largest in absolute value, `activations` the neuron's activation
    there. `by_token` float32 `[n_layers, seq]` adds up all scores of a layer at a position.
    """

    choice: Choice
    counterfactual: NextToken | None
    metric: float
    layers: Tensor
    positions: Tensor
    neurons: Tensor
    scores: Tensor
    strongest: Tensor
    activations: Tensor
    by_token: Tensor

    @property
    def target(self) -> NextToken:
        return self.choice.target


def score_prompts(
    lm: LanguageModel,
    choices: Sequence[Choice],
    *,
    metric: Metric = "difference",
    attention: Attention = "full",
    per_position: int = PER_POSITION,
    within: NeuronCircuit | None = None,
    batch_tokens: int | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> tuple[PromptAttribution, ...]:
    """Gradient × activation of every neuron for each choice, batches of similar length together; options as for
    `attribute`. Raises `Cancelled` between two batches."""

    def run(indices: list[int]) -> Iterator[PromptAttribution]:
        check_cancelled(cancel, "Attribution")
        return _attribute(lm, [choices[index] for index in indices], metric, attention, per_position, within)

    found: dict[int, PromptAttribution] = {}
    batches = length_batches(choices, batch_tokens or batch_tokens_for(lm))
    for indices, scored in halving(lm, batches, run, progress=progress):
        found.update(zip(indices, scored, strict=True))
        progress(f"Attributing {len(choices)} prompts", len(found) / len(choices))
    return tuple(found[index] for index in range(len(choices)))


def _attribute(
    lm: LanguageModel,
    batch: Sequence[Choice],
    metric: Metric,
    attention: Attention,
    per_position: int,
    within: NeuronCircuit | None,
) -> Iterator[PromptAttribution]:
    linear = linear_pass(lm, [choice.ids for choice in batch], attention)
    with torch.enable_grad():
        others = _others(lm, batch, linear.logits) if metric == "difference" else [None] * len(batch)
        metrics = _metrics(batch, others, linear.logits)
        gradients = torch.autograd.grad(metrics.sum(), linear.neurons)
    layers = [
        _LayerScores.of(gradient, neurons.detach(), per_position, _members(within, layer, lm.shape.d_mlp))
        for layer, (gradient, neurons) in enumerate(zip(gradients, linear.neurons, strict=True))
    ]
    values = metrics.tolist()
    return (
        _prompt_attribution(choice, other, values[row], [scores.row(row) for scores in layers])
        for row, (choice, other) in enumerate(zip(batch, others, strict=True))
    )


def _others(lm: LanguageModel, batch: Sequence[Choice], logits: Tensor) -> list[NextToken | None]:
    """The counterfactuals named, or the best token that is not the target."""
    targets = torch.tensor([[choice.target.id] for choice in batch], device=logits.device)
    best = logits.detach().scatter(1, targets, -torch.inf).argmax(-1).tolist()
    return [
        choice.counterfactual or NextToken(other, lm.tokenizer.decode([other]))
        for choice, other in zip(batch, best, strict=True)
    ]


def _metrics(batch: Sequence[Choice], others: Sequence[NextToken | None], logits: Tensor) -> Tensor:
    """Each row's metric, `[batch]`, from `logits` `[batch, vocabulary]`."""
    rows = torch.arange(len(batch), device=logits.device)
    values = logits[rows, torch.tensor([choice.target.id for choice in batch], device=logits.device)]
    named = [other.id for other in others if other is not None]
    return values - logits[rows, torch.tensor(named, device=logits.device)] if named else values


@dataclass(frozen=True)
class _LayerScores:
    """One layer's scores of a batch, reduced. The strongest neurons of each position and their scores are `[batch, seq,
    k]`, `by_token` `[batch, seq]`, `strongest` and `activations` `[batch, d_mlp]`."""

    neurons: Tensor
    scores: Tensor
    by_token: Tensor
    strongest: Tensor
    activations: Tensor

    @classmethod
    def of(cls, gradient: Tensor, neurons: Tensor, per_position: int, members: Tensor | None) -> "_LayerScores":
        scores = gradient.float() * neurons.float()
        scores[:, 0] = 0.0
        if members is not None:
            scores[..., ~members.to(scores.device)] = 0.0
            per_position = int(members.sum())
        kept = scores.abs().topk(min(per_position, scores.shape[-1]), dim=-1, sorted=False).indices
        highest, lowest = scores.amax(1), scores.amin(1)  # many times faster than looking for the place
        strongest = torch.where(highest >= -lowest, highest, lowest)
        there = (scores == strongest[:, None]) & (scores != 0)
        activations = neurons.float().masked_fill(~there, -torch.inf).amax(1).masked_fill(strongest == 0, 0.0)
        parts = (kept.int(), scores.gather(-1, kept), scores.sum(-1), strongest, activations)
        return cls(*(part.cpu() for part in parts))

    def row(self, row: int) -> "_LayerScores":
        parts = (self.neurons, self.scores, self.by_token, self.strongest, self.activations)
        return _LayerScores(*(part[row] for part in parts))


def _prompt_attribution(
    choice: Choice, other: NextToken | None, metric: float, layers: Sequence[_LayerScores]
) -> PromptAttribution:
    length = len(choice.ids)
    scores = torch.cat([one.scores[:length].flatten() for one in layers])
    neurons = torch.cat([one.neurons[:length].flatten() for one in layers])
    numbers, places = [], []
    for layer, one in enumerate(layers):
        width = one.neurons.shape[-1]
        numbers.append(torch.full((length * width,), layer, dtype=torch.int32))
        places.append(torch.arange(length, dtype=torch.int32).repeat_interleave(width))
    order = scores.abs().argsort(descending=True, stable=True)
    order = order[scores[order] != 0]
    return PromptAttribution(
        choice=choice,
        counterfactual=other,
        metric=metric,
        layers=torch.cat(numbers)[order],
        positions=torch.cat(places)[order],
        neurons=neurons[order],
        scores=scores[order],
        strongest=torch.stack([one.strongest for one in layers]),
        activations=torch.stack([one.activations for one in layers]),
        by_token=torch.stack([one.by_token[:length] for one in layers]),
    )


def _members(circuit: NeuronCircuit | None, layer: int, width: int) -> Tensor | None:
    """Which neurons of a layer belong to the circuit, bool `[d_mlp]`; None where all are asked for."""
    if circuit is None:
        return None
    members = torch.zeros(width, dtype=torch.bool)
    members[circuit.neurons[circuit.neuron_layers == layer].long()] = True
    return members
