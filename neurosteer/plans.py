"""A plan: one recipe per row of a batch, compiled into what each hooked layer adds, projects out and multiplies.

However many artifacts are mixed, a hooked block costs one add (and one projection where something is ablated, one
small product where features are clamped), a hooked MLP one multiply-add on the neurons named. Nothing is left on the
model after the `with` block.

At one block, what is ablated goes first; then features are clamped, all of which read the stream that ablation left,
whatever the others do to it; then pushes are added, which a clamp at that block therefore does not undo.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts import VECTOR_OPERATIONS, NeuronCircuit, SteeringVector, unit
from neurosteer.hooks import CallHook, Hook, InputHook, OutputHook, hooked
from neurosteer.models import LanguageModel
from neurosteer.recipes import Positions, Recipe, Use


@dataclass(frozen=True)
class Ablation:
    """Per row an orthonormal `basis` `[batch, k, d_model]` and the `shares` of it to take out, `[batch, 1, k]`."""

    basis: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Clamp:
    """Per row k SAE features to hold at a value: `encoders` and `directions` `[batch, k, d_model]`; their `biases`,
    `thresholds`, `values` and the `shares` of the way to go, `[batch, 1, k]`. Share 0 where a row has fewer.

    All are float32 whatever the model computes in, and so is the sum: an activation, and what is left of a stream
    when a feature is taken out, are small differences of large numbers.
    """

    encoders: Tensor
    directions: Tensor
    biases: Tensor
    thresholds: Tensor
    values: Tensor
    shares: Tensor

    def to(self, device: torch.device) -> "Clamp":
        if self.encoders.device == device:
            return self
        return Clamp(*(getattr(self, entry.name).to(device) for entry in fields(self)))

    def __call__(self, hidden: Tensor) -> Tensor:
        """x + share × (value − activation) × direction, `[batch, seq, d_model]` in the dtype of `hidden`."""
        before = torch.bmm(hidden.float(), self.encoders.transpose(1, 2)) + self.biases
        active = before.masked_fill(before <= self.thresholds, 0.0)
        steps = (self.values - active) * self.shares
        return (hidden + torch.bmm(steps, self.directions)).to(hidden.dtype)


@dataclass(frozen=True)
class NeuronChange:
    """`neurons` `[n]`; row by row what they are multiplied by and what is added then, both `[batch, 1, n]`."""

    neurons: Tensor
    multipliers: Tensor
    shifts: Tensor


@dataclass(frozen=True)
class Plan:
    """What to write, by layer, for a batch of rows, and where in each. `additions[L]` is `[batch, 1, d_model]`."""

    additions: dict[int, Tensor]
    ablations: dict[int, Ablation]
    clamps: dict[int, Clamp]
    changes: dict[int, NeuronChange]
    positions: tuple[Positions, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.additions or self.ablations or self.clamps or self.changes)

    def select(self, rows: Sequence[int]) -> "Plan":
        """The plan of these rows alone."""
        kept = torch.tensor(rows, dtype=torch.long)
        return Plan(
            additions={layer: _rows(tensor, kept) for layer, tensor in self.additions.items()},
            ablations={
                layer: Ablation(_rows(found.basis, kept), _rows(found.shares, kept))
                for layer, found in self.ablations.items()
            },
            clamps={
                layer: Clamp(*(_rows(getattr(clamp, entry.name), kept) for entry in fields(clamp)))
                for layer, clamp in self.clamps.items()
            },
            changes={
                layer: NeuronChange(change.neurons, _rows(change.multipliers, kept), _rows(change.shifts, kept))
                for layer, change in self.changes.items()
            },
            positions=tuple(self.positions[row] for row in rows),
        )


def compile_plan(
    lm: LanguageModel, recipes: Sequence[Recipe], positions: Positions | Sequence[Positions] = "all"
) -> Plan:
    """One plan for a batch whose row i follows `recipes[i]`, at the same positions in all rows or at `positions[i]`."""
    vectors: dict[str, list[list[Use]]] = {operation: [] for operation in VECTOR_OPERATIONS}
    circuits: list[list[Use]] = []
    for recipe in recipes:
        uses = [use for use in recipe.uses if use.has_effect]
        for operation, rows in vectors.items():
            rows.append([use for use in uses if use.artifact.operation == operation])
        circuits.append([use for use in uses if isinstance(use.artifact, NeuronCircuit)])
    additions = _additions(vectors["add"], lm.shape.d_model)
    ablations = _ablations(vectors["ablate"], lm.shape.d_model)
    clamps = _clamps(vectors["clamp"], lm.shape.d_model)
    return Plan(
        additions={layer: tensor.to(lm.device, lm.dtype) for layer, tensor in additions.items()},
        ablations={
            layer: Ablation(found.basis.to(lm.device, lm.dtype), found.shares.to(lm.device, lm.dtype))
            for layer, found in ablations.items()
        },
        clamps={layer: clamp.to(lm.device) for layer, clamp in clamps.items()},
        changes=_changes(circuits, lm.device, lm.dtype),
        positions=(positions,) * len(recipes) if isinstance(positions, str) else tuple(positions),
    )


@contextmanager
def applied(lm: LanguageModel, plan: Plan, *, prompt_width: int | Sequence[int]) -> Iterator[None]:
    """Steer what the calling thread runs through `lm.model` inside the `with` block.

    The batch must have the plan's rows. The prompts end, padding on the left included, with column `prompt_width`: the
    same for all rows or each row's own. Padding (0 in the attention mask) is never steered. Works with and without a
    KV cache.
    """
    if plan.is_empty:
        yield
        return
    window = _Window(plan.positions, prompt_width)
    hooks: list[Hook] = [CallHook(lm.decoder, window.begin)]
    for layer in sorted({*plan.additions, *plan.ablations, *plan.clamps}):
        hooks.append(OutputHook(lm.blocks[layer], _residual_writer(plan, layer, window)))
    for layer, change in plan.changes.items():
        hooks.append(InputHook(lm.down_projections[layer], _neuron_writer(change, window)))
    with hooked(hooks):
        yield


class _Window:
    """Which of the positions in the forward pass under way are to be steered."""

    def __init__(self, positions: Sequence[Positions], prompt_width: int | Sequence[int]) -> None:
        self.everywhere = all(position == "all" for position in positions)
        self.in_prompts = torch.tensor([position != "generated" for position in positions])[:, None]
        self.in_texts = torch.tensor([position != "prompt" for position in positions])[:, None]
        self.prompt_width = torch.tensor(prompt_width).reshape(-1, 1)
        self.steers_any = True
        self.mask: Tensor | None = None  # [batch, seq, 1], None when every position is steered

    def begin(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = named.get("input_ids")
        if inputs is None:
            inputs = named["inputs_embeds"] if named.get("inputs_embeds") is not None else arguments[0]
        width = inputs.shape[1]
        attention = named.get("attention_mask")
        if isinstance(attention, Tensor) and attention.dim() == 2:
            total = attention.shape[1]
            kept = attention[:, total - width :].bool()
        else:
            cache = named.get("past_key_values")
            total = width + (cache.get_seq_length() if cache is not None else 0)
            kept = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        if not self.everywhere:
            in_prompt = torch.arange(total - width, total) < self.prompt_width
            kept = kept & torch.where(in_prompt, self.in_prompts, self.in_texts).to(kept.device)
        self.steers_any = bool(kept.any())
        self.mask = None if kept.all() else kept[..., None]

    def blend(self, hidden: Tensor, changed: Tensor) -> Tensor:
        """`changed` where steered, `hidden` elsewhere."""
        return changed if self.mask is None else torch.where(self.mask.to(hidden.device), changed, hidden)


def _residual_writer(plan: Plan, layer: int, window: _Window) -> Callable[[Tensor], Tensor | None]:
    addition = plan.additions.get(layer)
    ablation = plan.ablations.get(layer)
    clamp = plan.clamps.get(layer)

    def write(hidden: Tensor) -> Tensor | None:
        nonlocal addition, ablation, clamp
        if not window.steers_any:
            return None
        changed = hidden
        if ablation is not None:
            ablation = Ablation(ablation.basis.to(hidden.device), ablation.shares.to(hidden.device))
            along = torch.bmm(changed, ablation.basis.transpose(1, 2)) * ablation.shares
            changed = changed - torch.bmm(along, ablation.basis)
        if clamp is not None:
            clamp = clamp.to(hidden.device)
            changed = clamp(changed)
        if addition is not None:
            addition = addition.to(hidden.device)
            changed = changed + addition
        return window.blend(hidden, changed)

    return write


def _neuron_writer(change: NeuronChange, window: _Window) -> Callable[[Tensor], Tensor | None]:
    def write(hidden: Tensor) -> Tensor | None:
        nonlocal change
        if not window.steers_any:
            return None
        if change.neurons.device != hidden.device:
            device = hidden.device
            change = NeuronChange(change.neurons.to(device), change.multipliers.to(device), change.shifts.to(device))
        old = hidden[..., change.neurons]
        new = window.blend(old, old * change.multipliers + change.shifts)
        return hidden.index_copy(-1, change.neurons, new)

    return write


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)]


# --- compiling -------------------------------------------------------------------------------------------------------


def _additions(rows: Sequence[Sequence[Use]], width: int) -> dict[int, Tensor]:
    """Per layer the sum of the row's pushes: dose × median norm × unit direction; a vector's layers share its dose."""
    sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(len(rows), 1, width))
    for row, uses in enumerate(rows):
        for use in uses:
            vector = use.artifact
            assert isinstance(vector, SteeringVector)
            for layer, direction in vector.directions.items():
                push = use.amount / len(vector.directions) * vector.norms[layer]
                sums[layer][row, 0] += push * unit(direction)
    return dict(sums)


def _ablations(rows: Sequence[Sequence[Use]], width: int) -> dict[int, Ablation]:
    by_layer: dict[int, list[list[tuple[Tensor, float]]]] = defaultdict(lambda: [[] for _ in rows])
    for row, uses in enumerate(rows):
        for use in uses:
            assert isinstance(use.artifact, SteeringVector)
            for layer, direction in use.artifact.directions.items():
                by_layer[layer][row].append((direction, use.amount))
    return {layer: _stacked_bases(found, width) for layer, found in by_layer.items()}


def _stacked_bases(rows: Sequence[Sequence[tuple[Tensor, float]]], width: int) -> Ablation:
    """Gram-Schmidt per row, so that two overlapping directions are not taken out twice."""
    most = max(map(len, rows))
    basis, shares = torch.zeros(len(rows), most, width), torch.zeros(len(rows), 1, most)
    for row, found in enumerate(rows):
        for place, (direction, share) in enumerate(found):
            whole = unit(direction)
            rest = whole - basis[row].T @ (basis[row] @ whole)
            if rest.norm() > 1e-4:  # else it lies within the directions before it
                basis[row, place] = rest / rest.norm()
                shares[row, 0, place] = share
    return Ablation(basis, shares)


def _clamps(rows: Sequence[Sequence[Use]], width: int) -> dict[int, Clamp]:
    by_layer: dict[int, list[list[Use]]] = defaultdict(lambda: [[] for _ in rows])
    for row, uses in enumerate(rows):
        for use in uses:
            for layer in use.artifact.layers:
                by_layer[layer][row].append(use)
    return {layer: _stacked_clamps(layer, found, width) for layer, found in by_layer.items()}


def _stacked_clamps(layer: int, rows: Sequence[Sequence[Use]], width: int) -> Clamp:
    most = max(map(len, rows))
    encoders, directions = torch.zeros(2, len(rows), most, width)
    biases, thresholds, values, shares = torch.zeros(4, len(rows), 1, most)
    for row, uses in enumerate(rows):
        for place, use in enumerate(uses):
            assert isinstance(use.artifact, SteeringVector)
            encoder = use.artifact.encoders[layer]
            # Reading x without its mean is the same as reading x with weights without theirs.
            encoders[row, place] = encoder.weights - encoder.weights.mean() if encoder.centred else encoder.weights
            directions[row, place] = use.artifact.directions[layer]
            biases[row, 0, place] = encoder.bias
            thresholds[row, 0, place] = max(encoder.threshold, 0.0)
            values[row, 0, place] = torch.tensor(use.amount)  # beyond what float32 holds it is infinite
            shares[row, 0, place] = use.share
    return Clamp(encoders, directions, biases, thresholds, values, shares)


def _changes(rows: Sequence[Sequence[Use]], device: torch.device, dtype: torch.dtype) -> dict[int, NeuronChange]:
    """Per layer the union of the circuits' neurons; multipliers of circuits that share one multiply, shifts add up."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for use in (use for uses in rows for use in uses):
        assert isinstance(use.artifact, NeuronCircuit)
        for layer, neuron in zip(use.artifact.neuron_layers.tolist(), use.artifact.neurons.tolist(), strict=True):
            wanted[layer].add(neuron)
    changes = {}
    for layer, neurons in sorted(wanted.items()):
        ordered = torch.tensor(sorted(neurons))
        multipliers, shifts = torch.ones(len(rows), 1, len(ordered)), torch.zeros(len(rows), 1, len(ordered))
        for row, uses in enumerate(rows):
            for use in uses:
                _apply_circuit(use, layer, ordered, multipliers[row, 0], shifts[row, 0])
        changes[layer] = NeuronChange(ordered.to(device), multipliers.to(device, dtype), shifts.to(device, dtype))
    return changes


def _apply_circuit(use: Use, layer: int, ordered: Tensor, multipliers: Tensor, shifts: Tensor) -> None:
    circuit = use.artifact
    assert isinstance(circuit, NeuronCircuit)
    here = circuit.neuron_layers == layer
    places = torch.searchsorted(ordered, circuit.neurons[here].long())
    if circuit.operation == "scale":
        multipliers[places] *= use.amount
    else:
        shifts[places] += use.amount * circuit.differences[here]
