"""Texts that are there already, read again under recipes: logits before every token that counts, batched."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer import processes
from neurosteer.artifacts.recipes import Recipe
from neurosteer.models.batching import length_batches, padded
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.logits import logits_at
from neurosteer.models.memory import budget, footprint_of, halving, row_cost
from neurosteer.progress import check_cancelled
from neurosteer.steering.plans import applied, compile_plan

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_LOGIT_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # as float32
_LOGIT_COPIES = 6  # of that, while logits are made of the head's output and reduced


@dataclass(frozen=True)
class ForcedText:
    """Token ids of which those from `first` (at least 1) up to `end` are counted."""

    ids: list[int]
    first: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class ForcedLogits:
    """Some of the rows: `rows[i]` is the place of the text and recipe whose counted token number `steps[i]` the logits
    `[n, vocab]` (float32) foretell; `targets` `[n]` are those tokens' ids."""

    rows: Tensor
    steps: Tensor
    targets: Tensor
    logits: Tensor


def forced_logits(
    lm: LanguageModel,
    texts: Sequence[ForcedText],
    recipes: Sequence[Recipe],
    *,
    what: str = "Reading",
    cancel: threading.Event | None = None,
) -> Iterator[ForcedLogits]:
    """Text i read under recipe i, teacher-forced and steered everywhere; in batches of similar length, of which each of
    several processes has its share.

    Raises `Cancelled` ("`what` was cancelled") when `cancel` is set between two batches.
    """

    def run(places: list[int]) -> ForcedLogits:
        check_cancelled(cancel, what)
        return _read(lm, [texts[place] for place in places], [recipes[place] for place in places])

    batches = processes.agreed(lambda: list(_batches(lm, texts)))  # they depend on how much memory is free
    for places, found in halving(lm, processes.own(batches), run):
        yield ForcedLogits(torch.tensor(places)[found.rows], found.steps, found.targets, found.logits)


def _batches(lm: LanguageModel, texts: Sequence[ForcedText]) -> Iterator[list[int]]:
    """Bounded by tokens, which all pass through the blocks, and by logits, which only those have that count."""
    tokens = _BATCH_TOKENS.get(lm.device.type, _BATCH_TOKENS["cpu"])
    copies = {kind: most * _LOGIT_COPIES for kind, most in _LOGIT_BYTES.items()}
    logits = budget(lm, copies) // _LOGIT_COPIES // 4 // lm.model.config.get_text_config().vocab_size
    cost = row_cost(lm, footprint_of(lm), tokens)
    return length_batches(texts, tokens, cost=cost, counts=[text.count for text in texts], most=logits)


def _read(lm: LanguageModel, texts: Sequence[ForcedText], recipes: Sequence[Recipe]) -> ForcedLogits:
    ids = padded([text.ids for text in texts], lm.pad_id)
    mask = torch.zeros_like(ids)
    foretell = torch.zeros_like(ids, dtype=torch.bool)  # the positions before a token that is counted
    for row, text in enumerate(texts):
        mask[row, : len(text.ids)] = 1
        foretell[row, text.first - 1 : text.end - 1] = True
    plan = compile_plan(lm, recipes, "all")
    with torch.inference_mode(), applied(lm, plan, mask.bool()):
        logits = logits_at(lm, ids, foretell, mask)
    rows, columns = foretell.nonzero(as_tuple=True)
    firsts = torch.tensor([text.first for text in texts])
    targets = ids.roll(-1, dims=1)[foretell].to(logits.device)
    return ForcedLogits(rows, columns + 1 - firsts[rows], targets, logits)
