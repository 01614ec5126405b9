"""Scaled neurons as a low-rank adapter (PEFT's format) on the plain model: exact, and switched per request by engines.

A column of W times m is W + (m − 1) × that column: A is one-hot at the neuron, B that column times m − 1. The rank is
the number of neurons of the fullest block.
"""

import copy
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from neurosteer.errors import ArtifactError, UsageError
from neurosteer.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import describe_model
from neurosteer.models.parts import is_conv1d
from neurosteer.steering.plans import Plan
from neurosteer.text import error_line


def check_peft() -> None:
    """Raise `UsageError` where PEFT, which reads what was written, is not installed."""
    if find_spec("peft") is None:
        raise UsageError("--to lora needs peft to check what it wrote; install it with pip install 'neurosteer[lora]'.")


@torch.no_grad()
def write_adapter(lm: LanguageModel, plan: Plan, folder: Path) -> None:
    """Write the multipliers of `plan` to `folder` as PEFT's adapter_config.json and adapter_model.safetensors."""
    rank = max(len(change.neurons) for change in plan.changes.values())
    names = {module: name for name, module in lm.model.named_modules()}
    tensors: dict[str, Tensor] = {}
    for layer, change in sorted(plan.changes.items()):
        down = lm.down_projections[layer]
        columns = down.weight if is_conv1d(down) else down.weight.T  # type: ignore[union-attr]  # [d_mlp, d_model]
        here = change.to(torch.device("cpu"))
        places = torch.arange(len(here.neurons))
        lower, upper = torch.zeros(rank, lm.shape.d_mlp), torch.zeros(lm.shape.d_model, rank)
        lower[places, here.neurons] = 1.0
        upper[:, places] = (columns.cpu()[here.neurons] * (here.multipliers[0, 0, :, None] - 1.0)).T  # type: ignore[index]
        prefix = f"base_model.model.{names[down]}"
        tensors |= {f"{prefix}.lora_A.weight": lower, f"{prefix}.lora_B.weight": upper}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_settings(lm, plan, rank), indent=2) + "\n", encoding="utf-8")


def _settings(lm: LanguageModel, plan: Plan, rank: int) -> dict[str, Any]:
    first = min(plan.changes)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # so that the adapter's scale is 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_conv1d(lm.down_projections[first]),
        "target_modules": [_target(lm.blocks[first], lm.down_projections[first])],
        "layers_to_transform": sorted(plan.changes),
    }


def _target(block: Module, down: Module) -> str:
    """The shortest end of its name that tells the projection from other parts of a block."""
    names = [name for name, _ in block.named_modules()]
    parts = next(name for name, module in block.named_modules() if module is down).split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next(end for end in ends if sum(f".{name}".endswith(f".{end}") for name in names) == 1)


def read_adapter(lm: LanguageModel, folder: Path) -> LanguageModel:
    """A copy of the model with the adapter in `folder` put on by PEFT itself."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT asks transformers by old names
            adapted = PeftModel.from_pretrained(copy.deepcopy(lm.model), str(folder)).merge_and_unload()  # type: ignore[operator]
    except Exception as error:  # PEFT has its own ideas of some architectures, and errors of many kinds
        raise ArtifactError(
            f"PEFT cannot put an adapter on {lm.name} ({error_line(error)}); use --to weights."
        ) from error
    return describe_model(
        adapted,
        lm.tokenizer,
        name=f"{lm.name} with its adapter",
        chat=lm.chat,
        template_options=lm.template_options,
    )
