"""Texts that decode together, a token each at a time; they join and leave between two steps."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from neurosteer.artifacts.recipes import Positions, Recipe
from neurosteer.errors import UsageError
from neurosteer.models.caching import can_change, can_go_on
from neurosteer.models.hooks import Hook, InputHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.decoding import NOT_FINITE, RowText, Sampler, next_tokens
from neurosteer.steering.plans import applied, compile_rows, join_plans, steered_places

_ENDED_SHARE = 4  # a row that has ended stays until a quarter of the rows have: taking rows out copies all the others


@dataclass(eq=False)
class RowInFlight:
    """One text under way: how it is to be written, and what there is of it.

    All that its next token depends on, apart from the model: a batch can be left and another one joined at any time.
    """

    prompt: list[int]
    recipe: Recipe
    positions: Positions
    max_new_tokens: int
    sampler: Sampler
    text: RowText
    failure: UsageError | None = None

    @property
    def ids(self) -> list[int]:
        """The prompt's tokens and those written."""
        return self.prompt + self.text.ids

    def __len__(self) -> int:
        return len(self.prompt) + len(self.text.ids)

    @property
    def ended(self) -> bool:
        return self.failure is not None or self.text.stopped or len(self.text.ids) >= self.max_new_tokens

    def take(self, token: int) -> str:
        """Go on by a token; returns the text it adds. The row fails where there is none to be had."""
        if token == NOT_FINITE:
            names = " and ".join(repr(use.artifact.name) for use in self.recipe.uses if use.has_effect)
            because = f": {names} pushed it too far. Use smaller strengths." if names else "; try dtype float32."
            self.failure = UsageError(
                f"After {len(self.text.ids)} tokens the model's scores were no longer finite numbers{because}"
            )
            return ""
        self.sampler.advance()
        return self.text.push(token)


