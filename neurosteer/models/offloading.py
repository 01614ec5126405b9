"""Weights that accelerate keeps elsewhere (in the computer's memory, on disk) and fetches for each pass.

Such a weight is a tensor without numbers, on the device "meta". What it holds, and where it will be fetched to, the
hook knows that accelerate put around its module.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


def runs_on(module: Module) -> torch.device | None:
    """Where the weights of `module`, or of its first part that has any, are when it runs; None where there are none,
    or none that anyone fetches."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
            if (hook := _fetching(part)) is not None and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return None


def stored(module: Module, name: str) -> Tensor | None:
    """The weight `name` of a module itself, wherever it is kept; None where the module has none, or it has no
    numbers anywhere."""
    weight = module._parameters.get(name)
    if weight is None or not weight.is_meta:
        return weight
    hook = _fetching(module)
    return None if hook is None else hook.weights_map[name]


def stored_weights(model: Module) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, wherever they are kept: as `named_parameters`, so that of tied ones only the first is given.

    One that is nowhere is given as it is.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            yield name, weight
        elif name not in tied:  # out of their places, tied weights are no longer one tensor
            owner, _, own_name = name.rpartition(".")
            found = stored(model.get_submodule(owner), own_name)
            yield name, weight if found is None else found


def _fetching(module: Module) -> Any:
    """The hook that fetches the weights of `module`; None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((one for one in hooks if getattr(one, "weights_map", None) is not None), None)
