"""Memory: what a batch takes, how much of a device is left for it, and batches that do not fit after all, halved.

On paper, in numbers of the model's dtype for each token that passes through a block without gradients: the stream and
its copies while it is normalised in float32 (`_STREAM` × d_model), the MLP's gate, up, activation and product
(`_MLP` × its width), queries, keys, values and what attention gives (`_HEADS` × the heads' widths). One block's are
there at a time. Keys and values of what was read before are read by each row anew, one block's at a time too.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

from neurosteer.errors import ModelError
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STREAM, _MLP, _HEADS, _ATTENDED = 8, 4, 6, 4
_SCORE_BYTES = 12  # of an attention score that is kept: in the model's dtype, its float32 softmax, and that rounded
_SHARE = 0.8  # of the free memory: what is freed comes back in pieces, and kernels want some for themselves
_MIXTURE_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


@dataclass(frozen=True)
class Footprint:
    """Bytes that a batch takes while it passes through the blocks without gradients: for each `token`, for each token
    that another one `attended` to, for each `pair` of these two, and for each `row`."""

    token: int
    attended: int
    pair: int = 0
    row: int = 0

    def of_row(self, length: int, before: int = 0) -> int:
        """Of one row of `length` tokens, to which `before` others were read before."""
        seen = before + length
        return self.row + self.token * length + self.attended * seen + self.pair * length * seen


def footprint_of(lm: LanguageModel, *, row: int = 0) -> Footprint:
    """What a token costs in this model, from its config; `row` bytes more for each row."""
    config, size = lm.model.config.get_text_config(), lm.dtype.itemsize
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    across = heads * int(getattr(config, "head_dim", None) or -(-config.hidden_size // heads))
    numbers = _STREAM * lm.shape.d_model + _MLP * _mlp_width(lm) + _HEADS * across
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return Footprint(size * numbers, size * _ATTENDED * across, heads * _SCORE_BYTES if eager else 0, row)


def _mlp_width(lm: LanguageModel) -> int:
    """Neurons that answer to one token; of a mixture of experts, those of as many as it asks."""
    config = lm.model.config.get_text_config()
    if lm.shape.d_mlp:
        return lm.shape.d_mlp
    width = next((found for name in _MIXTURE_WIDTHS if (found := getattr(config, name, None))), None)
    asked = getattr(config, "num_experts_per_tok", None) or 1
    return int(width) * int(asked) if isinstance(width, int) else 4 * lm.shape.d_model


def free_bytes(lm: LanguageModel) -> int | None:
    """What is free on the fullest of the GPUs that the model is on; None where it is on none."""
    devices = {lm.device, *(lm.layer_device(layer) for layer in range(lm.n_layers))}
    return min((_free_on(device) for device in devices if device.type == "cuda"), default=None)


def _free_on(device: torch.device) -> int:
    """What the driver has left, and what torch holds of it without using it."""
    free, _total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def budget(lm: LanguageModel, most: Mapping[str, int]) -> int:
    """Bytes that a batch may take: as many as `most` says for this kind of device (other kinds count as `cpu`), on GPUs
    four fifths of what is free at most."""
    limit, free = most.get(lm.device.type, most["cpu"]), free_bytes(lm)
    return limit if free is None else min(limit, int(_SHARE * free))


def row_cost(lm: LanguageModel, footprint: Footprint, tokens: int, *, before: int = 0) -> Callable[[int], float]:
    """What a row of so many tokens counts of the `tokens` that a batch may hold: as many as it has, on GPUs as its
    share of the free memory where that is more."""
    free = free_bytes(lm)
    if free is None:
        return float
    room = max(1.0, _SHARE * free)
    return lambda length: max(float(length), tokens * footprint.of_row(length, before) / room)


def halving(
    lm: LanguageModel,
    batches: Iterable[list[int]],
    run: Callable[[list[int]], T],
    *,
    progress: Progress = silent,
) -> Iterator[tuple[list[int], T]]:
    """Run each batch; one that runs out of the device's memory is run in two halves, and so are all after it.

    `run` may be called again with a part of a batch that it did not finish. Yields what was run together, with what
    came of it. Raises `ModelError` where a single text does not fit.
    """
    parts = 1
    for batch in batches:
        waiting = _split(batch, parts)
        while waiting:
            result, fits = _attempt(run, waiting[0])
            if fits:
                yield waiting.pop(0), result  # type: ignore[misc]
                continue
            _make_room(lm, waiting[0], progress, told=parts > 1)
            parts *= 2
            waiting = [*_split(waiting[0], 2), *(half for later in waiting[1:] for half in _split(later, 2))]


def _attempt(run: Callable[[list[int]], T], batch: list[int]) -> tuple[T | None, bool]:
    """What came of it, and whether it fit. Once this returns, nothing holds what a failed attempt left behind."""
    try:
        return run(batch), True
    except torch.OutOfMemoryError:
        return None, False


def _make_room(lm: LanguageModel, batch: list[int], progress: Progress, *, told: bool) -> None:
    if len(batch) == 1:
        free = free_bytes(lm)
        left = "" if free is None else f" ({free / 1e9:.1f} GB free)"
        raise ModelError(
            f"A single text does not fit into the memory of {lm.device}{left}; free some, give shorter texts, or load "
            f"{lm.name} quantised or in a smaller dtype."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not told:
        logger.warning("%s ran out of memory on %s; batches are halved from here on.", lm.name, lm.device)
        progress("The device ran out of memory; going on with smaller batches")


def _split(batch: list[int], parts: int) -> list[list[int]]:
    """In order, of sizes as equal as can be, none empty."""
    parts = min(parts, len(batch))
    ends = [round(len(batch) * place / parts) for place in range(parts + 1)]
    return [batch[first:last] for first, last in pairwise(ends)]
