"""A recipe for another engine: written, read again by another reader, and held against the recipe."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Positions, Recipe, Use, check_recipes_fit
from neurosteer.errors import UsageError
from neurosteer.exporting.additions import (
    ACTIVATIONS_FILE,
    about,
    is_control_vector,
    is_layer_tensors,
    read_control_vector,
    read_tensors,
    write_control_vector,
    write_steering_vectors,
    write_tensors,
)
from neurosteer.exporting.checking import Agreement, check_agrees
from neurosteer.exporting.formats import ADDITIONS, FOLDERS, check_sayable
from neurosteer.exporting.lora import check_peft, read_adapter, write_adapter
from neurosteer.exporting.placing import check_place, placed, read_record, write_record
from neurosteer.exporting.weights import check_plain_weights, empty_model, write_weights
from neurosteer.models.hooks import OutputHook
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.progress import Progress, silent
from neurosteer.steering.plans import Plan, compile_plan
from neurosteer.version import VERSION


@dataclass(frozen=True)
class Exported:
    """What was written where, and how near it comes to the recipe."""

    place: Path
    to: str
    layers: tuple[int, ...]
    agreement: Agreement


def export(
    lm: LanguageModel,
    recipe: Recipe | Artifact,
    to: str,
    place: str | Path,
    *,
    positions: Positions = "all",
    progress: Progress = silent,
) -> Exported:
    """Write `recipe` (an artifact at strength 1, or several at strengths) to `place` in the format `to`.

    The strength is in what is written: whoever reads it applies it once. It is read again by another reader (the
    package gguf, safetensors, PEFT, transformers) and must write the same greedy text, with the same logits, as the
    recipe does; else nothing is left.

    Args:
        to: `gguf` (a control vector for llama.cpp), `repeng` (the same file, layer 0 too), `tensors` (safetensors by
            layer), `steering-vectors`, `weights` (baked, a folder for any engine) or `lora` (PEFT).
        place: a file or, for the last three, a folder: new, or an export of the same format that is replaced.

    Raises:
        UsageError: what the format or the model's architecture cannot say; a model that is not in float32.
        MismatchError: an artifact was made on a model of another shape.
        ArtifactError: the place holds something else or cannot be written; or the export does not steer alike.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe)
    check_sayable(recipe, to, positions)
    target = check_export_place(place, to)
    if lm.dtype != torch.float32:
        raise UsageError(
            f"{lm.name} is loaded in {str(lm.dtype).removeprefix('torch.')}; an export is made, and checked, in "
            "float32 (--dtype float32)."
        )
    check_recipes_fit([recipe], lm.reference)
    plan = compile_plan(lm, [recipe])
    write = _writer(lm, plan, recipe, to)  # raises for what the model cannot take
    with placed(target) as path:
        progress(f"Writing {target.name}")
        write(path)
        progress(f"Reading {target.name} again")
        agreement = _check(lm, recipe, to, path)
        if to in FOLDERS:
            write_record(path, {**_about(lm, recipe), "format": to, "checked": asdict(agreement)})
    return Exported(target, to, tuple(sorted({*plan.additions, *plan.changes})), agreement)


def check_export_place(place: str | Path, to: str) -> Path:
    """The absolute path of an export in the format `to`. Raises `ArtifactError` for what holds something else."""
    if to in FOLDERS:
        return check_place(place, folder=True, is_ours=lambda path: read_record(path).get("format") == to)
    return check_place(place, folder=False, is_ours=is_layer_tensors if to == "tensors" else is_control_vector)


def _writer(lm: LanguageModel, plan: Plan, recipe: Recipe, to: str) -> Callable[[Path], None]:
    """What writes the plan to a path in the format `to`. Raises `UsageError` where the model cannot take it."""
    if to in ADDITIONS:
        return partial(_write_additions, lm, additions_of(plan), recipe, to)
    check_plain_weights(lm, to)
    if to == "lora":
        check_peft()
        return partial(write_adapter, lm, plan)
    return partial(write_weights, lm, plan, empty_model(lm, plan))


def additions_of(plan: Plan) -> dict[int, Tensor]:
    """What a plan of one row adds after each block, float32 `[d_model]`."""
    return {layer: addition[0, 0].float().cpu().clone() for layer, addition in plan.additions.items()}


def _write_additions(lm: LanguageModel, additions: Mapping[int, Tensor], recipe: Recipe, to: str, path: Path) -> None:
    said = _about(lm, recipe)
    if to in ("gguf", "repeng"):
        write_control_vector(path, additions, lm.model.config.get_text_config().model_type, said)
    elif to == "tensors":
        write_tensors(path, additions, said)
    else:
        write_steering_vectors(path, additions, said)


def _check(lm: LanguageModel, recipe: Recipe, to: str, path: Path) -> Agreement:
    """Read what lies at `path` again and hold it against the recipe. Raises `ArtifactError`."""
    if to == "weights":
        fresh = load_model(path, device=lm.device, dtype=lm.dtype, chat=lm.chat, template_options=lm.template_options)
        return check_agrees(lm, recipe, fresh, (), "model")
    if to == "lora":
        return check_agrees(lm, recipe, read_adapter(lm, path), (), "adapter")
    if to in ("gguf", "repeng"):
        found = read_control_vector(path)
    else:
        found = read_tensors(path / ACTIVATIONS_FILE if to in FOLDERS else path)
    hooks = [
        OutputHook(lm.blocks[layer], partial(torch.add, other=one.to(lm.layer_device(layer), lm.dtype)))
        for layer, one in found.items()
    ]
    return check_agrees(lm, recipe, lm, hooks, "file")


def _about(lm: LanguageModel, recipe: Recipe) -> dict[str, str]:
    return about("; ".join(map(_use_text, recipe.uses)), lm.name, lm.revision, VERSION)


def _use_text(use: Use) -> str:
    how = f"strength {use.strength:g}" if use.multiplier is None else f"multiplier {use.multiplier:g}"
    return f"{use.artifact.name} ({use.artifact.method}, {use.artifact.operation}) at {how}"
