"""What texts have lost, as the unsteered model sees it."""

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from neurosteer.artifacts.recipes import UNSTEERED
from neurosteer.models.hooks import InputHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import check_cancelled
from neurosteer.steering.batches import can_change
from neurosteer.steering.forcing import ForcedText, forced_logits

_WHAT = "Measuring perplexity"
_MAX_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}


def surprises(
    lm: LanguageModel,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    *,
    cancel: threading.Event | None = None,
) -> Tensor:
    """How surprising each continuation's tokens `ids[i]` are to the unsteered model after `prompts[i]`: the sum of
    their negative log-likelihoods in nats, float64 `[n]`, 0 where there is no token. A prompt is read once, however
    many texts continue it. Raises `Cancelled` when `cancel` is set."""
    found = torch.zeros(len(ids), dtype=torch.float64)
    for prompt in dict.fromkeys(prompts):
        places = [place for place, other in enumerate(prompts) if other == prompt and ids[place]]
        start = lm.prompt_ids(prompt)
        texts = [list(ids[place]) for place in places]
        read = _continued if len(start) > 1 and can_change(lm) else _whole
        for part, nats in read(lm, start, texts, cancel):
            found[[places[number] for number in part]] = nats
    return found


Part = tuple[Sequence[int], Tensor]
"""Positions of texts, and how surprising each is, float64."""


def _whole(
    lm: LanguageModel, start: list[int], texts: Sequence[list[int]], cancel: threading.Event | None
) -> Iterator[Part]:
    """Prompt and continuation together: for models that remember more than keys and values by column."""
    forced = [ForcedText([*start, *text], len(start), len(start) + len(text)) for text in texts]
    nats = torch.zeros(len(texts), dtype=torch.float64)
    for read in forced_logits(lm, forced, [UNSTEERED] * len(texts), what=_WHAT, cancel=cancel):
        nats.index_add_(0, read.rows, _nats(read.logits, read.targets))
    yield range(len(texts)), nats


def _continued(
    lm: LanguageModel, start: list[int], texts: Sequence[list[int]], cancel: threading.Event | None
) -> Iterator[Part]:
    """The prompt but for its last token once, whose keys and values all texts share; then the texts in batches."""
    kind = lm.device.type if lm.device.type in _MAX_LOGITS else "cpu"
    room = _MAX_LOGITS[kind] // lm.model.config.get_text_config().vocab_size
    n_rows = max(1, room // max(map(len, texts), default=1))
    for first in range(0, len(texts), n_rows):
        check_cancelled(cancel, _WHAT)
        part = range(first, min(first + n_rows, len(texts)))
        yield part, _after(lm, start, [texts[place] for place in part])


@torch.inference_mode()
def _after(lm: LanguageModel, start: list[int], texts: Sequence[list[int]]) -> Tensor:
    """float64 `[len(texts)]`. Padded on the right, where a causal model does not look."""
    cache = DynamicCache(config=lm.model.config)
    before = torch.tensor([start[:-1]], device=lm.device)
    lm.decoder(input_ids=before, cache=cache, use_cache=True)
    cache.batch_repeat_interleave(len(texts))
    width = max(map(len, texts))
    rows = torch.full((len(texts), width + 1), lm.pad_id)
    foretell = torch.zeros((len(texts), width), dtype=torch.bool)
    for row, text in enumerate(texts):
        rows[row, : len(text) + 1] = torch.tensor([start[-1], *text])
        foretell[row, : len(text)] = True
    head = InputHook(lm.model.get_output_embeddings(), lambda hidden: hidden[foretell.to(hidden.device)])
    with hooked([head]):
        logits = lm.model(input_ids=rows[:, :-1].to(lm.device), cache=cache, use_cache=True).logits.float()
    nats = _nats(logits, rows[:, 1:][foretell].to(logits.device))
    return torch.zeros(len(texts), dtype=torch.float64).index_add_(0, foretell.nonzero()[:, 0], nats)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods of `targets` `[n]` under `logits` `[n, vocab]`; float64, on the CPU."""
    return (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).double().cpu()
