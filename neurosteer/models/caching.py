"""Keys and values kept from one pass to the next: of which models they can be moved about, and a beginning shared."""

import copy
from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from neurosteer.models.language_model import LanguageModel


def can_change(lm: LanguageModel) -> bool:
    """Whether rows can be repeated, join and leave in a batch of this model: whether all that it remembers are keys and
    values by column. (Layers with a recurrent state keep something else.)"""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in plain for layer in DynamicCache(config=lm.model.config).layers)


@torch.inference_mode()
def read_beginning(lm: LanguageModel, ids: Sequence[int]) -> Cache | None:
    """Keys and values of one row of token ids, for `repeated`; None for a model of which `can_change` is false."""
    if not can_change(lm):
        return None
    cache = DynamicCache(config=lm.model.config)
    lm.decoder(input_ids=torch.tensor([list(ids)], device=lm.device), cache=cache, use_cache=True)
    return cache


def repeated(beginning: Cache, rows: int) -> Cache:
    """The same keys and values for each of `rows` rows; `beginning` stays as it is."""
    cache = copy.deepcopy(beginning)
    cache.batch_repeat_interleave(rows)
    return cache
