"""Finding the parts of a model (decoder, blocks, their MLP down projections, norms) and what a norm does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedModel

from neurosteer.errors import ModelError

_DOWN_PROJECTIONS = ("down_proj", "c_proj")
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm")
_NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm")
_STREAM_SCALES = ("residual_multiplier", "layer_scalar")  # Granite's, on what is added; Gemma 4's, on the whole stream


# --- finding the parts -----------------------------------------------------------------------------------------------


def find_decoder(model: PreTrainedModel, name: str) -> Module:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model.base_model
    if decoder is None or decoder is model:
        raise ModelError(f"{name} ({type(model).__name__}): no decoder beneath the LM head was found.")
    return decoder


def find_blocks(decoder: Module, n_layers: int, name: str) -> tuple[Module, ...]:
    for child in decoder.children():
        if isinstance(child, ModuleList) and len(child) == n_layers:
            return tuple(child)
    raise ModelError(
        f"{name} ({type(decoder).__name__}): no list of {n_layers} decoder blocks was found; "
        f"its parts are {', '.join(key for key, _ in decoder.named_children()) or 'none'}."
    )


def find_down_projection(block: Module, layer: int, name: str) -> Module:
    mlp = getattr(block, "mlp", None)
    if (found := part_of(mlp, _DOWN_PROJECTIONS)) is not None:
        return found
    parts = ", ".join(key for key, _ in (mlp if mlp is not None else block).named_children())
    raise ModelError(
        f"{name}: block {layer} ({type(block).__name__}) has no MLP down projection "
        f"({' or '.join('mlp.' + key for key in _DOWN_PROJECTIONS)}); its parts are {parts}."
    )


def find_final_norm(decoder: Module, name: str) -> Module:
    if (found := part_of(decoder, _FINAL_NORMS)) is not None:
        return found
    raise ModelError(
        f"{name} ({type(decoder).__name__}): no final norm ({', '.join(_FINAL_NORMS)}) was found; "
        f"its parts are {', '.join(key for key, _ in decoder.named_children())}."
    )


def part_of(module: object, names: Sequence[str]) -> Module | None:
    """The first of the parts called so that `module` has."""
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, Module)), None)


def written_columns(block: Module, down: Module) -> Tensor:
    """What each neuron of `block`, whose MLP down projection is `down`, adds to the residual stream per unit of
    activation, float32 `[d_mlp, d_model]`.

    Where the MLP's output is normalised before it is added (Gemma, OLMo 2, GLM-4), the norm's gain is folded in; its
    scale, which depends on the token, is not.
    """
    weight = down.weight.detach()  # type: ignore[union-attr,operator]
    columns = (weight if is_conv1d(down) else weight.T).float()
    for name in _STREAM_SCALES:
        columns = columns * getattr(block, name, 1.0)
    norm = part_of(block, _NORMS_AFTER_MLP)
    return columns if norm is None else probe_norm(norm, columns.shape[1:]).weigh(columns)


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
    weight = next(norm.parameters(), None)
    ones = torch.ones(*shape, device=None if weight is None or weight.is_meta else weight.device)
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
        return norm.forward(x.to(weight)).float()  # type: ignore[operator]


# --- projections -----------------------------------------------------------------------------------------------------


def is_conv1d(module: Module) -> bool:
    return hasattr(module, "nf")  # GPT-2's Conv1D keeps its weight as [in, out]


def input_width(projection: Module) -> int:
    weight = projection.weight
    return int(weight.shape[0] if is_conv1d(projection) else weight.shape[1])  # type: ignore[index,union-attr]
