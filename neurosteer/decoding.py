"""Choosing the next tokens of a batch, and turning them into text as they come."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurosteer.errors import UsageError

_CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `greedy` takes the likeliest; otherwise temperature, then the smallest set of tokens
    whose probability reaches `top_p`. `repetition_penalty` as in CTRL (arXiv 1909.05858), over prompt and text."""

    greedy: bool = False
    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, 10.0), ("top_p", 0.0, 1.0), ("repetition_penalty", 0.0, 10.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
                raise UsageError(f"{name} is {value!r}; it must be above {low:g} and at most {high:g}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UsageError(f"seed is {self.seed!r}; it must be a whole number.")


class Sampler:
    """Chooses each row's next token, drawing from that row's own stream of random numbers.

    So a row's text depends on its seed alone, not on the rows beside it, on other threads or on the device; and rows
    that share a seed (an unsteered text and its steered twin) differ only by what steering changed.
    """

    def __init__(self, sampling: Sampling, streams: Sequence[str], prompt_lengths: Sequence[int]) -> None:
        self.sampling = sampling
        self.streams = [random.Random(f"{sampling.seed}/{stream}") for stream in streams]
        self.prompt_lengths = prompt_lengths
        self.prompt_width = max(prompt_lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Token ids `[batch]` from logits `[batch, vocab]`, after `input_ids` `[batch, seq]`, padded on the left."""
        if self.sampling.repetition_penalty != 1.0:
            scores = self._penalised(input_ids, scores)
        if self.sampling.greedy:
            return scores.argmax(-1)
        draws = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float32, device=scores.device)
        return draw(scores / self.sampling.temperature, self.sampling.top_p, draws)

    def _penalised(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Without the padding on the left, which would make a row depend on its neighbours' lengths."""
        scores = scores.clone()
        penalty = self.sampling.repetition_penalty
        for row, length in enumerate(self.prompt_lengths):
            seen = input_ids[row, self.prompt_width - length :].unique()
            found = scores[row, seen]
            scores[row, seen] = torch.where(found > 0, found / penalty, found * penalty)
        return scores


def draw(scores: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """One token per row, `[batch]`, from `scores` `[batch, vocab]` by nucleus sampling, at `draws` `[batch]` in [0, 1).

    The nucleus nearly always lies within the likeliest few hundred tokens; only where it does not is all sorted.
    """
    probabilities = torch.softmax(scores, dim=-1)
    top, tokens = probabilities.topk(min(_CANDIDATES, probabilities.shape[-1]), dim=-1)
    if bool((top.sum(-1) < min(top_p, 1.0 - 1e-6)).any()):
        top, tokens = probabilities.sort(dim=-1, descending=True)
    cumulative = top.cumsum(-1)
    inside = cumulative - top < top_p
    mass = (top * inside).sum(-1)
    place = torch.searchsorted(cumulative, (draws * mass)[:, None], right=True)
    last = inside.sum(-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


class RowTexts:
    """Collects the new tokens of every row of a batch and the text they make so far.

    A character whose bytes are spread over several tokens appears when its last byte has come.
    """

    def __init__(self, tokenizer: Any, rows: int, stop_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = set(stop_ids)
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.texts = [""] * rows
        self.stopped = [False] * rows
        # Per row: where the window that is decoded begins, and up to where its text is out already.
        self._windows = [(0, 0)] * rows

    def push(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Take one new token per row; returns what each adds to its row's text. After an end token a row takes none."""
        return tuple(self._take(row, token) for row, token in enumerate(tokens))

    def finish(self) -> tuple[str, ...]:
        """What was held back: a row's final text is that of all its tokens decoded at once."""
        pieces = []
        for row, ids in enumerate(self.ids):
            whole = self.tokenizer.decode(ids, skip_special_tokens=True)
            rest = whole[len(self.texts[row]) :] if whole.startswith(self.texts[row]) else ""
            self.texts[row] += rest
            pieces.append(rest)
        return tuple(pieces)

    def _take(self, row: int, token: int) -> str:
        if self.stopped[row]:
            return ""
        if token in self.stop_ids:
            self.stopped[row] = True
            return ""
        self.ids[row].append(token)
        return self._emit(row)

    def _emit(self, row: int) -> str:
        """What the newest token adds: the text of a short window of tokens, less what of it is out already.

        Nothing as long as it ends within a character (the replacement sign stands for the bytes so far).
        """
        start, out = self._windows[row]
        ids, decode = self.ids[row], self.tokenizer.backend_tokenizer.decode
        before, now = decode(ids[start:out]), decode(ids[start:])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        piece = now[len(before) :]
        self._windows[row] = (out, len(ids))
        self.texts[row] += piece
        return piece
