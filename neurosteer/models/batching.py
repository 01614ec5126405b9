"""Texts of similar length in batches of bounded size, and token ids as one tensor."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor


class TokenText(Protocol):
    """Whatever has token ids."""

    @property
    def ids(self) -> Sequence[int]: ...


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token ids as one batch filled up on the right, `[batch, seq]`: a causal model never looks there."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


def length_batches(framed: Sequence[TokenText], budget: int) -> Iterator[list[int]]:
    """Positions of texts in batches of similar length; a batch, padded, holds at most `budget` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(framed)), key=lambda position: len(framed[position].ids)):
        if batch and (len(batch) + 1) * len(framed[index].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
