"""What is done to the activations of one layer: tensors with a row for each row of the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


class Operation:
    """What is done to the activations of one layer: a dataclass of tensors."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """The same on `device`; its floats in `dtype`, where one is given."""
        return type(self)(
            *(tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in self.tensors)
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, entry.name) for entry in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Projection(Operation):
    """Per row an orthonormal `basis` `[batch, k, d_model]` and the `shares` of it to take out, `[batch, 1, k]`."""

    basis: Tensor
    shares: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        along = torch.bmm(hidden, self.basis.transpose(1, 2)) * self.shares
        return hidden - torch.bmm(along, self.basis)


@dataclass(frozen=True)
class Clamp(Operation):
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

    def __call__(self, hidden: Tensor) -> Tensor:
        """x + share × (value − activation) × direction, `[batch, seq, d_model]` in the dtype of `hidden`."""
        before = torch.bmm(hidden.float(), self.encoders.transpose(1, 2)) + self.biases
        active = before.masked_fill(before <= self.thresholds, 0.0)
        steps = (self.values - active) * self.shares
        return (hidden + torch.bmm(steps, self.directions)).to(hidden.dtype)


@dataclass(frozen=True)
class NeuronChange(Operation):
    """`neurons` `[n]`; row by row what they are multiplied by and what is added then, both `[batch, 1, n]`."""

    neurons: Tensor
    multipliers: Tensor
    shifts: Tensor


# --- joining ---------------------------------------------------------------------------------------------------------


def join_tensors(parts: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    """`[rows[i], a, b]` tensors one after another, with zeros where one is smaller or missing."""
    present = [part for part in parts if part is not None]
    sizes = [max(part.shape[dim] for part in present) for dim in (1, 2)]
    whole = present[0].new_zeros(sum(rows), *sizes)
    for part, place in zip(parts, whole.split(list(rows)), strict=True):
        if part is not None:
            place[:, : part.shape[1], : part.shape[2]] = part
    return whole


def join_fields(kind: type, parts: Sequence[Any], rows: Sequence[int]) -> Any:
    """A `Projection` or a `Clamp`, tensor by tensor: zeros stand for none."""
    named = [entry.name for entry in fields(kind)]
    return kind(*(join_tensors([getattr(part, name, None) for part in parts], rows) for name in named))


def join_changes(parts: Sequence[NeuronChange | None], rows: Sequence[int]) -> NeuronChange:
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
