"""A recipe baked into plain weights: a folder that every engine loads as it loads the model.

Scaling a neuron by m is its column of the down projection times m. What is added after a block, and what shifted
neurons come to (W · shift), is a constant: the bias of that projection, where the architecture has one. Llama and its
kin have one if their config says so (`mlp_bias`); Mistral and Qwen2 are then written as the Llama that they are.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from neurosteer.errors import ArtifactError, UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.parts import (
    find_blocks,
    find_decoder,
    find_down_projection,
    is_conv1d,
    norm_after_mlp,
    stream_scale,
)
from neurosteer.models.quantization import quantization_of
from neurosteer.steering.plans import Plan
from neurosteer.text import error_line

_BIAS_SWITCHES = ("mlp_bias", "use_bias")
_LLAMAS_BY_OTHER_NAMES = ("mistral", "qwen2")
_CHOICES = "export vectors --to gguf (llama.cpp), or scale neurons only"


def check_plain_weights(lm: LanguageModel, to: str) -> None:
    """Raise `UsageError` where the weights are packed, so that nothing can be written into them, or not in memory."""
    packed = quantization_of(lm.model)
    if packed is not None:
        raise UsageError(f"The weights of {lm.name} are {packed}, which --to {to} cannot change; load them plain.")
    if any(parameter.is_meta for parameter in lm.model.parameters()):
        raise UsageError(f"{lm.name} does not fit the GPUs, so its weights are not all at hand; use --device cpu.")


def empty_model(lm: LanguageModel, plan: Plan) -> Any:
    """A model of transformers without weights that takes what `plan` comes to: of the model's own kind, with biases
    switched on, or the Llama that it is.

    Raises `UsageError` naming the layer where no architecture takes it exactly.
    """
    constant = sorted({*plan.additions, *(at for at, change in plan.changes.items() if change.shifts.any())})
    for layer in {*constant, *plan.changes}:
        if lm.projections[layer] is None:
            raise UsageError(f"Block {layer} of {lm.name} has no MLP of its own to bake into; {_CHOICES}.")
    normed = [layer for layer in plan.additions if norm_after_mlp(lm.blocks[layer]) is not None]
    if normed:
        raise UsageError(
            f"{lm.name} ({_kind(lm)}) normalises what its MLP at layer {normed[0]} puts out, so no bias there adds a "
            f"constant; {_CHOICES}."
        )
    for config in _configs(lm):
        found = _of_config(lm, config)
        if found is not None and all(_down_of(found, layer).bias is not None for layer in constant):
            return found
    raise UsageError(
        f"{lm.name} ({_kind(lm)}) has no bias on its MLP's output that could hold what is added at layer "
        f"{[*constant, *plan.changes][0]}; {_CHOICES}."
    )


@torch.no_grad()
def write_weights(lm: LanguageModel, plan: Plan, empty: Any, folder: Path) -> None:
    """Write the model with `plan` in its weights to `folder`, in transformers' format with its tokenizer.

    `empty` is what `empty_model` gave; it is filled. The loaded model's own weights stay as they are.
    """
    state = dict(lm.model.state_dict())
    for name, tensor in empty.state_dict().items():
        if name not in state:  # a bias that was switched on
            state[name] = torch.zeros(tensor.shape, dtype=lm.dtype)
    names = {module: name for name, module in lm.model.named_modules()}
    for layer in sorted({*plan.additions, *plan.changes}):
        down = lm.projections[layer]
        assert down is not None
        name = names[down]
        weight, bias = _baked(lm, plan, layer, state[f"{name}.weight"], state.get(f"{name}.bias"))
        state[f"{name}.weight"] = weight
        if bias is not None:
            state[f"{name}.bias"] = bias
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    empty.generation_config = lm.model.generation_config
    transformers_logging.disable_progress_bar()
    try:
        empty.save_pretrained(folder)
    except ValueError as error:  # such as for a generation config that contradicts itself
        raise ArtifactError(f"transformers cannot save {lm.name} ({error_line(error)}); correct that first.") from error
    lm.tokenizer.save_pretrained(folder)


def _baked(
    lm: LanguageModel, plan: Plan, layer: int, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The down projection of `layer` with the plan in it: its weight, as it is laid out, and its bias `[d_model]`."""
    down, change = lm.projections[layer], plan.changes.get(layer)
    columns = weight if is_conv1d(down) else weight.T  # type: ignore[arg-type]  # [d_mlp, d_model]
    columns = columns.clone()
    constant = torch.zeros(lm.shape.d_model, device=weight.device)
    if layer in plan.additions:
        constant += plan.additions[layer][0, 0].to(weight.device) / stream_scale(lm.blocks[layer])
    if change is not None:
        here = change.to(weight.device)
        constant += here.shifts[0, 0] @ columns[here.neurons]
        columns[here.neurons] *= here.multipliers[0, 0, :, None]
    baked = columns if is_conv1d(down) else columns.T.contiguous()  # type: ignore[arg-type]
    return baked, bias.to(weight.device) + constant if bias is not None else None


# --- architectures ---------------------------------------------------------------------------------------------------


def _kind(lm: LanguageModel) -> str:
    return lm.model.config.get_text_config().model_type


def _configs(lm: LanguageModel) -> Iterator[Any]:
    """The model's own config, the same with biases switched on, and the Llama's that it is."""
    own = copy.deepcopy(lm.model.config)
    own.dtype = lm.dtype
    if hasattr(own, "quantization_config"):  # of a GGUF file, whose weights are unpacked
        del own.quantization_config
    yield own
    for switch in _BIAS_SWITCHES:
        if getattr(own.get_text_config(), switch, None) is False:
            switched = copy.deepcopy(own)
            setattr(switched.get_text_config(), switch, True)
            yield switched
    if own.model_type in _LLAMAS_BY_OTHER_NAMES and not _has_window(own):
        known = {name: value for name, value in own.to_dict().items() if name in LlamaConfig().to_dict()}
        for name in ("model_type", "architectures", "transformers_version"):
            known.pop(name, None)
        yield LlamaConfig(**{**known, "mlp_bias": True, "attention_bias": own.model_type == "qwen2"})


def _has_window(config: Any) -> bool:
    """Whether some layer sees fewer tokens than the model was made for."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        return False
    return window is not None and window < config.max_position_embeddings


def _of_config(lm: LanguageModel, config: Any) -> Any:
    """A model without weights; None where the architecture does not take such a config."""
    with torch.device("meta"), suppress(Exception):  # each has its own kind of error
        config.validate()  # as saving it will
        if config.model_type == lm.model.config.model_type:
            return type(lm.model)._from_config(config, dtype=lm.dtype)
        return AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
    return None


def _down_of(model: Any, layer: int) -> Any:
    config = model.config.get_text_config()
    block = find_blocks(find_decoder(model, "The export"), config.num_hidden_layers, "The export")[layer]
    return find_down_projection(block, config)
