"""Which SAEs there are for a model: those shipped with NeuroSteer, and the releases that the catalog names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurosteer.errors import UsageError
from neurosteer.examples.files import assets_folder
from neurosteer.models.catalog import find_model
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.sources import recorded_name
from neurosteer.saes.formats import CONFIG_FILE, layer_of_hook, read_config

EMBEDDED = "embedded"


def embedded_saes(lm: LanguageModel) -> dict[int, Path]:
    """The SAEs shipped for this model, by its name or its weights: block to folder, ascending."""
    return _embedded_folders(lambda about: about.get("model_name") == lm.name or same_weights(lm, about))


def released_for(model: str) -> tuple[str, ...]:
    """The releases that the catalog names for this model."""
    known = find_model(model)
    return known.sae_releases if known is not None else ()


@dataclass(frozen=True)
class ShippedSae:
    """An SAE that comes with NeuroSteer, from its description alone. `measured` are its figures on held-out text."""

    name: str
    layer: int
    n_features: int
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Offer:
    """The SAEs there are for the model that artifacts record as `model`: those shipped, and the catalog's releases."""

    model: str
    shipped: tuple[ShippedSae, ...]
    releases: tuple[str, ...]


def offered_saes(model: str | Path) -> Offer:
    """The SAEs for a model by name, which is neither fetched nor loaded. Raises `ModelError` for an unknown name."""
    name = recorded_name(model)
    folders = _embedded_folders(lambda about: about.get("model_name") == name)
    shipped = tuple(_shipped(layer, folder) for layer, folder in folders.items())
    return Offer(name, shipped, released_for(name))


def _shipped(layer: int, folder: Path) -> ShippedSae:
    config = read_config(folder / CONFIG_FILE)
    measured = config.get("metadata", {}).get("measured", {})
    return ShippedSae(f"{EMBEDDED}/{layer}", layer, int(config.get("d_sae", 0)), dict(measured))


def _embedded_folders(wanted: Callable[[Mapping[str, Any]], bool]) -> dict[int, Path]:
    """Those shipped SAEs whose metadata are `wanted`: block to folder, ascending."""
    root = assets_folder() / "saes"
    found = {}
    for config_file in root.rglob(CONFIG_FILE) if root.is_dir() else ():
        metadata = read_config(config_file).get("metadata", {})
        if wanted(metadata):
            found[layer_of_hook(str(metadata.get("hook_name")))] = config_file.parent
    return dict(sorted(found.items()))


def embedded_folder(lm: LanguageModel, text: str) -> Path:
    available = embedded_saes(lm)
    if not available:
        releases = ", ".join(released_for(lm.name)) or "none is in the catalog"
        raise UsageError(f"No SAE is shipped for {lm.name}; name one of a release ({releases}), or a folder.")
    wanted = text.partition("/")[2]
    if not wanted:
        return list(available.values())[len(available) // 2]
    if not wanted.isdecimal() or int(wanted) not in available:
        names = ", ".join(f"{EMBEDDED}/{layer}" for layer in available)
        raise UsageError(f"There is no SAE {text!r} for {lm.name}; there are {names}.")
    return available[int(wanted)]


def same_weights(lm: LanguageModel, metadata: Mapping[str, Any]) -> bool:
    """Whether the SAE records that it was made on just these weights, whatever they are called."""
    recorded = metadata.get("model_fingerprint")
    return recorded is not None and recorded == lm.fingerprint
