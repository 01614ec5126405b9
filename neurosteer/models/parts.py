"""Finding the parts of a model (decoder, blocks, their MLP down projections, norms) and what a norm does.

Parts are found by what they are (a list of as many modules as the model has layers, a linear map onto the residual
stream), by their names only where that leaves a choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Linear, Module, ModuleList
from transformers import PreTrainedModel

from neurosteer.errors import ModelError
from neurosteer.models.hooks import Hook, InputHook, OutputHook, hooked
from neurosteer.models.offloading import runs_on, stored

_MIXERS = ("attn", "attention", "mixer", "mamba", "conv", "temporal", "recurrent", "ssm")  # of tokens with others
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm")
_STREAM_SCALES = ("residual_multiplier", "residual_scale", "layer_scalar")
"""Granite's and MiniCPM 3's, on what is added; Gemma 4's, on the whole stream."""
_COLUMNS_AT_ONCE = 2048


# --- finding the parts -----------------------------------------------------------------------------------------------


def find_decoder(model: PreTrainedModel, name: str) -> Module:
    """What holds the list of blocks: the model without its LM head."""
    n_layers = model.config.get_text_config().num_hidden_layers
    get_decoder = getattr(model, "get_decoder", None)
    named = (get_decoder() if get_decoder is not None else None, model.base_model)
    beneath = [module for module in named if isinstance(module, Module) and module is not model]
    found = next((module for module in (*beneath, *model.modules()) if _blocks_of(module, n_layers)), None)
    if found is None and beneath:
        return beneath[0]  # `find_blocks` says what it has instead
    if found is None or found is model:
        raise ModelError(f"{name} ({type(model).__name__}): no decoder beneath the LM head was found.")
    return found


def _blocks_of(decoder: Module, n_layers: int) -> tuple[Module, ...]:
    lists = (child for child in decoder.children() if isinstance(child, ModuleList) and len(child) == n_layers)
    return tuple(next(lists, ()))


def find_blocks(decoder: Module, n_layers: int, name: str) -> tuple[Module, ...]:
    found = _blocks_of(decoder, n_layers)
    if not found:
        raise ModelError(
            f"{name} ({type(decoder).__name__}): no list of {n_layers} decoder blocks was found; "
            f"its parts are {', '.join(key for key, _ in decoder.named_children()) or 'none'}."
        )
    return found


def find_down_projection(block: Module, config: Any) -> Module | None:
    """The one linear map by which the MLP of `block` writes to the residual stream; None where it has no such map:
    where it is a mixture of experts, or where the block has no MLP.

    It maps onto `d_model` and lies outside of what mixes tokens. Where there are several such maps, it is the one that
    has as many inputs as the model's config says that its MLP has neurons.
    """
    if is_mixture(block):
        return None
    found = list(_maps_onto(block, config.hidden_size))
    if len(found) > 1:
        width = next((value for name in _WIDTHS if (value := getattr(config, name, None)) is not None), None)
        found = [part for part in found if input_width(part) == width]
    return found[0] if len(found) == 1 else None


def is_mixture(block: Module) -> bool:
    """Whether the block's MLP is a mixture of experts: of several modules, or of weights with an axis for experts."""
    return any("expert" in key for key, _ in block.named_modules()) or any(
        weight.dim() == 3 and len(weight) > 1 and not _mixes(key) for key, weight in block.named_parameters()
    )


def _maps_onto(block: Module, width: int) -> Iterator[Module]:
    return (
        part
        for key, part in block.named_modules()
        if not _mixes(key) and not list(part.children()) and output_width(part) == width
    )


def _mixes(key: str) -> bool:
    """Whether a part of a block, by its name, is where tokens see others."""
    return any(word in name for name in key.lower().split(".")[:-1] or [""] for word in _MIXERS)


def find_final_norm(decoder: Module) -> Module:
    """The norm after the last block; none does nothing."""
    children = list(decoder.children())
    blocks = next((place for place, child in enumerate(children) if isinstance(child, ModuleList)), 0)
    norms = [child for child in children if "norm" in type(child).__name__.lower()]
    return next((child for child in children[blocks:] if child in norms), norms[-1] if norms else Identity())


class _Seen(Exception):
    """Leaves a pass after the first block."""


def check_stream(decoder: Module, blocks: Sequence[Module], down: Module | None, d_model: int, name: str) -> bool:
    """Send two tokens through the first block, whose down projection is `down`. Whether that got its neurons as
    `[batch, seq, d_mlp]`: some models (OPT) lay all rows' tokens end to end.

    Raises `ModelError` where blocks do not hand on one residual stream `[batch, seq, d_model]`.
    """
    shapes: list[tuple[int, ...]] = []
    neurons: list[int] = []

    def look(hidden: Tensor) -> None:
        shapes.append(tuple(hidden.shape))
        raise _Seen

    device = runs_on(decoder)
    if device is None:
        return True
    hooks: list[Hook] = [OutputHook(blocks[0], look)]
    if down is not None:
        hooks.append(InputHook(down, lambda hidden: neurons.append(hidden.dim())))
    try:
        with torch.no_grad(), hooked(hooks):
            decoder(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except _Seen:
        pass
    except Exception as error:  # a model's own code fails in its own way
        raise ModelError(f"{name} ({type(decoder).__name__}) does not run: {str(error)[:200]}") from error
    if not shapes or shapes[0] != (1, 2, d_model):
        seen = " × ".join(map(str, shapes[0])) if shapes else "nothing"
        raise ModelError(
            f"{name} ({type(decoder).__name__}): its blocks hand on {seen} for two tokens instead of one residual "
            f"stream of {d_model}; models with several streams cannot be steered."
        )
    return neurons == [3]


def part_of(module: object, names: Sequence[str]) -> Module | None:
    """The first of the parts called so that `module` has."""
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, Module)), None)


