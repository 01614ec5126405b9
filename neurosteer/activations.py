"""Texts to activations: the one batched reading loop.

One pass over the texts whatever the number of layers, sites and classes: no LM head, no KV cache, sorted by length
into batches of a token budget, stopping after the last block asked for. Rows are padded on the right, where a causal
model never looks back from, so no attention mask is needed; padding and the first position (BOS, or the token that
takes its place as attention sink, arXiv 2309.17453) are left out of every mean and norm. What a chat template puts
before every text is run once and its keys and values are shared.
"""

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from neurosteer.artifacts import ModelReference
from neurosteer.errors import UsageError
from neurosteer.hooks import Hook, InputHook, OutputHook, hooked
from neurosteer.models import FramedText, Framing, LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent

Tokens = Literal["mean", "last"]
TOKENS: tuple[Tokens, ...] = ("mean", "last")
MAX_TOKENS = 512

STRONGEST_TEXTS = 3
"""In how many texts the places where a feature fires strongest are kept."""

_POSITIVE, _NEGATIVE, _HELD_OUT = 0, 1, 2  # group of a text: its class, plus 2 when held out
_MIN_PREFIX = 4  # shorter ones are not worth a cache
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_HISTOGRAM_BINS, _HISTOGRAM_LOW, _HISTOGRAM_HIGH = 1 << 14, -24.0, 40.0  # of log2(norm): bins of 0.3%


class Encoder(Protocol):
    """Features of the residual stream: what a sparse autoencoder is to the reading loop."""

    @property
    def n_features(self) -> int: ...

    def encode(self, residual: Tensor) -> Tensor:
        """`[..., d_model]` to float32 `[..., n_features]`, 0 where a feature does not fire."""
        ...

    def chunk_rows(self) -> int:
        """How many tokens may be encoded at once."""
        ...


@dataclass(frozen=True)
class Request:
    """What to read. Layers are block numbers; `rows` are layers of the residual stream at which every text is kept.

    `encoders` are SAEs by the layer whose residual stream they read; `feature_rows` keeps every text's mean features.
    `prepend_bos` puts a BOS before raw texts where the tokenizer does not.
    """

    residual: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    framing: Framing = "raw"
    tokens: Tokens = "mean"
    max_tokens: int = MAX_TOKENS
    batch_tokens: int | None = None
    encoders: Mapping[int, Encoder] = field(default_factory=dict)
    feature_rows: bool = False
    prepend_bos: bool = False

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise UsageError(f"tokens is {self.tokens!r}; it must be one of {', '.join(TOKENS)}.")
        if not self.residual and not self.neurons:
            raise UsageError("Nothing to read: name at least one layer.")
        if not {*self.rows, *self.encoders} <= set(self.residual):
            raise UsageError("Rows and features can only be had at layers of the residual stream that are read.")


@dataclass(frozen=True)
class ClassMeans:
    """Mean activation of each class, float32 `[d]`."""

    positive: Tensor
    negative: Tensor

    @property
    def difference(self) -> Tensor:
        return self.positive - self.negative


@dataclass(frozen=True)
class ClassMoments(ClassMeans):
    """Means and variances (over texts) of each class, float32 `[d]`."""

    positive_variance: Tensor
    negative_variance: Tensor


