"""The formats, and what each can say of a recipe: what it cannot is refused before any work."""

from typing import Literal, get_args

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Positions, Recipe, Use
from neurosteer.errors import UsageError
from neurosteer.validation import check_option, check_positions

Format = Literal["gguf", "tensors", "repeng", "steering-vectors", "weights", "lora"]
FORMATS: tuple[Format, ...] = get_args(Format)
ADDITIONS: tuple[Format, ...] = ("gguf", "tensors", "repeng", "steering-vectors")
"""The formats that hold one constant a layer, added to the residual stream after the block."""
FOLDERS: tuple[Format, ...] = ("steering-vectors", "weights", "lora")
"""The formats that are a folder; the others are one file."""

_TOKENWISE = {"ablate": "projects a direction out", "clamp": "clamps a feature"}


def check_sayable(recipe: Recipe, to: str, positions: Positions = "all") -> None:
    """Raise `UsageError` in one line for what of `recipe` the format `to` cannot say, whatever the model."""
    check_option("to", to, FORMATS)
    check_positions(positions)
    if positions != "all":
        raise UsageError(
            f"positions is {positions!r}, but {to} steers every token; leave it out, or steer with NeuroSteer itself."
        )
    uses = [use for use in recipe.uses if use.has_effect]
    if not uses:
        raise UsageError("The recipe changes nothing, so there is nothing to export; give a strength other than 0.")
    for use in uses:
        _check_use(use, to)


def _check_use(use: Use, to: str) -> None:
    artifact = use.artifact
    if artifact.operation in _TOKENWISE:
        raise UsageError(
            f"{artifact.name!r} {_TOKENWISE[artifact.operation]}, which depends on the token, and no format can say "
            "that; steer with NeuroSteer itself, or export a vector that adds."
        )
    if isinstance(artifact, NeuronCircuit) and to in ADDITIONS:
        instead = "--to weights or --to lora" if artifact.operation == "scale" else "--to weights"
        raise UsageError(f"{artifact.name!r} is a circuit of neurons, which {to} cannot hold; use {instead}.")
    if to == "gguf" and 0 in artifact.layers:
        raise UsageError(
            f"{artifact.name!r} adds at layer 0, where llama.cpp takes no control vector; use --to weights, or build "
            "it at layers from 1 on."
        )
    if to == "lora" and artifact.operation != "scale":
        raise UsageError(
            f"{artifact.name!r} adds a constant ({artifact.operation}), which an adapter on the plain model cannot; "
            "use --to weights."
        )
