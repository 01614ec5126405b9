"""Texts of similar length in batches of bounded size, and token ids as one tensor."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor


class TokenText(Protocol):
    """Whatever has token ids."""

    @property
    def ids(self) -> Sequence[int]: ...


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token ids as one batch filled up on the right, `[batch, seq]` of at least one column: a causal model never looks
    there."""
    longest = max(1, *map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


def length_batches(
    framed: Sequence[TokenText],
    budget: float,
    *,
    cost: Callable[[int], float] = float,
    counts: Sequence[int] | None = None,
    most: int = 0,
) -> Iterator[list[int]]:
    """Positions of texts in batches of similar length; a batch, padded, holds at most `budget` tokens.

    `cost` says how many tokens a row of some length counts as, by default as many as it has. Where `counts` are given,
    one for each text, those of a batch add up to at most `most`. A text that is too large by itself is a batch of its
    own. The longest texts come first: what does not fit into memory shows at once.
    """
    batch: list[int] = []
    counted = 0
    for index in sorted(range(len(framed)), key=lambda position: -len(framed[position].ids)):
        count = counts[index] if counts is not None else 0
        if batch and ((len(batch) + 1) * cost(len(framed[batch[0]].ids)) > budget or counted + count > most):
            yield batch
            batch, counted = [], 0
        batch.append(index)
        counted += count
    if batch:
        yield batch
