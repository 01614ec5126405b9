"""How strongly neurons feed one another: d(target) / d(source) × source in the linearised model."""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neurosteer.circuits.relp.linearised import Attention, LinearPass, batch_tokens_for, linear_pass
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent

MIN_TARGETS = 5
OUTLIER_RATIO = 10.0
_GRADIENT_BYTES = 1 << 28


class Neuron(NamedTuple):
    """A neuron at a position of a prompt."""

    layer: int
    position: int
    neuron: int


class SuperWeight(NamedTuple):
    """A neuron, over all positions, whose edges are outliers: `weight` is their mean |weight|, `ratio` that over the
    median source's."""

    layer: int
    neuron: int
    weight: float
    n_targets: int
    ratio: float


def edge_weights(
    lm: LanguageModel,
    ids: Sequence[int],
    sources: Sequence[Neuron],
    targets: Sequence[Neuron],
    attention: Attention = "full",
    *,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Tensor:
    """Float32 `[n_targets, n_sources]`; 0 where a source does not come before the target in layer and position.

    One forward pass serves all targets. Raises `Cancelled` between parts of the targets.
    """
    weights = torch.zeros(len(targets), len(sources))
    layers = sorted({source.layer for source in sources})
    reached = [place for place, target in enumerate(targets) if layers and target.layer > layers[0]]
    done = 0
    for part, gradients, linear in _gradients(lm, ids, targets, reached, layers, attention):
        check_cancelled(cancel, "Finding edges")
        for layer, gradient in gradients.items():
            here = [place for place, source in enumerate(sources) if source.layer == layer]
            at = torch.tensor([sources[place].position for place in here], device=gradient.device)
            neurons = torch.tensor([sources[place].neuron for place in here], device=gradient.device)
            values = linear.neurons[layer].detach()[0, at, neurons].float()
            found = gradient[:, at, neurons].float() * values
            weights[torch.tensor(part)[:, None], torch.tensor(here)] = found.cpu()
        done += len(part)
        progress(f"Finding edges to {len(targets)} neurons", done / len(reached))
    return weights * _comes_before(sources, targets)


def super_weights(
    weights: Tensor,
    sources: Sequence[Neuron],
    *,
    min_targets: int = MIN_TARGETS,
    ratio: float = OUTLIER_RATIO,
) -> tuple[SuperWeight, ...]:
    """The neurons whose mean |edge weight| is at least `ratio` times the median over all that have `min_targets` edges
    or more, strongest first. `weights` as from `edge_weights`; a neuron's positions count together."""
    edges: dict[tuple[int, int], list[float]] = {}
    for source, column in zip(sources, weights.abs().T.tolist(), strict=True):
        edges.setdefault((source.layer, source.neuron), []).extend(weight for weight in column if weight)
    means = {key: sum(found) / len(found) for key, found in edges.items() if len(found) >= min_targets}
    if not means:
        return ()
    median = max(float(torch.tensor(list(means.values()), dtype=torch.float64).quantile(0.5)), 1e-8)
    outliers = [
        SuperWeight(layer, neuron, mean, len(edges[layer, neuron]), mean / median)
        for (layer, neuron), mean in means.items()
        if mean >= ratio * median
    ]
    return tuple(sorted(outliers, key=lambda one: -one.ratio))


def _comes_before(sources: Sequence[Neuron], targets: Sequence[Neuron]) -> Tensor:
    """1 where a source can reach a target, float32 `[n_targets, n_sources]`."""
    theirs = torch.tensor([[one.layer, one.position] for one in targets]).reshape(-1, 1, 2)
    ours = torch.tensor([[one.layer, one.position] for one in sources]).reshape(1, -1, 2)
    return ((ours[..., 0] < theirs[..., 0]) & (ours[..., 1] <= theirs[..., 1])).float()


def _gradients(
    lm: LanguageModel,
    ids: Sequence[int],
    targets: Sequence[Neuron],
    reached: Sequence[int],
    layers: Sequence[int],
    attention: Attention,
) -> Iterator[tuple[list[int], dict[int, Tensor], LinearPass]]:
    """Parts of the targets with the gradients of each at `layers`, `[n, seq, d_mlp]`, and the pass they come from.

    On a CPU one pass serves all targets, whose gradients are taken together. Elsewhere, where torch's attention kernels
    have no such backward pass, the prompt is repeated once for each target.
    """
    together = lm.device.type == "cpu"
    size = lm.n_layers * lm.shape.d_mlp * len(ids) * 4
    most = max(1, _GRADIENT_BYTES // size if together else batch_tokens_for(lm) // len(ids))
    linear = linear_pass(lm, [ids], attention) if together and reached else None
    for first in range(0, len(reached), most):
        part = list(reached[first : first + most])
        chosen = [targets[place] for place in part]
        below = [layer for layer in layers if layer < max(target.layer for target in chosen)]
        if linear is not None:
            found = _taken_together(linear, chosen, below)
            yield part, dict(zip(below, found, strict=True)), linear
        else:
            repeated = linear_pass(lm, [ids] * len(chosen), attention)
            found = _taken_by_row(repeated, chosen, below)
            yield part, dict(zip(below, found, strict=True)), repeated


def _taken_together(linear: LinearPass, targets: Sequence[Neuron], layers: Sequence[int]) -> list[Tensor]:
    with torch.enable_grad():
        values = torch.stack([linear.neurons[layer][0, at, neuron] for layer, at, neuron in targets])
    units = torch.eye(len(targets), dtype=values.dtype, device=values.device)
    inputs = [linear.neurons[layer] for layer in layers]
    found = torch.autograd.grad(values, inputs, units, retain_graph=True, is_grads_batched=True)
    return [gradient[:, 0] for gradient in found]


def _taken_by_row(linear: LinearPass, targets: Sequence[Neuron], layers: Sequence[int]) -> list[Tensor]:
    with torch.enable_grad():
        values = [linear.neurons[layer][row, at, neuron] for row, (layer, at, neuron) in enumerate(targets)]
        # Layers may be spread over several GPUs.
        total = torch.stack([value.to(linear.logits.device) for value in values]).sum()
    return list(torch.autograd.grad(total, [linear.neurons[layer] for layer in layers]))
