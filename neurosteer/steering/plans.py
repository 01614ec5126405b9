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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Positions, Recipe, Use
from neurosteer.artifacts.vector import VECTOR_OPERATIONS, SteeringVector, unit
from neurosteer.errors import UsageError
from neurosteer.models.hooks import Hook, InputHook, OutputHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.operations import Clamp, NeuronChange, Projection, join_changes, join_fields, join_tensors

_NO_END = 1 << 60


@dataclass(frozen=True)
class Plan:
    """What to write, by layer, for a batch of rows, and where in each. `additions[L]` is `[batch, 1, d_model]`."""

    additions: dict[int, Tensor]
    projections: dict[int, Projection]
    clamps: dict[int, Clamp]
    changes: dict[int, NeuronChange]
    positions: tuple[Positions, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.additions or self.projections or self.clamps or self.changes)


def compile_plan(
    lm: LanguageModel, recipes: Sequence[Recipe], positions: Positions | Sequence[Positions] = "all"
) -> Plan:
    """One plan for a batch whose row i follows `recipes[i]`, at the same positions in all rows or at `positions[i]`.

    Raises `UsageError` for a recipe of which something is too large for the model's dtype.
    """
    return join_plans(compile_rows(lm, recipes, positions))


def compile_rows(
    lm: LanguageModel, recipes: Sequence[Recipe], positions: Positions | Sequence[Positions] = "all"
) -> list[Plan]:
    """A plan of a single row for each recipe; for `join_plans`, where rows come and go."""
    wanted = [positions] * len(recipes) if isinstance(positions, str) else positions
    compiled = {id(recipe): _placed(lm, _checked(lm, recipe)) for recipe in _different(recipes)}
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
        additions=by_layer("additions", join_tensors),
        projections=by_layer("projections", partial(join_fields, Projection)),
        clamps=by_layer("clamps", partial(join_fields, Clamp)),
        changes=by_layer("changes", join_changes),
        positions=tuple(position for plan in plans for position in plan.positions),
    )


def check_recipes(lm: LanguageModel, recipes: Sequence[Recipe]) -> None:
    """Raise `UsageError` where something of a recipe is too large for the model's dtype."""
    for recipe in _different(recipes):
        _checked(lm, recipe)


def can_hold(lm: LanguageModel, recipe: Recipe) -> bool:
    """Whether all that `recipe` writes is finite in the model's dtype."""
    return _is_finite(_compile_row(lm, recipe))


# --- applying --------------------------------------------------------------------------------------------------------


@contextmanager
def applied(lm: LanguageModel, plan: Plan, where: Tensor | None = None) -> Iterator[None]:
    """Steer what the calling thread runs through `lm.model` inside the `with` block, a batch of the plan's rows.

    `where` `[batch, seq]` says which positions of a pass are steered (see `steered_places`); without it all are, which
    is right for plans whose positions are "all": what is written at padding is read nowhere.
    """
    if where is None and any(position != "all" for position in plan.positions):
        raise ValueError("This plan steers some positions only; say which columns those are (`where`).")
    if plan.is_empty or (where is not None and not where.any()):
        yield
        return
    blend = _Blend(where)
    hooks: list[Hook] = [
        OutputHook(lm.blocks[layer], _residual_writer(plan, layer, blend))
        for layer in sorted({*plan.additions, *plan.projections, *plan.clamps})
    ]
    hooks += [
        InputHook(lm.down_projections[layer], _neuron_writer(change, blend)) for layer, change in plan.changes.items()
    ]
    with hooked(hooks):
        yield


def steered_places(
    positions: Sequence[Positions], columns: range, starts: Sequence[int], prompt_ends: Sequence[int]
) -> Tensor:
    """Which of `columns` of a batch are steered, bool `[batch, len(columns)]`.

    Row i has its first token in column `starts[i]` (before that is padding, which is never steered) and the first token
    after its prompt in column `prompt_ends[i]`; `positions[i]` says which of its columns are steered.
    """
    column = torch.arange(columns.start, columns.stop)
    spans = map(_span, positions, starts, prompt_ends)
    low, high = torch.tensor([(max(low, start), high) for (low, high), start in zip(spans, starts, strict=True)]).T
    return (column >= low[:, None]) & (column < high[:, None])


def _span(positions: Positions, start: int, prompt_end: int) -> tuple[int, int]:
    """The columns from one up to another that are steered of a row."""
    what, _, count = positions.partition(":")
    if what == "prompt":
        return start, prompt_end
    if what == "last":
        return prompt_end - int(count), prompt_end
    if what == "first":
        return prompt_end, prompt_end + int(count)
    return (prompt_end if what == "generated" else start), _NO_END


class _Blend:
    """What is written where a pass is steered, and what was there elsewhere."""

    def __init__(self, where: Tensor | None) -> None:
        self._where = where[..., None] if where is not None and not where.all() else None

    def __call__(self, hidden: Tensor, changed: Tensor) -> Tensor:
        if self._where is None:
            return changed
        self._where = self._where.to(hidden.device)  # once a pass, or once for each device
        return torch.where(self._where, changed, hidden)