class Batch:
    """Writings as rows `[batch, seq]`, padded on the left, with the keys and values of all but their last tokens."""

    def __init__(self, lm: LanguageModel, writings: Sequence[RowInFlight], *, use_cache: bool = True) -> None:
        width = max(map(len, writings))
        ids = torch.full((len(writings), width), lm.pad_id)
        mask = torch.zeros((len(writings), width), dtype=torch.long)
        for row, writing in enumerate(writings):
            ids[row, width - len(writing) :] = torch.tensor(writing.ids)
            mask[row, width - len(writing) :] = 1
        self.lm = lm
        self.writings = list(writings)
        self.ids, self.mask = ids.to(lm.device), mask.to(lm.device)
        self.cache = DynamicCache(config=lm.model.config) if use_cache and can_go_on(lm) else None
        self._plans = compile_rows(lm, [one.recipe for one in writings], [one.positions for one in writings])
        self.plan = join_plans(self._plans)
        self._columns_read = 0  # which not every kind of cache knows
        self._can_change = self.cache is None or can_change(lm)

    @property
    def ended(self) -> bool:
        """Whether no row takes another token."""
        return all(writing.ended for writing in self.writings)

    @property
    def unread(self) -> int:
        """How many columns the next step reads: all at first, later those of one token."""
        return self.ids.shape[1] - (self._columns_read if self.cache is not None else 0)

    @torch.inference_mode()
    def read(self, columns: int) -> None:
        """Read that many columns ahead of the next step, which must be left at least one. Needs a cache, and a model
        of which `can_change` is true."""
        self._run(self.ids.shape[1] - self.unread + columns)

    @torch.inference_mode()
    def step(self) -> dict[RowInFlight, str]:
        """A token more for every row that has not ended; returns the text it adds. There must be such a row.

        An exception leaves every writing as it was, but not the batch: its writings can go on in another one.
        """
        if self._can_change and len(self._ended_rows) * _ENDED_SHARE >= len(self.writings):
            self.let_ended_go()
        scores = self._next_scores()
        samplers = [writing.sampler for writing in self.writings]
        tokens = next_tokens(scores, samplers, [writing.ids for writing in self.writings])
        self.ids = torch.cat([self.ids, tokens[:, None].clamp(min=0).to(self.ids.device)], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        chosen = zip(self.writings, tokens.tolist(), strict=True)
        return {writing: writing.take(token) for writing, token in chosen if not writing.ended}

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers if self.cache is not None else []

    def _next_scores(self) -> Tensor:
        """Logits of the next token, float32 `[batch, vocab]`."""
        return self._run(self.ids.shape[1]).float()

    def _run(self, end: int) -> Tensor:
        """The model over what is unread of the columns before `end`; logits `[batch, vocab]` after the last of them."""
        width = self.ids.shape[1]
        new = range(width - self.unread, end)
        starts = [width - len(writing) for writing in self.writings]
        prompt_ends = [width - len(writing.text.ids) for writing in self.writings]
        # A row that has ended stays where it is: it must not leave the positions that the model knows.
        places = (torch.arange(new.start, new.stop) - torch.tensor(starts)[:, None]).clamp(min=0)
        where = steered_places(self.plan.positions, new, starts, prompt_ends)
        with applied(self.lm, self.plan, where), hooked(_contiguous_head(self.lm)):
            output = self.lm.model(
                input_ids=self.ids[:, new.start : new.stop],
                attention_mask=self.mask[:, :end],
                position_ids=places.to(self.ids.device),
                cache=self.cache,
                use_cache=self.cache is not None,
                logits_to_keep=1,
            )
        self._columns_read = end
        return output.logits[:, -1]

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Take in the rows of `other`, which is used up. Both have done a step, and `can_change` says that they may."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        self._columns_read = width - 1
        self.ids = torch.cat([_widened(batch.ids, width, self.lm.pad_id) for batch in (self, other)])
        self.mask = torch.cat([_widened(batch.mask, width, 0) for batch in (self, other)])
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            _join_layers(mine, theirs)
        self.writings += other.writings
        self._plans += other._plans
        self.plan = join_plans(self._plans)

    @property
    def _ended_rows(self) -> list[RowInFlight]:
        return [writing for writing in self.writings if writing.ended]

    def let_ended_go(self) -> None:
        """Let go of the rows that have ended, without waiting until they are a quarter of all."""
        self.leave(self._ended_rows)

    @torch.inference_mode()
    def leave(self, writings: Collection[RowInFlight]) -> None:
        """Let go of the rows of `writings`, and of the columns that are padding in all rows left; after a step."""
        kept = [row for row, writing in enumerate(self.writings) if writing not in writings]
        if len(kept) == len(self.writings):
            return
        self.writings = [self.writings[row] for row in kept]
        cut = self.ids.shape[1] - max(map(len, self.writings), default=0)
        rows = torch.tensor(kept, dtype=torch.long)
        here = rows.to(self.ids.device)
        self.ids, self.mask = self.ids[here, cut:], self.mask[here, cut:]
        self._columns_read -= cut
        for layer in self._layers:
            _cut_layer(layer, rows, cut)
        self._plans = [self._plans[row] for row in kept]
        self.plan = join_plans(self._plans)


def _widened(rows: Tensor, width: int, value: int) -> Tensor:
    return pad(rows, (width - rows.shape[1], 0), value=value)


# A sliding layer keeps the last `sliding_window - 1` columns, or all if there are fewer, and counts how many there
# were. The windows of transformers are measured in columns, so rows that move as a whole keep theirs.


def _join_layers(mine: Any, theirs: Any) -> None:
    if mine.keys is None or theirs.keys is None:  # such as layers that use another layer's
        return
    most = max(mine.keys.shape[-2], theirs.keys.shape[-2])
    for name in ("keys", "values"):
        held = [getattr(layer, name) for layer in (mine, theirs)]
        setattr(mine, name, torch.cat([pad(states, (0, 0, most - states.shape[-2], 0)) for states in held]))
    if isinstance(mine, DynamicSlidingWindowLayer):
        mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)


def _cut_layer(layer: Any, rows: Tensor, cut: int) -> None:
    if layer.keys is None:
        return
    first = cut
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= cut
        first = max(0, layer.keys.shape[-2] - layer.cumulative_length)
    for name in ("keys", "values"):
        states = getattr(layer, name)
        setattr(layer, name, states[rows.to(states.device), :, first:])


def _contiguous_head(lm: LanguageModel) -> list[Hook]:
    """After the prompt, transformers hands the LM head a slice of the hidden states; on a CPU, multiplying a slice
    copies the whole vocabulary matrix once per row (16 rows: five times the time of the prompt itself).

    A slice of one row counts as contiguous already and is copied all the same: so `clone`, not `contiguous`.
    """
    head = lm.model.get_output_embeddings()
    fresh = torch.contiguous_format
    return [InputHook(head, lambda hidden: hidden.clone(memory_format=fresh))] if head is not None else []
