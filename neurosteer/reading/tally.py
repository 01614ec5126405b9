"""Running sums over the texts of a reading pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neurosteer import processes
from neurosteer.models.framing import FramedText
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.reference import ModelReference
from neurosteer.reading.feature_tally import FeatureTally
from neurosteer.reading.request import Request
from neurosteer.reading.sink import HELD_OUT, TextBatch, read_mask, sum_device
from neurosteer.reading.statistics import Activations, ClassMeans, ClassMoments, ClassRows, HeldOut

_POOLED_AT_ONCE = 1 << 24  # numbers, since each part is copied to float32: 64 MB
_HISTOGRAM_BINS, _HISTOGRAM_LOW, _HISTOGRAM_HIGH = 1 << 14, -24.0, 40.0  # of log2(norm): bins of 0.3%


class Tally:
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
        self.held = torch.nonzero(groups >= HELD_OUT).flatten()
        self.held_rows = {layer: torch.zeros(len(self.held), shape.d_model) for layer in request.residual}
        self.rows = {layer: torch.zeros(len(groups), shape.d_model) for layer in request.rows}
        self.features = {layer: FeatureTally(encoder, request) for layer, encoder in request.encoders.items()}
        self.batch: TextBatch | None = None

    def begin(self, indices: list[int], items: Sequence[FramedText], longest: int, *, skip_first: bool) -> None:
        device = self.lm.device
        for tally in self.features.values():
            tally.begin()
        lengths = torch.tensor([len(item.ids) for item in items])
        read = read_mask(items, longest, skip_first=skip_first)
        weights = read.float() / read.sum(1, keepdim=True).clamp(min=1)
        where = torch.tensor(indices)
        self.batch = TextBatch(
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
        sums = self.residual[layer] = self.residual[layer].to(sum_device(hidden.device))
        batch.sums.append((sums, _summed(pooled.to(sums.device), batch.groups, 4)))
        batch.norms[layer] = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        if layer in self.rows:
            self.rows[layer][batch.indices] = pooled.cpu()
        if layer in self.features:
            self.features[layer].add(hidden, batch)
        held = self.groups[batch.indices] >= HELD_OUT
        if held.any():
            places = torch.searchsorted(self.held, batch.indices[held])
            self.held_rows[layer][places] = pooled.cpu()[held]

    def add_neurons(self, layer: int, hidden: Tensor) -> None:
        sums = self.neurons[layer] = self.neurons[layer].to(sum_device(hidden.device))
        batch, pooled = self._batch(), self._pool(hidden).to(sums.device)
        classes = batch.groups % HELD_OUT
        batch.sums += [
            (sums[0], _summed(pooled, classes, 2)),
            (sums[1], _summed(pooled.double().square_(), classes, 2)),
        ]

    def end(self) -> None:
        batch = self._batch()
        for sums, added in batch.sums:
            sums += added
        for tally in self.features.values():
            tally.end()
        read = batch.read.cpu()
        for layer, norms in batch.norms.items():
            scaled = (norms.cpu()[read].clamp(min=1e-30).log2() - _HISTOGRAM_LOW) / (_HISTOGRAM_HIGH - _HISTOGRAM_LOW)
            bins = (scaled * _HISTOGRAM_BINS).long().clamp(0, _HISTOGRAM_BINS - 1)
            self.histograms[layer] += torch.bincount(bins, minlength=_HISTOGRAM_BINS)
        self.batch = None

    def _batch(self) -> TextBatch:
        if self.batch is None:
            raise RuntimeError("No batch is being read.")
        return self.batch

    def _pool(self, hidden: Tensor) -> Tensor:
        """`[batch, seq, d]` to one float32 row per text, `[batch, d]`."""
        batch = self._batch()
        if self.request.tokens == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[rows, batch.last.to(hidden.device)].float()
        rows = max(1, _POOLED_AT_ONCE // hidden[0].numel())
        parts = zip(batch.weights.to(hidden.device).split(rows), hidden.split(rows), strict=True)
        return torch.cat([torch.bmm(weights, part.float()) for weights, part in parts])[:, 0]

    def add_up(self) -> None:
        """With what the other processes read, if there are any."""
        self.residual = {layer: processes.summed(sums.cpu()) for layer, sums in self.residual.items()}
        self.neurons = {layer: processes.summed(sums.cpu()) for layer, sums in self.neurons.items()}
        for kept in (self.histograms, self.held_rows, self.rows):  # rows are 0 where another process read them
            for tensor in kept.values():
                processes.summed(tensor)
        for tally in self.features.values():
            tally.add_up()

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


def _summed(pooled: Tensor, groups: Tensor, count: int) -> Tensor:
    """Rows added up by the group that each belongs to, `[n, d]` to float64 `[count, d]`."""
    sums = torch.zeros(count, pooled.shape[1], dtype=torch.float64, device=pooled.device)
    return sums.index_add_(0, groups.to(pooled.device), pooled.double())


def _moments(sums: Tensor, classes: Tensor) -> ClassMoments:
    means = sums[0] / classes[:, None]
    variances = (sums[1] / classes[:, None] - means.square()).clamp(min=0)
    return ClassMoments(means[0].float(), means[1].float(), variances[0].float(), variances[1].float())


def _median(histogram: Tensor) -> float:
    """The median of what a histogram of log2 values counted, to the middle of its bin."""
    half = histogram.sum() / 2
    middle = int(torch.searchsorted(histogram.cumsum(0).double(), half.double())) + 0.5
    return 2.0 ** (_HISTOGRAM_LOW + middle / _HISTOGRAM_BINS * (_HISTOGRAM_HIGH - _HISTOGRAM_LOW))
