"""The one way to logits: the whole model runs, and its LM head sees only the positions that count.

Over the whole vocabulary, logits are what costs most memory. What a model makes of its head's output (Gemma caps it,
Cohere and Granite scale it) is the model's own business: nobody else calls the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neurosteer.models.batching import padded
from neurosteer.models.hooks import InputHook, hooked
from neurosteer.models.language_model import LanguageModel


def logits_at(lm: LanguageModel, ids: Tensor, where: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits that foretell what follows the positions `where`, float32 `[n, vocabulary]`, row by row.

    `ids` are token ids, `where` bool and `mask` the attention mask, all `[batch, seq]`, on any device. Rows padded on
    the right need no mask. Whether gradients are kept, and what steers the model, is up to the caller.
    """
    head = InputHook(lm.model.get_output_embeddings(), lambda hidden: hidden[where.to(hidden.device)])
    attention_mask = None if mask is None else mask.to(lm.device)
    with hooked([head]):
        found = lm.model(input_ids=ids.to(lm.device), attention_mask=attention_mask, use_cache=False)
    return found.logits.float()


def last_logits(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """The logits after the last token of each of `rows`, float32 `[len(rows), vocabulary]`."""
    ids = padded(rows, lm.pad_id)
    return logits_at(lm, ids, where_last(rows, ids.shape[1]))


def where_last(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Where rows padded on the right end, bool `[len(rows), width]`."""
    lasts = torch.tensor([len(row) - 1 for row in rows])
    return torch.arange(width) == lasts[:, None]