@dataclass(frozen=True)
class ClassRows:
    """One row per text of each class in the order given, float32 `[n, d]`."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class SparseRows:
    """Mean features of every text in the order given: a CSR matrix `[n_texts, n_features]`."""

    starts: Tensor
    features: Tensor
    values: Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """How an SAE's features fire in the tokens read of each class (row 0 positive, row 1 negative).

    `fired` counts tokens, `sums` and `squares` add up activations and their squares, float64 `[2, n_features]`.
    `strongest` float32 `[n_features, STRONGEST_TEXTS]` are each feature's strongest activations, one per text at most,
    `text_of` and `token_of` (from the text's first token) int64 of the same shape say where; 0 where there is none.
    """

    n_tokens: tuple[int, int]
    fired: Tensor
    sums: Tensor
    squares: Tensor
    strongest: Tensor
    text_of: Tensor
    token_of: Tensor
    rows: SparseRows | None = None

    @property
    def rates(self) -> Tensor:
        """Share of each class's tokens at which a feature fires, float64 `[2, n_features]`."""
        return self.fired / self._counts

    @property
    def means(self) -> Tensor:
        """Mean activation over each class's tokens."""
        return self.sums / self._counts

    @property
    def means_active(self) -> Tensor:
        """Mean activation over the tokens at which a feature fires; 0 where it never does."""
        return self.sums / self.fired.clamp(min=1)

    @property
    def variances(self) -> Tensor:
        """Variance of the activation over each class's tokens."""
        return (self.squares / self._counts - self.means.square()).clamp(min=0)

    @property
    def _counts(self) -> Tensor:
        return torch.tensor(self.n_tokens, dtype=torch.float64).clamp(min=1)[:, None]


@dataclass(frozen=True)
class HeldOut:
    """The class difference of the other texts, `[d]`, and the rows of the held-out ones."""

    difference: Tensor
    rows: ClassRows


@dataclass(frozen=True)
class Activations:
    """What a method sees, by layer. `norms` are median norms of the residual stream over tokens."""

    model: ModelReference
    residual: Mapping[int, ClassMeans]
    neurons: Mapping[int, ClassMoments]
    rows: Mapping[int, ClassRows]
    held_out: Mapping[int, HeldOut]
    norms: Mapping[int, float]
    n_texts: int
    n_tokens: int
    n_cut: int
    paired: bool = False
    n_positive: int = 0
    features: Mapping[int, FeatureStatistics] = field(default_factory=dict)


def read_activations(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    request: Request,
    *,
    held_out_positive: Sequence[int] = (),
    held_out_negative: Sequence[int] = (),
    paired: bool = False,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Activations:
    """Read the class statistics of two lists of texts in one pass.

    Held-out texts (given by position) count in the class means like all others; besides, their rows are kept, and the
    class difference without them, so that separation can be measured on texts it was not computed from. Memory grows
    with their number and with `request.rows`, not with the number of texts.

    Raises `Cancelled` between two batches when `cancel` is set.
    """
    progress("Splitting texts into tokens")
    framed = frame_texts(lm, [*positive, *negative], request)
    groups = _groups(len(positive), len(negative), held_out_positive, held_out_negative)
    total, n_cut = sum(len(item.ids) for item in framed), sum(item.cut for item in framed)
    tally = _Tally(lm, request, groups, len(positive))
    _read(lm, framed, tally, request.residual, request.neurons, request.batch_tokens, progress, cancel)
    return tally.result(lm.reference, total, n_cut, paired)


def frame_texts(lm: LanguageModel, texts: Sequence[str], request: Request) -> list[FramedText]:
    """The texts as they are read: framed, cut, and with a BOS before them where that is asked for and lacking."""
    framed = lm.frame(texts, request.framing, max_tokens=request.max_tokens)
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
    batch_tokens: int | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> dict[int, Tensor]:
    """The residual stream of every token after each of `layers`, `[n_tokens, d_model]` in the model's dtype.

    Which tokens count is as in `read_activations`: a text's own, never padding or the sequence's first. They come
    grouped by text, in the order in which batches of similar length are read. Raises `Cancelled`.
    """
    collected = _TokenRows(lm, layers)
    _read(lm, framed, collected, layers, (), batch_tokens, progress, cancel)
    return {layer: torch.cat(rows) for layer, rows in collected.rows.items()}


def _read(
    lm: LanguageModel,
    framed: Sequence[FramedText],
    sink: "_Sink",
    residual: Sequence[int],
    neurons: Sequence[int],
    batch_tokens: int | None,
    progress: Progress,
    cancel: threading.Event | None,
) -> None:
    """One pass over the texts, every batch of which `sink` is shown."""
    with torch.inference_mode():
        prefix, framed = _shared_prefix(lm, list(framed))
    done, to_do = 0, sum(len(item.ids) for item in framed)
    with torch.inference_mode(), hooked(_reading_hooks(lm, sink, residual, neurons)):
        for indices in length_batches(framed, batch_tokens or _BATCH_TOKENS.get(lm.device.type, 4096)):
            check_cancelled(cancel, "Reading activations")
            _read_batch(lm, sink, framed, indices, prefix)
            done += sum(len(framed[index].ids) for index in indices)
            progress(f"Reading {len(framed)} texts", done / to_do)


def _groups(n_positive: int, n_negative: int, held_positive: Sequence[int], held_negative: Sequence[int]) -> Tensor:
    groups = torch.tensor([_POSITIVE] * n_positive + [_NEGATIVE] * n_negative)
    groups[list(held_positive)] += _HELD_OUT
    groups[[n_positive + index for index in held_negative]] += _HELD_OUT
    return groups


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


def _shared_prefix(lm: LanguageModel, framed: list[FramedText]) -> tuple[Cache | None, list[FramedText]]:
    """Keys and values of what precedes the text in every row, and the rows without it.

    Nothing where there is no such prefix: what is read stays the same, it is only not computed again for each text.
    """
    first = framed[0]
    length = min(item.start for item in framed)
    if length < _MIN_PREFIX or any(
        item.ids[:length] != first.ids[:length] or len(item.ids) <= length for item in framed
    ):
        return None, framed
    ids = torch.tensor([first.ids[:length]], device=lm.device)
    cache = DynamicCache(config=lm.model.config)
    lm.decoder(input_ids=ids, cache=cache, use_cache=True)
    return cache, [FramedText(item.ids[length:], item.start - length, item.cut) for item in framed]


class _Finished(Exception):
    """Leaves a forward pass after the last block that anyone asked for."""


def _read_batch(
    lm: LanguageModel,
    sink: "_Sink",
    framed: Sequence[FramedText],
    indices: list[int],
    prefix: Cache | None,
) -> None:
    batch = [framed[index] for index in indices]
    longest = max(1, max(len(item.ids) for item in batch))
    ids = torch.full((len(batch), longest), lm.pad_id)
    for row, item in enumerate(batch):
        ids[row, : len(item.ids)] = torch.tensor(item.ids, dtype=torch.long)
    sink.begin(indices, batch, longest, skip_first=prefix is None)
    named: dict[str, Any] = {"use_cache": False}
    if prefix is not None:
        cache = copy.deepcopy(prefix)  # the pass appends to its cache
        cache.batch_repeat_interleave(len(batch))
        named = {"cache": cache, "use_cache": True}
    with suppress(_Finished):
        lm.decoder(input_ids=ids.to(lm.device), **named)
    sink.end()


def _reading_hooks(lm: LanguageModel, sink: "_Sink", residual: Sequence[int], neurons: Sequence[int]) -> list[Hook]:
    hooks: list[Hook] = [
        InputHook(lm.down_projections[layer], lambda hidden, layer=layer: sink.add_neurons(layer, hidden))
        for layer in neurons
    ]
    hooks += [
        OutputHook(lm.blocks[layer], lambda hidden, layer=layer: sink.add_residual(layer, hidden)) for layer in residual
    ]

    def stop(_hidden: Tensor) -> None:
        raise _Finished

    return [*hooks, OutputHook(lm.blocks[max((*residual, *neurons))], stop)]


class _Sink(Protocol):
    """What a pass is made for: told of each batch, then of each layer's activations in it, then that it is over."""

    def begin(self, indices: list[int], items: Sequence[FramedText], longest: int, *, skip_first: bool) -> None: ...

    def add_residual(self, layer: int, hidden: Tensor) -> None: ...

    def add_neurons(self, layer: int, hidden: Tensor) -> None: ...

    def end(self) -> None: ...


def _read_mask(items: Sequence[FramedText], longest: int, *, skip_first: bool) -> Tensor:
    """Which positions of a batch are read, `[batch, longest]`: a text's own, the sequence's first only if it is all
    there is, no padding."""
    lengths = torch.tensor([len(item.ids) for item in items])
    skipped = 1 if skip_first else 0
    starts = torch.tensor([min(max(item.start, skipped), max(len(item.ids) - 1, 0)) for item in items])
    positions = torch.arange(longest)
    return (positions >= starts[:, None]) & (positions < lengths[:, None])


class _TokenRows:
    """Keeps the residual stream of every token read."""

    def __init__(self, lm: LanguageModel, layers: Sequence[int]) -> None:
        self.device = lm.device
        self.rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.read = torch.empty(0)

    def begin(self, indices: list[int], items: Sequence[FramedText], longest: int, *, skip_first: bool) -> None:
        self.read = _read_mask(items, longest, skip_first=skip_first).to(self.device)

    def add_residual(self, layer: int, hidden: Tensor) -> None:
        self.rows[layer].append(hidden[self.read.to(hidden.device)])

    def add_neurons(self, layer: int, hidden: Tensor) -> None:
        raise NotImplementedError("Single neurons are not kept token by token.")

    def end(self) -> None:
        pass


@dataclass
class _Batch:
    """What the hooks need to know of the batch in flight; `weights` `[batch, 1, seq]` sum to 1 over a text's tokens."""

    indices: Tensor
    groups: Tensor
    read: Tensor
    weights: Tensor
    last: Tensor
    starts: Tensor
    norms: dict[int, Tensor] = field(default_factory=dict)


class _Tally:
    """Running sums per layer; the rows of chosen texts; a histogram of norms per layer."""

    def __init__(self, lm: LanguageModel, request: Request, groups: Tensor, n_positive: int) -> None:
        self.request = request
        self.groups = groups
        self.n_positive = n_positive
        self.lm = lm
        shape = lm.shape
        self.residual = {layer: torch.zeros(4, shape.d_model, dtype=torch.float64) for layer in request.residual}
        self.neurons = {layer: torch.zeros(2, 2, shape.d_mlp, dtype=torch.float64) for layer in request.neurons}
        self.histograms = {layer: torch.zeros(_HISTOGRAM_BINS, dtype=torch.int64) for layer in request.residual}
        self.held = torch.nonzero(groups >= _HELD_OUT).flatten()
        self.held_rows = {layer: torch.empty(len(self.held), shape.d_model) for layer in request.residual}
        self.rows = {layer: torch.empty(len(groups), shape.d_model) for layer in request.rows}
        self.features = {layer: _FeatureTally(encoder, request) for layer, encoder in request.encoders.items()}
        self.batch: _Batch | None = None

    def begin(self, indices: list[int], items: Sequence[FramedText], longest: int, *, skip_first: bool) -> None:
        device = self.lm.device
        lengths = torch.tensor([len(item.ids) for item in items])
        read = _read_mask(items, longest, skip_first=skip_first)
        weights = read.float() / read.sum(1, keepdim=True).clamp(min=1)
        where = torch.tensor(indices)
        self.batch = _Batch(
            indices=where,
            groups=self.groups[where].to(device),
            read=read.to(device),
            weights=weights[:, None].to(device),
            last=(lengths - 1).clamp(min=0).to(device),
            starts=torch.tensor([item.start for item in items]).to(device),
        )

    def add_residual(self, layer: int, hidden: Tensor) -> None:
        batch = self._batch()
        pooled = self._pool(hidden)
        self.residual[layer] = self.residual[layer].to(hidden.device)
        self.residual[layer].index_add_(0, batch.groups.to(hidden.device), pooled.double())
        batch.norms[layer] = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        if layer in self.rows:
            self.rows[layer][batch.indices] = pooled.cpu()
        if layer in self.features:
            self.features[layer].add(hidden, batch)
        held = self.groups[batch.indices] >= _HELD_OUT
        if held.any():
            places = torch.searchsorted(self.held, batch.indices[held])
            self.held_rows[layer][places] = pooled.cpu()[held]

    def add_neurons(self, layer: int, hidden: Tensor) -> None:
        pooled = self._pool(hidden).double()
        classes = self._batch().groups.to(hidden.device) % _HELD_OUT
        self.neurons[layer] = self.neurons[layer].to(hidden.device)
        self.neurons[layer][0].index_add_(0, classes, pooled)
        self.neurons[layer][1].index_add_(0, classes, pooled.square())

    def end(self) -> None:
        batch = self._batch()
        read = batch.read.cpu()
        for layer, norms in batch.norms.items():
            scaled = (norms.cpu()[read].clamp(min=1e-30).log2() - _HISTOGRAM_LOW) / (_HISTOGRAM_HIGH - _HISTOGRAM_LOW)
            bins = (scaled * _HISTOGRAM_BINS).long().clamp(0, _HISTOGRAM_BINS - 1)
            self.histograms[layer] += torch.bincount(bins, minlength=_HISTOGRAM_BINS)
        self.batch = None

    def _batch(self) -> _Batch:
        if self.batch is None:
            raise RuntimeError("No batch is being read.")
        return self.batch

    def _pool(self, hidden: Tensor) -> Tensor:
        """`[batch, seq, d]` to one float32 row per text, `[batch, d]`."""
        batch = self._batch()
        if self.request.tokens == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[rows, batch.last.to(hidden.device)].float()
        return torch.bmm(batch.weights.to(hidden.device), hidden.float())[:, 0]

    # --- results ------------------------------------------------------------------------------------------------

    def result(self, model: ModelReference, n_tokens: int, n_cut: int, paired: bool) -> Activations:
        counts = torch.bincount(self.groups, minlength=4).double()
        classes = counts[:2] + counts[2:]
        return Activations(
            model=model,
            residual={layer: self._means(sums.cpu(), classes) for layer, sums in self.residual.items()},
            neurons={layer: _moments(sums.cpu(), classes) for layer, sums in self.neurons.items()},
            rows={layer: self._class_rows(rows, torch.arange(len(rows))) for layer, rows in self.rows.items()},
            held_out=self._held_out(counts) if len(self.held) else {},
            norms={layer: _median(histogram) for layer, histogram in self.histograms.items()},
            n_texts=len(self.groups),
            n_tokens=n_tokens,
            n_cut=n_cut,
            paired=paired,
            n_positive=self.n_positive,
            features={layer: tally.result(len(self.groups)) for layer, tally in self.features.items()},
        )

    def _means(self, sums: Tensor, classes: Tensor) -> ClassMeans:
        means = ((sums[:2] + sums[2:]) / classes[:, None]).float()
        return ClassMeans(means[0], means[1])

    def _held_out(self, counts: Tensor) -> dict[int, HeldOut]:
        result = {}
        for layer, sums in self.residual.items():
            means = (sums.cpu()[:2] / counts[:2, None]).float()
            result[layer] = HeldOut(means[0] - means[1], self._class_rows(self.held_rows[layer], self.held))
        return result

    def _class_rows(self, rows: Tensor, indices: Tensor) -> ClassRows:
        positive = indices < self.n_positive
        return ClassRows(rows[positive], rows[~positive])


class _FeatureTally:
    """Running sums of one SAE's features, encoded a few texts at a time so that memory stays bounded."""

    def __init__(self, encoder: Encoder, request: Request) -> None:
        self.encoder, self.last_only, self.keep_rows = encoder, request.tokens == "last", request.feature_rows
        width = encoder.n_features
        self.n_tokens = torch.zeros(2, dtype=torch.int64)
        self.sums = torch.zeros(3, 2, width, dtype=torch.float64)  # fired, activations, their squares
        self.strongest = torch.zeros(STRONGEST_TEXTS, width)
        self.places = torch.zeros(2, STRONGEST_TEXTS, width, dtype=torch.int64)  # text, token
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, hidden: Tensor, batch: _Batch) -> None:
        read = batch.read.to(hidden.device)
        if self.last_only:
            read = read & (torch.arange(read.shape[1], device=read.device) == batch.last.to(read.device)[:, None])
        at_once = max(1, self.encoder.chunk_rows() // read.shape[1])
        for places in read.any(1).nonzero().flatten().split(at_once):
            self._add_texts(hidden[places], read[places], places, batch)

    def _add_texts(self, hidden: Tensor, read: Tensor, places: Tensor, batch: _Batch) -> None:
        """Texts of the batch, at `places` in it: encoded together, or a piece at a time where one is too long."""
        classes = batch.groups.to(hidden.device)[places] % _HELD_OUT
        pieces = hidden[read].split(self.encoder.chunk_rows())
        strongest, totals, seen = [], [], 0
        for piece in pieces:
            features = self.encoder.encode(piece)
            spans = read.sum(1) if len(pieces) == 1 else torch.tensor([len(piece)], device=hidden.device)
            self._add_sums(features, classes.repeat_interleave(spans))
            for text in features.split(spans.tolist()):
                values, tokens = text.max(0)
                strongest.append((values, tokens + seen))
                if self.keep_rows:
                    totals.append(text.sum(0))
            seen += len(piece)
        values, tokens = (torch.stack(found) for found in zip(*strongest, strict=True))
        if len(pieces) > 1:
            values, best = values.max(0, keepdim=True)
            tokens, totals = tokens.gather(0, best), [sum(totals)]
        starts = batch.starts.to(hidden.device)[places]
        own = read.int().argmax(1) - starts  # where a text's first token read stands in it
        indices = batch.indices[places.cpu()]
        self._keep_strongest(values, tokens + own[:, None].to(tokens.device), indices)
        if self.keep_rows:
            for index, total, length in zip(indices.tolist(), totals, read.sum(1).tolist(), strict=True):
                mean = (total / length).cpu()
                fired = mean.nonzero().flatten()
                self.rows[index] = (fired, mean[fired])

    def _add_sums(self, features: Tensor, of_class: Tensor) -> None:
        chosen = torch.nn.functional.one_hot(of_class, 2).T.to(features.device, features.dtype)
        self.n_tokens += torch.bincount(of_class, minlength=2).cpu()
        self.sums = self.sums.to(features.device)
        self.sums[0] += chosen @ (features > 0).to(features.dtype)
        self.sums[1] += chosen @ features
        self.sums[2] += chosen @ features.square()

    def _keep_strongest(self, values: Tensor, tokens: Tensor, indices: Tensor) -> None:
        """`values` and `tokens` `[n_texts, n_features]`: each text's strongest activations and where they are in it."""
        device = values.device
        of_text = indices.to(device)[:, None].expand_as(tokens)
        values = torch.cat([self.strongest.to(device), values])
        places = torch.cat([self.places.to(device), torch.stack([of_text, tokens])], dim=1)
        top = values.topk(STRONGEST_TEXTS, dim=0)
        self.strongest = top.values
        self.places = places.gather(1, top.indices[None].expand(2, -1, -1))

    def result(self, n_texts: int) -> FeatureStatistics:
        fired, sums, squares = self.sums.cpu()
        return FeatureStatistics(
            n_tokens=(int(self.n_tokens[0]), int(self.n_tokens[1])),
            fired=fired,
            sums=sums,
            squares=squares,
            strongest=self.strongest.T.cpu(),
            text_of=self.places[0].T.cpu(),
            token_of=self.places[1].T.cpu(),
            rows=self._sparse_rows(n_texts) if self.keep_rows else None,
        )

    def _sparse_rows(self, n_texts: int) -> SparseRows:
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
        rows = [self.rows.get(index, nothing) for index in range(n_texts)]
        counts = torch.tensor([len(places) for places, _ in rows])
        return SparseRows(
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            torch.cat([places for places, _ in rows]),
            torch.cat([values for _, values in rows]),
        )


def _moments(sums: Tensor, classes: Tensor) -> ClassMoments:
    means = sums[0] / classes[:, None]
    variances = (sums[1] / classes[:, None] - means.square()).clamp(min=0)
    return ClassMoments(means[0].float(), means[1].float(), variances[0].float(), variances[1].float())


def _median(histogram: Tensor) -> float:
    """The median of what a histogram of log2 values counted, to the middle of its bin."""
    half = histogram.sum() / 2
    middle = int(torch.searchsorted(histogram.cumsum(0).double(), half.double())) + 0.5
    return 2.0 ** (_HISTOGRAM_LOW + middle / _HISTOGRAM_BINS * (_HISTOGRAM_HIGH - _HISTOGRAM_LOW))
