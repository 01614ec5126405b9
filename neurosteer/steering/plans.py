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
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Positions, Recipe, Use
from neurosteer.artifacts.vector import VECTOR_OPERATIONS, SteeringVector, unit
from neurosteer.models.hooks import CallHook, Hook, InputHook, OutputHook, hooked
from neurosteer.models.language_model import LanguageModel


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


def compile_plan(
    lm: LanguageModel, recipes: Sequence[Recipe], positions: Positions | Sequence[Positions] = "all"
) -> Plan:
    """One plan for a batch whose row i follows `recipes[i]`, at the same positions in all rows or at `positions[i]`."""
    return join_plans(compile_rows(lm, recipes, positions))


def compile_rows(
    lm: LanguageModel, recipes: Sequence[Recipe], positions: Positions | Sequence[Positions] = "all"
) -> list[Plan]:
    """A plan of a single row for each recipe; for `join_plans`, where rows come and go."""
    wanted = [positions] * len(recipes) if isinstance(positions, str) else positions
    different = {id(recipe): recipe for recipe in recipes}  # many rows often share one
    compiled = {key: _compile_row(lm, recipe) for key, recipe in different.items()}
    return [
        replace(compiled[id(recipe)], positions=(position,)) for recipe, position in zip(recipes, wanted, strict=True)
    ]


