"""Texts of similar length in batches of bounded size."""

from collections.abc import Iterator, Sequence
from typing import Protocol


class TokenText(Protocol):
    """Whatever has token ids."""

    @property
    def ids(self) -> Sequence[int]: ...


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
