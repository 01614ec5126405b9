"""Finding the parts of a model: its decoder, its blocks, their MLP down projections, the final norm."""

from torch.nn import Module, ModuleList
from transformers import PreTrainedModel

from neurosteer.errors import ModelError

_DOWN_PROJECTIONS = ("down_proj", "c_proj")
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm")


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
    for key in _DOWN_PROJECTIONS:
        found = getattr(mlp, key, None)
        if isinstance(found, Module):
            return found
    parts = ", ".join(key for key, _ in (mlp if mlp is not None else block).named_children())
    raise ModelError(
        f"{name}: block {layer} ({type(block).__name__}) has no MLP down projection "
        f"({' or '.join('mlp.' + key for key in _DOWN_PROJECTIONS)}); its parts are {parts}."
    )


def find_final_norm(decoder: Module, name: str) -> Module:
    for key in _FINAL_NORMS:
        found = getattr(decoder, key, None)
        if isinstance(found, Module):
            return found
    raise ModelError(
        f"{name} ({type(decoder).__name__}): no final norm ({', '.join(_FINAL_NORMS)}) was found; "
        f"its parts are {', '.join(key for key, _ in decoder.named_children())}."
    )


def is_conv1d(module: Module) -> bool:
    return hasattr(module, "nf")  # GPT-2's Conv1D keeps its weight as [in, out]


def input_width(projection: Module) -> int:
    weight = projection.weight
    return int(weight.shape[0] if is_conv1d(projection) else weight.shape[1])  # type: ignore[index,union-attr]
