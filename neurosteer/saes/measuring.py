"""How well SAEs do on texts that they were not trained on."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer.models.batching import length_batches, padded
from neurosteer.models.hooks import OutputHook, hooked
from neurosteer.models.language_model import FramedText, LanguageModel
from neurosteer.models.logits import logits_at
from neurosteer.progress import check_cancelled
from neurosteer.reading.loop import read_tokens
from neurosteer.saes.autoencoder import SparseAutoencoder

CROSS_ENTROPY_TOKENS, _MEASURED_AT_ONCE = 20_000, 1024


@dataclass(frozen=True)
class SaeMeasures:
    """Figures of an SAE on held-out text.

    `explained_variance` is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²; `l0` the active features per token; `dead` the share of
    features that never fired; `cross_entropy_recovered` (CE of mean ablation − CE of the reconstruction) / (CE of mean
    ablation − CE of the model), the stream being replaced at the text's own tokens.
    """

    explained_variance: float
    l0: float
    dead: float
    cross_entropy_recovered: float
    n_tokens: int
    n_tokens_cross_entropy: int


def measure_saes(
    lm: LanguageModel,
    saes: Sequence[SparseAutoencoder],
    framed: Sequence[FramedText],
    *,
    cross_entropy_tokens: int = CROSS_ENTROPY_TOKENS,
    cancel: threading.Event | None = None,
) -> list[SaeMeasures]:
    """Measure SAEs at different layers together, on texts they were not trained on."""
    rows = read_groups(lm, framed, [sae.layer for sae in saes], cancel)
    means = [rows[sae.layer].float().mean(0) for sae in saes]
    recovered, n_tokens = _cross_entropy_recovered(lm, saes, framed, means, cross_entropy_tokens, cancel)
    return [
        SaeMeasures(
            *_reconstruction(sae, rows[sae.layer], mean),
            cross_entropy_recovered=share,
            n_tokens=len(rows[sae.layer]),
            n_tokens_cross_entropy=n_tokens,
        )
        for sae, mean, share in zip(saes, means, recovered, strict=True)
    ]


def read_groups(
    lm: LanguageModel, framed: Sequence[FramedText], layers: Sequence[int], cancel: threading.Event | None
) -> dict[int, Tensor]:
    """Texts under a template apart from the others, whose common beginning is then read once."""
    groups = [[item for item in framed if (item.start > 0) is templated] for templated in (False, True)]
    parts = [read_tokens(lm, group, layers, cancel=cancel) for group in groups if group]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


def _reconstruction(sae: SparseAutoencoder, rows: Tensor, mean: Tensor) -> tuple[float, float, float]:
    """Explained variance, active features per token, share of features that never fire."""
    device = sae.decoder.device
    error, total, active, fired = 0.0, 0.0, 0.0, torch.zeros(sae.n_features, dtype=torch.bool, device=device)
    mean = mean.to(device)
    for part in rows.split(min(sae.chunk_rows(), 8192)):
        chunk = part.to(device)
        features, plain = sae.encode(chunk), _as_read(sae, chunk)
        error += float((plain - sae.decode(features)).square().sum())
        total += float((plain - _as_read(sae, mean)).square().sum())
        active += float((features > 0).sum())
        fired |= (features > 0).any(0)
    return 1 - error / total, active / len(rows), 1 - float(fired.float().mean())


def _as_read(sae: SparseAutoencoder, rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows - rows.mean(-1, keepdim=True) if sae.centred else rows


def _cross_entropy_recovered(
    lm: LanguageModel,
    saes: Sequence[SparseAutoencoder],
    framed: Sequence[FramedText],
    means: Sequence[Tensor],
    at_most: int,
    cancel: threading.Event | None,
) -> tuple[list[float], int]:
    """Of each SAE; every batch of texts runs as it is, then with the stream replaced by its reconstruction, and by its
    mean. The count is of the tokens predicted."""
    texts, count = [], 0
    for item in framed:
        if count >= at_most:
            break
        texts.append(item)
        count += len(item.ids) - 1 - max(1, item.start)
    plain, rebuilt, ablated = 0.0, [0.0] * len(saes), [0.0] * len(saes)
    for places in length_batches(texts, _MEASURED_AT_ONCE):
        batch = [texts[place] for place in places]
        check_cancelled(cancel, "Measuring")
        plain += _loss(lm, batch, 0, None)
        for place, (sae, mean) in enumerate(zip(saes, means, strict=True)):
            rebuilt[place] += _loss(lm, batch, sae.layer, lambda hidden, sae=sae: _reconstructed(sae, hidden))
            ablated[place] += _loss(lm, batch, sae.layer, lambda hidden, mean=mean: mean.to(hidden).expand_as(hidden))
    return [
        (none - new) / (none - plain) if none != plain else 0.0 for none, new in zip(ablated, rebuilt, strict=True)
    ], count


def _reconstructed(sae: SparseAutoencoder, hidden: Tensor) -> Tensor:
    rebuilt = sae.decode(sae.encode(hidden)).to(hidden.device)  # an SAE need not be where the layer is
    return rebuilt + hidden.float().mean(-1, keepdim=True) if sae.centred else rebuilt


def _loss(
    lm: LanguageModel, batch: Sequence[FramedText], layer: int, change: Callable[[Tensor], Tensor] | None
) -> float:
    """Summed cross-entropy (nats) of what follows the texts' own tokens, the stream of those tokens being changed.

    Rows are padded on the right, where a causal model does not look from any token that counts.
    """
    ids = padded([item.ids for item in batch], lm.pad_id)
    own = torch.zeros_like(ids, dtype=torch.bool)
    for row, item in enumerate(batch):
        own[row, max(1, item.start) : len(item.ids)] = True
    predicting = torch.nn.functional.pad(own[:, :-1] & own[:, 1:], (0, 1))

    def replaced(hidden: Tensor) -> Tensor | None:
        if change is None:
            return None
        return torch.where(own[..., None].to(hidden.device), change(hidden).to(hidden), hidden)

    with torch.inference_mode(), hooked([OutputHook(lm.blocks[layer], replaced)]):
        logits = logits_at(lm, ids, predicting)
    targets = ids.roll(-1, dims=1)[predicting].to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
