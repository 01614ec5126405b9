"""Texts to activations: the one batched reading loop."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from neurosteer import processes
from neurosteer.errors import ExamplesError
from neurosteer.models.batching import length_batches, padded
from neurosteer.models.caching import gone_on_from, read_beginning
from neurosteer.models.framing import FramedText, Prompt
from neurosteer.models.hooks import Hook, InputHook, OutputHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.memory import footprint_of, halving, row_cost
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.reading.request import Request
from neurosteer.reading.sink import HELD_OUT, NEGATIVE, POSITIVE, Sink, is_readable, read_mask
from neurosteer.reading.statistics import Activations
from neurosteer.reading.tally import Tally

_MIN_PREFIX = 4  # shorter ones are not worth a cache
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_POOLED_BYTES = 20


def read_activations(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    request: Request,
    *,
    prompts: Sequence[Prompt] | None = None,
    held_out_positive: Sequence[int] = (),
    held_out_negative: Sequence[int] = (),
    paired: bool = False,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Activations:
    """Read the class statistics of two lists of texts in one pass.

    Held-out texts (given by position) count in the class means like all others; besides, their rows are kept, and the
    class difference without them, so that separation can be measured on texts it was not computed from. Memory grows
    with their number and with `request.rows`, not with the number of texts. Texts that are too short to be read (see
    `readable`) are left out of everything, and counted in `n_short`. `prompts` are what the positive texts answer, then
    what the negative ones do; only the texts' own tokens count.

    Raises `Cancelled` between two batches when `cancel` is set, `ExamplesError` where a class has no text to read.
    """
    progress("Splitting texts into tokens")
    everything = frame_texts(lm, [*positive, *negative], request, prompts)
    kept = torch.tensor(_readable(everything, len(positive), paired), dtype=torch.long)
    n_positive = int((kept < len(positive)).sum())
    for side, given, left in (("positive", positive, n_positive), ("negative", negative, len(kept) - n_positive)):
        if given and not left:
            raise ExamplesError(f"Every {side} text is too short to be read; give texts of at least two tokens.")
    framed = [everything[place] for place in kept.tolist()]
    groups = _groups(len(positive), len(negative), held_out_positive, held_out_negative)[kept]
    total, n_cut = sum(len(item.ids) for item in framed), sum(item.cut for item in framed)
    tally = Tally(lm, request, groups, n_positive)
    _read(lm, framed, tally, request.residual, request.neurons, request.batch_tokens, progress, cancel)
    tally.add_up()
    found = tally.result(lm.reference, total, n_cut, paired)
    features = {layer: replace(one, text_of=kept[one.text_of]) for layer, one in found.features.items()}
    return replace(found, features=features, n_short=len(everything) - len(framed))


def readable(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    request: Request,
    *,
    paired: bool,
    prompts: Sequence[Prompt] | None = None,
) -> tuple[list[int], list[int]]:
    """Positions of the texts of each class that are long enough to be read; of a pair both or neither."""
    kept = _readable(frame_texts(lm, [*positive, *negative], request, prompts), len(positive), paired)
    return [place for place in kept if place < len(positive)], [
        place - len(positive) for place in kept if place >= len(positive)
    ]


def _readable(framed: Sequence[FramedText], n_positive: int, paired: bool) -> list[int]:
    fit = [is_readable(item) for item in framed]
    if paired:
        fit = [one and other for one, other in zip(fit[:n_positive], fit[n_positive:], strict=True)] * 2
    return [place for place, is_fit in enumerate(fit) if is_fit]


def frame_texts(
    lm: LanguageModel, texts: Sequence[str], request: Request, prompts: Sequence[Prompt] | None = None
) -> list[FramedText]:
    """The texts as they are read: framed, after what they answer, cut, and with a BOS before them where that is asked
    for and lacking."""
    framed = lm.frame(texts, request.framing, max_tokens=request.max_tokens, prompts=prompts)
    bos = lm.tokenizer.bos_token_id
    if not request.prepend_bos or request.framing != "raw" or bos is None:
        return framed
    return [
        item if item.ids[:1] == [bos] else FramedText([bos, *item.ids], item.start + 1, item.cut) for item in framed
    ]


def read_tokens(
    lm: LanguageModel,
    framed: Sequence[FramedText],
    layers: Sequence[int],
    *,
    cancel: threading.Event | None = None,
) -> dict[int, Tensor]:
    """The residual stream of every token after each of `layers`, `[n_tokens, d_model]` in the model's dtype.

    Which tokens count is as in `read_activations`: a text's own, never padding or the sequence's first; of a text
    without such tokens none. They come grouped by text, in the order in which batches of similar length are read.
    Raises `Cancelled`.
    """
    collected = _TokenRows(lm, layers)
    order = _read(lm, framed, collected, layers, (), None, silent, cancel)
    return collected.in_order(order)


def _read(
    lm: LanguageModel,
    framed: Sequence[FramedText],
    sink: Sink,
    residual: Sequence[int],
    neurons: Sequence[int],
    batch_tokens: int | None,
    progress: Progress,
    cancel: threading.Event | None,
) -> list[int]:
    """One pass over the texts, every batch of which `sink` is shown; of several processes each takes its share of the
    batches. Returns the texts in the order of the batches."""
    prefix, framed = _shared_prefix(lm, list(framed))
    # Batches depend on how much memory is free; all processes must mean the same ones.
    batches = processes.agreed(lambda: list(_batches(lm, framed, prefix, batch_tokens, bool(neurons))))
    mine = processes.own(batches)
    done, to_do = 0, sum(len(framed[index].ids) for batch in mine for index in batch)

    def run(indices: list[int]) -> None:
        check_cancelled(cancel, "Reading activations")
        _read_batch(lm, sink, framed, indices, prefix)

    with torch.inference_mode(), hooked(_reading_hooks(lm, sink, residual, neurons)):
        for indices, _ in halving(lm, mine, run, progress=progress):
            done += sum(len(framed[index].ids) for index in indices)
            progress(f"Reading {len(framed)} texts", done / to_do)
    return [index for batch in batches for index in batch]


def _batches(
    lm: LanguageModel, framed: Sequence[FramedText], prefix: Cache | None, batch_tokens: int | None, neurons: bool
) -> Iterator[list[int]]:
    """As large as the device computes well and, on a GPU, as its memory takes: with the prefix that every row looks
    back at, and what is pooled of a row (float32, float64, its square)."""
    if batch_tokens is not None:
        return length_batches(framed, batch_tokens)
    tokens = _BATCH_TOKENS.get(lm.device.type, 4096)
    footprint = footprint_of(lm, row=_POOLED_BYTES * (lm.shape.d_mlp if neurons else lm.shape.d_model))
    before = 0 if prefix is None else prefix.get_seq_length()
    return length_batches(framed, tokens, cost=row_cost(lm, footprint, tokens, before=before))


def _groups(n_positive: int, n_negative: int, held_positive: Sequence[int], held_negative: Sequence[int]) -> Tensor:
    groups = torch.tensor([POSITIVE] * n_positive + [NEGATIVE] * n_negative)
    groups[list(held_positive)] += HELD_OUT
    groups[[n_positive + index for index in held_negative]] += HELD_OUT
    return groups


def _shared_prefix(lm: LanguageModel, framed: list[FramedText]) -> tuple[Cache | None, list[FramedText]]:
    """Keys and values of what precedes the text in every row, and the rows without it.

    Nothing where there is no such prefix, or the model cannot repeat it: what is read stays the same, it is only not
    computed again for each text.
    """
    first = framed[0]
    length = min(item.start for item in framed)
    if length < _MIN_PREFIX or any(
        item.ids[:length] != first.ids[:length] or len(item.ids) <= length for item in framed
    ):
        return None, framed
    cache = read_beginning(lm, first.ids[:length])
    if cache is None:
        return None, framed
    return cache, [FramedText(item.ids[length:], item.start - length, item.cut) for item in framed]


class _Finished(Exception):
    """Leaves a forward pass after the last block that anyone asked for."""


def _read_batch(
    lm: LanguageModel, sink: Sink, framed: Sequence[FramedText], indices: list[int], prefix: Cache | None
) -> None:
    batch = [framed[index] for index in indices]
    ids = padded([item.ids for item in batch], lm.pad_id)
    sink.begin(indices, batch, ids.shape[1], skip_first=prefix is None)
    named: dict[str, Any] = {"use_cache": False}
    if prefix is not None:
        named = {"cache": gone_on_from(prefix), "use_cache": True}
    with suppress(_Finished):
        lm.decoder(input_ids=ids.to(lm.device), **named)
    sink.end()


def _reading_hooks(lm: LanguageModel, sink: Sink, residual: Sequence[int], neurons: Sequence[int]) -> list[Hook]:
    hooks: list[Hook] = [InputHook(lm.down_projections[layer], partial(sink.add_neurons, layer)) for layer in neurons]
    hooks += [OutputHook(lm.blocks[layer], partial(sink.add_residual, layer)) for layer in residual]

    def stop(_hidden: Tensor) -> None:
        raise _Finished

    return [*hooks, OutputHook(lm.blocks[max((*residual, *neurons))], stop)]


class _TokenRows:
    """Keeps the residual stream of every token read."""

    def __init__(self, lm: LanguageModel, layers: Sequence[int]) -> None:
        self.device, self.layers = lm.device, layers
        self.rows: list[tuple[int, dict[int, Tensor]]] = []  # of each batch, with the first of its texts
        self.first, self.batch = 0, dict[int, Tensor]()
        self.read = torch.empty(0)

    def begin(self, indices: list[int], items: Sequence[FramedText], longest: int, *, skip_first: bool) -> None:
        self.first, self.batch = indices[0], {}
        self.read = read_mask(items, longest, skip_first=skip_first).to(self.device)

    def add_residual(self, layer: int, hidden: Tensor) -> None:
        self.batch[layer] = hidden[self.read.to(hidden.device)]

    def add_neurons(self, layer: int, hidden: Tensor) -> None:
        raise NotImplementedError("Single neurons are not kept token by token.")

    def end(self) -> None:
        self.rows.append((self.first, self.batch))

    def in_order(self, texts: Sequence[int]) -> dict[int, Tensor]:
        """By layer the rows of all batches, those of other processes too, as if one had read them in turn."""
        if processes.count() > 1:
            mine = [(first, {layer: rows.cpu() for layer, rows in batch.items()}) for first, batch in self.rows]
            place = {text: number for number, text in enumerate(texts)}
            self.rows = sorted(chain(*processes.gathered(mine)), key=lambda one: place[one[0]])
        return {layer: torch.cat([batch[layer].to(self.device) for _, batch in self.rows]) for layer in self.layers}
