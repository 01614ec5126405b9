"""What a reading pass is made for, and which positions of its batches are read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from neurosteer.models.framing import FramedText

POSITIVE, NEGATIVE, HELD_OUT = 0, 1, 2  # group of a text: its class, plus 2 when held out


class Sink(Protocol):
    """What a pass is made for: told of each batch, then of each layer's activations in it, then that it is over.

    A batch that began and did not end ran out of memory: what was added in it counts for nothing, its texts come again.
    """

    def begin(self, indices: list[int], items: Sequence[FramedText], longest: int, *, skip_first: bool) -> None: ...

    def add_residual(self, layer: int, hidden: Tensor) -> None: ...

    def add_neurons(self, layer: int, hidden: Tensor) -> None: ...

    def end(self) -> None: ...


def is_readable(item: FramedText) -> bool:
    """Whether a text has a token to read: one of its own, and not the sequence's first, where models keep what has
    nothing to do with the text (the attention sink)."""
    return len(item.ids) > max(item.start, 1)


def read_mask(items: Sequence[FramedText], longest: int, *, skip_first: bool) -> Tensor:
    """Which positions of a batch are read, `[batch, longest]`: a text's own, but not the sequence's first; no padding.

    Without `skip_first` the rows are what follows a beginning that was read before.
    """
    lengths = torch.tensor([len(item.ids) for item in items])
    starts = torch.tensor([max(item.start, 1 if skip_first else 0) for item in items])
    positions = torch.arange(longest)
    return (positions >= starts[:, None]) & (positions < lengths[:, None])


def sum_device(device: torch.device) -> torch.device:
    """Where float64 sums of what is on `device` are kept: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass
class TextBatch:
    """What the hooks need to know of the batch in flight; `weights` `[batch, 1, seq]` sum to 1 over a text's tokens."""

    indices: Tensor
    groups: Tensor
    read: Tensor
    weights: Tensor
    last: Tensor
    starts: Tensor
    norms: dict[int, Tensor] = field(default_factory=dict)
    sums: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # running ones, and what is added at its end