def join_plans(plans: Sequence[Plan]) -> Plan:
    """One plan whose rows are those of `plans`, one after another."""
    rows = [len(plan.positions) for plan in plans]

    def by_layer(name: str, join: Callable[[Sequence[Any], Sequence[int]], Any]) -> dict[int, Any]:
        parts = [getattr(plan, name) for plan in plans]
        return {layer: join([part.get(layer) for part in parts], rows) for layer in sorted(set().union(*parts))}

    return Plan(
        additions=by_layer("additions", _join_tensors),
        ablations=by_layer("ablations", partial(_join_fields, Ablation)),
        clamps=by_layer("clamps", partial(_join_fields, Clamp)),
        changes=by_layer("changes", _join_changes),
        positions=tuple(position for plan in plans for position in plan.positions),
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
            cache = named.get("cache", named.get("past_key_values"))
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


# --- joining ---------------------------------------------------------------------------------------------------------


def _join_tensors(parts: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    """`[rows[i], a, b]` tensors one after another, with zeros where one is smaller or missing."""
    present = [part for part in parts if part is not None]
    sizes = [max(part.shape[dim] for part in present) for dim in (1, 2)]
    whole = present[0].new_zeros(sum(rows), *sizes)
    for part, place in zip(parts, whole.split(list(rows)), strict=True):
        if part is not None:
            place[:, : part.shape[1], : part.shape[2]] = part
    return whole


def _join_fields(kind: type, parts: Sequence[Any], rows: Sequence[int]) -> Any:
    """An `Ablation` or a `Clamp`, tensor by tensor: zeros stand for none."""
    named = [entry.name for entry in fields(kind)]
    return kind(*(_join_tensors([getattr(part, name, None) for part in parts], rows) for name in named))


def _join_changes(parts: Sequence[NeuronChange | None], rows: Sequence[int]) -> NeuronChange:
    """Over the union of the neurons; where a part does not name one, it stays as it is."""
    present = [part for part in parts if part is not None]
    neurons = torch.unique(torch.cat([part.neurons for part in present]))
    multipliers = present[0].multipliers.new_ones(sum(rows), 1, len(neurons))
    shifts = torch.zeros_like(multipliers)
    each = zip(parts, multipliers.split(list(rows)), shifts.split(list(rows)), strict=True)
    for part, its_multipliers, its_shifts in each:
        if part is not None:
            places = torch.searchsorted(neurons, part.neurons)
            its_multipliers[..., places] = part.multipliers
            its_shifts[..., places] = part.shifts
    return NeuronChange(neurons, multipliers, shifts)


# --- compiling a row -------------------------------------------------------------------------------------------------


def _compile_row(lm: LanguageModel, recipe: Recipe) -> Plan:
    uses = [use for use in recipe.uses if use.has_effect]
    vectors = {name: [use for use in uses if use.artifact.operation == name] for name in VECTOR_OPERATIONS}
    circuits = [use for use in uses if isinstance(use.artifact, NeuronCircuit)]
    width, device, dtype = lm.shape.d_model, lm.device, lm.dtype
    return Plan(
        additions={layer: push.to(device, dtype) for layer, push in _additions(vectors["add"], width).items()},
        ablations={
            layer: Ablation(found.basis.to(device, dtype), found.shares.to(device, dtype))
            for layer, found in _ablations(vectors["ablate"], width).items()
        },
        clamps={layer: clamp.to(device) for layer, clamp in _clamps(vectors["clamp"], width).items()},
        changes=_changes(circuits, device, dtype),
        positions=("all",),
    )


def _additions(uses: Sequence[Use], width: int) -> dict[int, Tensor]:
    """Per layer the sum of the pushes: dose × median norm × unit direction; a vector's layers share its dose."""
    sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(1, 1, width))
    for use in uses:
        vector = use.artifact
        assert isinstance(vector, SteeringVector)
        for layer, direction in vector.directions.items():
            push = use.amount / len(vector.directions) * vector.norms[layer]
            sums[layer][0, 0] += push * unit(direction)
    return dict(sums)


def _ablations(uses: Sequence[Use], width: int) -> dict[int, Ablation]:
    by_layer: dict[int, list[tuple[Tensor, float]]] = defaultdict(list)
    for use in uses:
        assert isinstance(use.artifact, SteeringVector)
        for layer, direction in use.artifact.directions.items():
            by_layer[layer].append((direction, use.amount))
    return {layer: _basis(found, width) for layer, found in by_layer.items()}


def _basis(directions: Sequence[tuple[Tensor, float]], width: int) -> Ablation:
    """Gram-Schmidt, so that two overlapping directions are not taken out twice."""
    basis, shares = torch.zeros(1, len(directions), width), torch.zeros(1, 1, len(directions))
    for place, (direction, share) in enumerate(directions):
        whole = unit(direction)
        rest = whole - basis[0].T @ (basis[0] @ whole)
        if rest.norm() > 1e-4:  # else it lies within the directions before it
            basis[0, place] = rest / rest.norm()
            shares[0, 0, place] = share
    return Ablation(basis, shares)


def _clamps(uses: Sequence[Use], width: int) -> dict[int, Clamp]:
    by_layer: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        for layer in use.artifact.layers:
            by_layer[layer].append(use)
    return {layer: _clamp(layer, found, width) for layer, found in by_layer.items()}


def _clamp(layer: int, uses: Sequence[Use], width: int) -> Clamp:
    encoders, directions = torch.zeros(2, 1, len(uses), width)
    biases, thresholds, values, shares = torch.zeros(4, 1, 1, len(uses))
    for place, use in enumerate(uses):
        assert isinstance(use.artifact, SteeringVector)
        encoder = use.artifact.encoders[layer]
        # Reading x without its mean is the same as reading x with weights without theirs.
        encoders[0, place] = encoder.weights - encoder.weights.mean() if encoder.centred else encoder.weights
        directions[0, place] = use.artifact.directions[layer]
        biases[0, 0, place] = encoder.bias
        thresholds[0, 0, place] = max(encoder.threshold, 0.0)
        values[0, 0, place] = torch.tensor(use.amount)  # beyond what float32 holds it is infinite
        shares[0, 0, place] = use.share
    return Clamp(encoders, directions, biases, thresholds, values, shares)


def _changes(uses: Sequence[Use], device: torch.device, dtype: torch.dtype) -> dict[int, NeuronChange]:
    """Per layer the union of the circuits' neurons; multipliers of circuits that share one multiply, shifts add up."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for use in uses:
        assert isinstance(use.artifact, NeuronCircuit)
        for layer, neuron in zip(use.artifact.neuron_layers.tolist(), use.artifact.neurons.tolist(), strict=True):
            wanted[layer].add(neuron)
    changes = {}
    for layer, neurons in sorted(wanted.items()):
        ordered = torch.tensor(sorted(neurons))
        multipliers, shifts = torch.ones(1, 1, len(ordered)), torch.zeros(1, 1, len(ordered))
        for use in uses:
            _apply_circuit(use, layer, ordered, multipliers[0, 0], shifts[0, 0])
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
