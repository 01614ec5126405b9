"""Running sums of one SAE's features over the texts of a reading pass."""

import torch
from torch import Tensor

from neurosteer import processes
from neurosteer.reading.request import STRONGEST_TEXTS, Encoder, Request
from neurosteer.reading.sink import HELD_OUT, TextBatch, sum_device
from neurosteer.reading.statistics import FeatureStatistics, SparseRows


class FeatureTally:
    """Running sums of one SAE's features, encoded a few texts at a time so that memory stays bounded."""

    def __init__(self, encoder: Encoder, request: Request) -> None:
        self.encoder, self.last_only, self.keep_rows = encoder, request.tokens == "last", request.feature_rows
        width = encoder.n_features
        self.n_tokens = torch.zeros(2, dtype=torch.int64)
        self.sums = torch.zeros(3, 2, width, dtype=torch.float64)  # fired, activations, their squares
        self.strongest = torch.zeros(STRONGEST_TEXTS, width)
        self.places = torch.zeros(2, STRONGEST_TEXTS, width, dtype=torch.int64)  # text, token
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # what a batch that has not ended adds to

    def begin(self) -> None:
        """A batch begins; what one that did not end has added is forgotten."""
        if self.before is not None:
            self.n_tokens, self.sums, self.strongest, self.places = self.before
        self.before = self.n_tokens.clone(), self.sums.clone(), self.strongest, self.places

    def end(self) -> None:
        self.before = None

    def add(self, hidden: Tensor, batch: TextBatch) -> None:
        read = batch.read.to(hidden.device)
        if self.last_only:
            read = read & (torch.arange(read.shape[1], device=read.device) == batch.last.to(read.device)[:, None])
        at_once = max(1, self.encoder.chunk_rows() // read.shape[1])
        for places in read.any(1).nonzero().flatten().split(at_once):
            self._add_texts(hidden[places], read[places], places, batch)

    def _add_texts(self, hidden: Tensor, read: Tensor, places: Tensor, batch: TextBatch) -> None:
        """Texts of the batch, at `places` in it: encoded together, or a piece at a time where one is too long."""
        classes = batch.groups.to(hidden.device)[places] % HELD_OUT
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
        self.sums = self.sums.to(sum_device(features.device))
        parts = ((features > 0).to(features.dtype), features, features.square())
        for total, part in zip(self.sums, parts, strict=True):
            total += (chosen @ part).to(total.device)

    def _keep_strongest(self, values: Tensor, tokens: Tensor, indices: Tensor) -> None:
        """`values` and `tokens` `[n_texts, n_features]`: each text's strongest activations and where they are in it."""
        of_text = indices.to(values.device)[:, None].expand_as(tokens)
        self._keep_best(values, torch.stack([of_text, tokens]))

    def _keep_best(self, values: Tensor, places: Tensor) -> None:
        device = values.device
        values = torch.cat([self.strongest.to(device), values])
        places = torch.cat([self.places.to(device), places], dim=1)
        top = values.topk(STRONGEST_TEXTS, dim=0)
        self.strongest = top.values
        self.places = places.gather(1, top.indices[None].expand(2, -1, -1))

    def add_up(self) -> None:
        """With what the other processes read, if there are any."""
        self.sums = processes.summed(self.sums.cpu())
        processes.summed(self.n_tokens)
        found = processes.gathered((self.strongest.cpu(), self.places.cpu(), self.rows))
        self.strongest, self.places = torch.zeros_like(self.strongest), torch.zeros_like(self.places)
        for values, places, rows in found:
            self._keep_best(values, places)
            self.rows |= rows

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
