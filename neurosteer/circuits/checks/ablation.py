"""What prompts' metrics come to while some neurons run and the others are ablated, many such sets in one batch."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from neurosteer.circuits.relp.attribution import Attribution
from neurosteer.errors import UsageError
from neurosteer.models.batching import padded
from neurosteer.models.hooks import InputHook, hooked
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.models.logits import logits_at, where_last
from neurosteer.models.memory import budget, halving
from neurosteer.progress import Progress, check_cancelled

Ablation = Literal["zero", "mean", "paired"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "mean", "paired")

_BATCH_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Replacement:
    """What neurons are set to where they do not run: `values[L]` is `[n, d_mlp]`, and `places` `[prompts, seq]` says
    which of the n belongs to a token."""

    values: tuple[Tensor, ...]
    places: Tensor

    def __call__(self, layer: int, prompts: Tensor) -> Tensor:
        """`[rows, seq, d_mlp]`, or what broadcasts to it, for rows of these `prompts` `[rows]`; where the layer is."""
        values = self.values[layer]
        return values[self.places[prompts].to(values.device)] if len(values) > 1 else values


@dataclass(frozen=True)
class Bench:
    """The prompts of an attribution, padded on the right, ready to be run with any neurons ablated.

    `ids` and `lasts` (true at each prompt's end) are `[prompts, seq]`, `targets` and `others` `[prompts, 1]`; `others`
    is None where the metric is the target's logit alone. All stay on the CPU, since a model's layers and its LM head
    may lie on several devices: what a batch needs goes where it is needed.
    """

    lm: LanguageModel
    ids: Tensor
    lasts: Tensor
    targets: Tensor
    others: Tensor | None
    replacement: Replacement
    rows_at_once: int

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        attribution: Attribution,
        ablation: Ablation,
        counterfactual_prompts: Sequence[Prompt] | None = None,
        batch_tokens: int | None = None,
    ) -> "Bench":
        """Raises `UsageError` for counterfactual prompts that do not fit, `MismatchError` for another model."""
        attribution.check_model(lm)
        rows = [one.choice.ids for one in attribution.prompts]
        others = [one.counterfactual.id for one in attribution.prompts if one.counterfactual is not None]
        ids = padded(rows, lm.pad_id)
        counterfactuals = _counterfactuals(lm, attribution, counterfactual_prompts)
        return cls(
            lm=lm,
            ids=ids,
            lasts=where_last(rows, ids.shape[1]),
            targets=torch.tensor([[one.target.id] for one in attribution.prompts]),
            others=torch.tensor(others)[:, None] if others else None,
            replacement=_replacement(lm, rows, ids.shape[1], ablation, counterfactuals),
            rows_at_once=max(1, (batch_tokens or _batch_tokens(lm)) // ids.shape[1]),
        )

    def measure(self, running: Sequence[Tensor], progress: Progress, cancel: threading.Event | None) -> list[float]:
        """The metric, mean over prompts, with only the neurons of each of `running` running, bool `[n_layers, d_mlp]`.

        Every set × prompt is a row of some batch. Raises `Cancelled`.
        """
        pairs = [(place, prompt) for place in range(len(running)) for prompt in range(len(self.ids))]
        sums = torch.zeros(len(running), dtype=torch.float64)

        def run(rows: list[int]) -> Tensor:
            check_cancelled(cancel, "Measuring faithfulness")
            progress("Measuring faithfulness", rows[0] / len(pairs))
            return self._metrics(
                torch.stack([running[pairs[row][0]] for row in rows]), torch.tensor([pairs[row][1] for row in rows])
            )

        batches = (rows.tolist() for rows in torch.arange(len(pairs)).split(self.rows_at_once))
        for rows, values in halving(self.lm, batches, run, progress=progress):
            sums.index_add_(0, torch.tensor([pairs[row][0] for row in rows]), values)
        return (sums / len(self.ids)).tolist()

    @torch.inference_mode()
    def _metrics(self, running: Tensor, prompts: Tensor) -> Tensor:
        """The metric of each row, float64 `[rows]`, on the CPU; `running` is bool `[rows, n_layers, d_mlp]`."""
        hooks = [
            InputHook(down, lambda hidden, layer=layer: self._ablated(hidden, layer, running[:, layer], prompts))
            for layer, down in enumerate(self.lm.down_projections)
        ]
        with hooked(hooks):
            logits = logits_at(self.lm, self.ids[prompts], self.lasts[prompts])
        values = logits.gather(1, self.targets[prompts].to(logits.device))
        if self.others is not None:
            values = values - logits.gather(1, self.others[prompts].to(logits.device))
        return values[:, 0].double().cpu()

    def _ablated(self, hidden: Tensor, layer: int, running: Tensor, prompts: Tensor) -> Tensor:
        replacement = self.replacement(layer, prompts).to(hidden.device, hidden.dtype)
        return torch.where(running[:, None].to(hidden.device), hidden, replacement)


# --- what replaces a neuron ------------------------------------------------------------------------------------------


def _counterfactuals(
    lm: LanguageModel, attribution: Attribution, prompts: Sequence[Prompt] | None
) -> list[list[int]] | None:
    if prompts is None:
        return None
    raw, seed_response = bool(attribution.parameters.get("raw")), attribution.parameters.get("seed_response", "")
    rows = [lm.prompt_ids(prompt, raw=raw, seed_response=seed_response) if prompt else [] for prompt in prompts]
    if not rows or not all(rows):
        raise UsageError("A counterfactual prompt is empty; write at least one character.")
    return rows


def _replacement(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    width: int,
    ablation: Ablation,
    counterfactuals: Sequence[Sequence[int]] | None,
) -> Replacement:
    places = torch.zeros(len(rows), width, dtype=torch.long)
    if ablation == "zero":
        return Replacement(tuple(torch.zeros(1, 1, lm.shape.d_mlp) for _ in range(lm.n_layers)), places)
    if ablation == "mean":
        found = _neurons(lm, counterfactuals or rows)
        longest = len(max(counterfactuals or rows, key=len))
        for row, ids in enumerate(rows):  # further from the end than all that was read: what is furthest
            places[row, : len(ids)] = (longest - torch.arange(len(ids), 0, -1)).clamp(min=0)
        return Replacement(tuple(_means_by_distance(states, longest) for states in found), places)
    assert counterfactuals is not None
    _check_pairs(rows, counterfactuals)
    start = 0
    for row, ids in enumerate(rows):
        places[row, : len(ids)] = start + torch.arange(len(ids))
        start += len(ids)
    return Replacement(tuple(torch.cat(states) for states in _neurons(lm, counterfactuals)), places)


def _check_pairs(rows: Sequence[Sequence[int]], counterfactuals: Sequence[Sequence[int]]) -> None:
    if len(counterfactuals) != len(rows):
        raise UsageError(
            f"There are {len(counterfactuals)} counterfactual prompts and {len(rows)} prompts; give one each."
        )
    for place, (row, other) in enumerate(zip(rows, counterfactuals, strict=True), start=1):
        if len(row) != len(other):
            raise UsageError(
                f"Prompt {place} has {len(row)} tokens and its counterfactual prompt {len(other)}; paired ablation "
                "needs as many. Reword one, or use ablation 'mean'."
            )


def _neurons(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """What each layer's neurons are at each token of each row: per layer one float32 `[seq, d_mlp]` a row."""
    found: list[list[Tensor]] = [[] for _ in range(lm.n_layers)]

    def keep(layer: int, hidden: Tensor) -> None:
        found[layer].append(hidden[0].float())

    hooks = [InputHook(down, partial(keep, layer)) for layer, down in enumerate(lm.down_projections)]
    with torch.inference_mode(), hooked(hooks):
        for row in rows:
            lm.decoder(input_ids=torch.tensor([list(row)], device=lm.device), use_cache=False)
    return found


def _means_by_distance(states: Sequence[Tensor], longest: int) -> Tensor:
    """Means of `states` (each `[seq, d_mlp]`) at the same distance from the end, `[longest, d_mlp]`."""
    sums, counts = states[0].new_zeros(longest, states[0].shape[1]), states[0].new_zeros(longest, 1)
    for one in states:
        sums[longest - len(one) :] += one
        counts[longest - len(one) :] += 1
    return sums / counts


def _batch_tokens(lm: LanguageModel) -> int:
    """As many tokens as a layer's neurons and what ablates them leave within 256 MiB (4 GiB on a GPU)."""
    per_token = 4 * (4 * lm.shape.d_mlp + 8 * lm.shape.d_model) * lm.dtype.itemsize
    return max(64, budget(lm, _BATCH_BYTES) // per_token)