def written_columns(block: Module, down: Module) -> Tensor:
    """What each neuron of `block`, whose MLP down projection is `down`, adds to the residual stream per unit of
    activation, float32 `[d_mlp, d_model]`.

    The projection itself is asked, whatever it keeps its weight as. Where the MLP's output is normalised before it is
    added (Gemma, OLMo 2, GLM-4), the norm's gain is folded in; its scale, which depends on the token, is not.
    """
    columns = _columns(down) * stream_scale(block)
    norm = norm_after_mlp(block)
    return columns if norm is None else probe_norm(norm, columns.shape[1:]).weigh(columns)


def stream_scale(block: Module) -> float | Tensor:
    """By what the MLP's output is multiplied on its way into the residual stream after `block`."""
    scale: float | Tensor = 1.0
    for name in _STREAM_SCALES:
        scale = scale * getattr(block, name, 1.0)
    return scale


def norm_after_mlp(block: Module) -> Module | None:
    """The norm between the MLP's output and the residual stream, where there is one."""
    return part_of(block, _NORMS_AFTER_MLP)


@torch.no_grad()
def _columns(down: Module) -> Tensor:
    """What a linear map makes of one unit of each input alone, float32 `[in, out]`."""
    weight = stored(down, "weight")
    if type(down) is Linear and weight is not None:
        return weight.T.float()
    if is_conv1d(down) and weight is not None:
        return weight.float()
    known, device = next(down.parameters(), torch.empty(0)), runs_on(down)
    plain = known.is_floating_point() and known.dtype.itemsize >= 2  # one byte is packed
    dtype = known.dtype if plain else torch.float32
    width = input_width(down)
    nothing = down(torch.zeros(1, width, device=device, dtype=dtype)).float()
    pieces = []
    for first in range(0, width, _COLUMNS_AT_ONCE):
        units = torch.zeros(min(_COLUMNS_AT_ONCE, width - first), width, device=device, dtype=dtype)
        units[torch.arange(len(units)), torch.arange(first, first + len(units))] = 1.0
        pieces.append(down(units).float() - nothing)
    return torch.cat(pieces)


# --- norms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormParts:
    """What a norm makes of x: `gain` × x / its root mean square + `bias`, x without its mean where it `centres`.

    Both tensors are float32, of the shape that is normalised.
    """

    gain: Tensor
    bias: Tensor
    centres: bool

    def linear(self, x: Tensor) -> Tensor:
        """What of x the norm is linear in while its scale is constant."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def weigh(self, x: Tensor) -> Tensor:
        """x as the norm passes it on, but for its scale and bias."""
        return self.linear(x) * self.gain.to(x.device)


@torch.no_grad()
def probe_norm(norm: Module, shape: Sequence[int]) -> NormParts:
    """Ask a norm what it makes of alternating ones and minus ones, whose mean is 0 and whose root mean square is 1.

    Neither a norm's name nor its weight tells whether the gain is the weight (Llama, Gemma 4), 1 + weight (Gemma 1 to
    3, Qwen3-Next, Nemotron) or nothing at all (OLMo 1). Hooks on the norm don't see the question.
    """
    ones = torch.ones(*shape, device=runs_on(norm))
    ones[..., 1::2] = -1.0
    up, down, shifted = norm_of(norm, torch.stack([ones, -ones, ones + 1.0]))
    centres = torch.allclose(up, shifted, rtol=0.0, atol=0.02 * float(up.abs().max()))
    return NormParts((up - down) / 2 * ones.to(up.device), (up + down) / 2, centres)


def norm_of(norm: Module, x: Tensor) -> Tensor:
    """What `norm` makes of x, float32, in as much precision as it takes."""
    try:
        return norm.forward(x).float()  # type: ignore[operator]
    except RuntimeError:  # torch's own LayerNorm takes its weights' type only
        weight = next(norm.parameters())
        return norm.forward(x.to(weight.dtype)).float()  # type: ignore[operator]


# --- projections -----------------------------------------------------------------------------------------------------


def is_conv1d(module: Module) -> bool:
    return hasattr(module, "nf")  # GPT-2's Conv1D keeps its weight as [in, out]


def input_width(projection: Module) -> int:
    """What a linear map says of itself: the weight's own shape tells nothing where it is packed."""
    return int(projection.nx if is_conv1d(projection) else projection.in_features)  # type: ignore[arg-type]


def output_width(part: Module) -> int | None:
    """How many numbers a linear map gives; None for what is no linear map."""
    found = getattr(part, "nf", None) or getattr(part, "out_features", None)
    return found if isinstance(found, int) else None
