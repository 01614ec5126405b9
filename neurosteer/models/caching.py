"""Keys and values kept from one pass to the next: of which models they can be moved about, and a beginning shared."""

import copy
import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from neurosteer.errors import ModelError
from neurosteer.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

_CHECKED = 7  # tokens, of which the last three are read one by one
# What differs where nothing should, as a share of what differs where everything does: rounding comes to .00001, 8-bit
# weights, which are packed for a whole batch, to .01 and .16; models that get it wrong to .2 and more, and .7 and more.
_PADDING_SHOWS, _CACHE_SHOWS = 0.1, 0.3

_known: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()


def can_change(lm: LanguageModel) -> bool:
    """Whether rows can be repeated, join and leave in a batch of this model: whether all that it remembers are keys and
    values by column. (Layers with a recurrent state keep something else.)"""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return can_go_on(lm) and all(type(layer) in plain for layer in DynamicCache(config=lm.model.config).layers)


def can_go_on(lm: LanguageModel) -> bool:
    """Whether the model goes on from what it remembers to what it would have written otherwise: seen once for each
    model, from two rows of seven tokens. Some have a cache of their own (MiniMax), and some do not heed padding in it
    (Mamba in transformers 5.24).

    Raises `ModelError` for a model to which padding is text (RWKV): its rows cannot be written together.
    """
    if lm not in _known:
        _known[lm] = _goes_on(lm)
        if not _known[lm]:
            logger.warning(
                "%s cannot go on from a cache to what it writes without one: every token reads the whole text again, "
                "which takes longer.", lm.name,
            )  # fmt: skip
    return _known[lm]


@torch.inference_mode()
def _goes_on(lm: LanguageModel) -> bool:
    ids = torch.arange(2 * _CHECKED).reshape(2, _CHECKED)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    ids, mask, places = (rows.to(lm.device) for rows in (ids, mask, places))

    def read(first: int, last: int, cache: Cache | None) -> Tensor:
        found = lm.model(
            input_ids=ids[:, first:last], attention_mask=mask[:, :last], position_ids=places[:, first:last],
            cache=cache, use_cache=cache is not None,
        )  # fmt: skip
        return found.logits[:, -1].float()

    at_once = read(0, _CHECKED, None)
    alone = lm.model(input_ids=ids[:1, 2:], use_cache=False).logits[:, -1].float()
    as_text = lm.model(input_ids=ids[:1], use_cache=False).logits[:, -1].float()
    if (alone - at_once[:1]).norm() > _PADDING_SHOWS * (alone - as_text).norm():
        raise ModelError(f"{lm.name} ({type(lm.model).__name__}) reads padding as text, so it cannot be steered.")
    try:
        cache = DynamicCache(config=lm.model.config)
        read(0, _CHECKED - 3, cache)
        step_by_step = [read(place, place + 1, cache) for place in range(_CHECKED - 3, _CHECKED)][-1]
    except Exception:  # a model's own code fails in its own way
        return False
    spread = (at_once - at_once.mean(-1, keepdim=True)).norm()
    return bool((step_by_step - at_once).norm() <= _CACHE_SHOWS * spread)


@torch.inference_mode()
def read_beginning(lm: LanguageModel, ids: Sequence[int]) -> Cache | None:
    """Keys and values of one row of token ids, for `gone_on_from`; None for a model of which `can_change` is false."""
    if not can_change(lm):
        return None
    cache = DynamicCache(config=lm.model.config)
    lm.decoder(input_ids=torch.tensor([list(ids)], device=lm.device), cache=cache, use_cache=True)
    return cache


def gone_on_from(beginning: Cache) -> Cache:
    """A cache with which any number of rows go on from the same beginning, for one pass; `beginning` stays as it is.

    It keeps nothing of the rows: a layer is handed what it would be from a cache of repeated rows, and once it has used
    that it is gone. So a pass holds one layer's keys and values at a time.
    """
    cache = copy.copy(beginning)
    cache.layers = list[Any](map(_GoneOnFrom, beginning.layers))
    return cache


class _GoneOnFrom(DynamicLayer):
    """One layer's: `layer` holds keys and values of one row, by column (see `can_change`)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.is_sliding = layer.is_sliding
        self.is_initialized = layer.is_initialized

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _appended(self.layer.keys, key_states), _appended(self.layer.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.layer.get_seq_length()


def _appended(before: Tensor | None, new: Tensor) -> Tensor:
    """One row's `before` `[1, heads, n, width]`, in front of each row of `new` `[rows, heads, seq, width]`."""
    return new if before is None else torch.cat([before.expand(len(new), -1, -1, -1), new], dim=-2)
