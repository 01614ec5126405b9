"""Choosing the next tokens of a batch, and turning them into text as they come."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurosteer.errors import UsageError
from neurosteer.validation import check_number, is_int

NOT_FINITE = -1
"""Instead of a token, where a row's scores are no numbers to choose one by."""

_CANDIDATES = (256, 4096)
_LEAST_TEMPERATURE = 1e-6  # below, one token has all the probability, and quotients would leave float32's range


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
            check_number(name, getattr(self, name), low, high, above=True)
        if not is_int(self.seed):
            raise UsageError(f"seed is {self.seed!r}; it must be a whole number.")


class Sampler:
    """One row's settings, and its own stream of random numbers.

    So a row's text depends on its seed alone, not on the rows beside it, on other threads or on the device; and rows
    that share a seed (an unsteered text and its steered twin) differ only by what steering changed.
    """

    def __init__(self, sampling: Sampling, stream: str) -> None:
        self.sampling = sampling
        self._random = random.Random(f"{sampling.seed}/{stream}")
        self.number = self._random.random()
        """In [0, 1): what decides the next token, the same however often that token is tried."""

    def advance(self) -> None:
        """Go on to the number of the token after."""
        self.number = self._random.random()


def next_tokens(scores: Tensor, samplers: Sequence[Sampler], seen: Sequence[Sequence[int]]) -> Tensor:
    """Token ids `[batch]` from logits `[batch, vocab]`, each row by its own sampler; `seen` is what it holds so far.

    `NOT_FINITE` for a row whose logits hold a NaN or an infinity, unless it is minus infinity, which rules a token out.
    """
    scores = _penalised(scores, samplers, seen)
    highest, tokens = scores.max(-1)
    finite = highest.isfinite()  # the highest is NaN where any is, and infinite where any is or all are ruled out
    tokens = tokens.where(finite, NOT_FINITE)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.sampling.greedy]
    if not drawing:
        return tokens

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=scores.device)

    chosen = [samplers[row] for row in drawing]
    temperatures = column([sampler.sampling.temperature for sampler in chosen]).clamp(min=_LEAST_TEMPERATURE)
    top_p = column([sampler.sampling.top_p for sampler in chosen])
    rows = torch.tensor(drawing, device=scores.device)
    drawn = draw(scores[rows] / temperatures[:, None], top_p, column([sampler.number for sampler in chosen]))
    tokens[rows] = drawn.where(finite[rows], NOT_FINITE)
    return tokens


def _penalised(scores: Tensor, samplers: Sequence[Sampler], seen: Sequence[Sequence[int]]) -> Tensor:
    if all(sampler.sampling.repetition_penalty == 1.0 for sampler in samplers):
        return scores
    scores = scores.clone()
    for row, (sampler, ids) in enumerate(zip(samplers, seen, strict=True)):
        penalty = sampler.sampling.repetition_penalty
        if penalty != 1.0:
            found = torch.tensor(sorted(set(ids)), device=scores.device)
            old = scores[row, found]
            scores[row, found] = torch.where(old > 0, old / penalty, old * penalty)
    return scores


def draw(scores: Tensor, top_p: float | Tensor, draws: Tensor) -> Tensor:
    """One token per row, `[batch]`, from `scores` `[batch, vocab]` by nucleus sampling, at `draws` `[batch]` in [0, 1).

    `top_p` is one number or `[batch]`. The nucleus nearly always lies within the likeliest few hundred tokens; only the
    rows where it does not are looked at further, as sorting the whole vocabulary takes longer than the model itself.
    """
    top_p = torch.as_tensor(top_p, dtype=scores.dtype, device=scores.device).reshape(-1, 1).expand(len(scores), 1)
    probabilities = torch.softmax(scores, dim=-1)
    tokens = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    for count in (*_CANDIDATES, probabilities.shape[-1]):
        count = min(count, probabilities.shape[-1])
        top, found = probabilities[rows].topk(count, dim=-1)
        reached = top.sum(-1) >= top_p[rows, 0].clamp(max=1.0 - 1e-6)
        reached |= count == probabilities.shape[-1]
        here = rows[reached]
        tokens[here] = _drawn(top[reached], found[reached], top_p[here], draws[here])
        rows = rows[~reached]
        if not len(rows):
            break
    return tokens


def _drawn(top: Tensor, tokens: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
    """From the likeliest tokens, descending: `top` and `tokens` `[batch, n]`, `top_p` `[batch, 1]`; `[batch]`."""
    cumulative = top.cumsum(-1)
    inside = cumulative - top < top_p
    mass = (top * inside).sum(-1)
    place = torch.searchsorted(cumulative, (draws * mass)[:, None], right=True)
    last = (inside.sum(-1, keepdim=True) - 1).clamp(min=0)  # nothing is inside where the scores are no numbers
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


class RowText:
    """Collects the new tokens of one row and the text they make so far.

    A character whose bytes are spread over several tokens appears when its last byte has come.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        # Where the window that is decoded begins, and up to where its text is out already.
        self._window = (0, 0)

    def push(self, token: int) -> str:
        """Take a new token; returns what it adds to the text. After an end token none is taken."""
        if token in self.stop_ids:
            self.stopped = True
        if self.stopped:
            return ""
        self.ids.append(token)
        return self._emit()

    def finish(self) -> str:
        """What was held back: the final text is that of all tokens decoded at once."""
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        rest = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += rest
        return rest

    def _emit(self) -> str:
        """What the newest token adds: the text of a short window of tokens, less what of it is out already.

        Nothing as long as it ends within a character (the replacement sign stands for the bytes so far).
        """
        start, out = self._window
        decode = self.tokenizer.backend_tokenizer.decode
        before, now = decode(self.ids[start:out]), decode(self.ids[start:])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        piece = now[len(before) :]
        self._window = (out, len(self.ids))
        self.text += piece
        return piece