def _residual_writer(plan: Plan, layer: int, blend: _Blend) -> Callable[[Tensor], Tensor]:
    projection = plan.projections.get(layer)
    clamp = plan.clamps.get(layer)
    addition = plan.additions.get(layer)

    def write(hidden: Tensor) -> Tensor:
        changed = hidden
        if projection is not None:
            changed = projection.to(hidden.device, hidden.dtype)(changed)
        if clamp is not None:
            changed = clamp.to(hidden.device)(changed)
        if addition is not None:
            changed = changed + addition.to(hidden)
        return blend(hidden, changed)

    return write


def _neuron_writer(change: NeuronChange, blend: _Blend) -> Callable[[Tensor], Tensor]:
    def write(hidden: Tensor) -> Tensor:
        here = change.to(hidden.device, hidden.dtype)
        old = hidden[..., here.neurons]
        return hidden.index_copy(-1, here.neurons, blend(old, old * here.multipliers + here.shifts))

    return write


# --- compiling a row -------------------------------------------------------------------------------------------------


def _different(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Many rows often share a recipe."""
    return list({id(recipe): recipe for recipe in recipes}.values())


def _checked(lm: LanguageModel, recipe: Recipe) -> Plan:
    plan = _compile_row(lm, recipe)
    if not _is_finite(plan):
        use = max(recipe.uses, key=lambda use: abs(use.strength if use.multiplier is None else use.multiplier))
        what = f"strength {use.strength:g}" if use.multiplier is None else f"multiplier {use.multiplier:g}"
        raise UsageError(
            f"{use.artifact.name!r} at {what} comes to more than {str(lm.dtype).removeprefix('torch.')} can hold; "
            "use a smaller one."
        )
    return plan


def _is_finite(plan: Plan) -> bool:
    operations = (*plan.projections.values(), *plan.clamps.values(), *plan.changes.values())
    tensors = [*plan.additions.values(), *(tensor for operation in operations for tensor in operation.tensors)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _placed(lm: LanguageModel, plan: Plan) -> Plan:
    """The plan with what is written at a layer on that layer's device, so that no step copies it there."""
    named = ("additions", "projections", "clamps", "changes")
    return replace(
        plan, **{name: {at: part.to(lm.layer_device(at)) for at, part in getattr(plan, name).items()} for name in named}
    )


def _compile_row(lm: LanguageModel, recipe: Recipe) -> Plan:
    """On the CPU, in the dtype in which it is written."""
    uses = [use for use in recipe.uses if use.has_effect]
    vectors = {name: [use for use in uses if use.artifact.operation == name] for name in VECTOR_OPERATIONS}
    circuits = [use for use in uses if isinstance(use.artifact, NeuronCircuit)]
    width, dtype, cpu = lm.shape.d_model, lm.dtype, torch.device("cpu")
    return Plan(
        additions={layer: push.to(dtype) for layer, push in _additions(vectors["add"], width).items()},
        projections={layer: found.to(cpu, dtype) for layer, found in _projections(vectors["ablate"], width).items()},
        clamps=_clamps(vectors["clamp"], width),
        changes={layer: change.to(cpu, dtype) for layer, change in _changes(circuits).items()},
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


def _projections(uses: Sequence[Use], width: int) -> dict[int, Projection]:
    return {layer: _basis(layer, found, width) for layer, found in _by_layer(uses).items()}


def _by_layer(uses: Sequence[Use]) -> dict[int, list[Use]]:
    found: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        for layer in use.artifact.layers:
            found[layer].append(use)
    return found


def _basis(layer: int, uses: Sequence[Use], width: int) -> Projection:
    """Gram-Schmidt, so that two overlapping directions are not taken out twice."""
    basis, shares = torch.zeros(1, len(uses), width), torch.zeros(1, 1, len(uses))
    for place, use in enumerate(uses):
        assert isinstance(use.artifact, SteeringVector)
        whole = unit(use.artifact.directions[layer])
        rest = whole - basis[0].T @ (basis[0] @ whole)
        if rest.norm() > 1e-4:  # else it lies within the directions before it
            basis[0, place] = rest / rest.norm()
            shares[0, 0, place] = use.amount
    return Projection(basis, shares)


def _clamps(uses: Sequence[Use], width: int) -> dict[int, Clamp]:
    return {layer: _clamp(layer, found, width) for layer, found in _by_layer(uses).items()}


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
        values[0, 0, place] = torch.tensor(use.amount)  # beyond what float32 holds it is infinite, and refused
        shares[0, 0, place] = use.share
    return Clamp(encoders, directions, biases, thresholds, values, shares)


def _changes(uses: Sequence[Use]) -> dict[int, NeuronChange]:
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
        changes[layer] = NeuronChange(ordered, multipliers, shifts)
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
