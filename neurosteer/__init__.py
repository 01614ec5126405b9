"""NeuroSteer: steer language models with vectors and neuron circuits built from examples in seconds.

Names are loaded when first used, so that importing the package is fast and touches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neurosteer.version import VERSION as __version__

if TYPE_CHECKING:
    from neurosteer.artifacts import NeuronCircuit, SteeringVector
    from neurosteer.building import build
    from neurosteer.combining import cosines, orthogonalise
    from neurosteer.decoding import Sampling
    from neurosteer.errors import NeuroSteerError
    from neurosteer.examples import ContrastSet, paste_examples, read_examples
    from neurosteer.features import feature_vector
    from neurosteer.hub import pull, push, search
    from neurosteer.models import LanguageModel, load_model
    from neurosteer.recipes import Recipe, Use
    from neurosteer.saes import SparseAutoencoder, load_sae
    from neurosteer.steering import Row, Session
    from neurosteer.storage import load, save

_HOMES = {
    "ContrastSet": "examples",
    "LanguageModel": "models",
    "NeuroSteerError": "errors",
    "NeuronCircuit": "artifacts",
    "Recipe": "recipes",
    "Row": "steering",
    "Sampling": "decoding",
    "Session": "steering",
    "SparseAutoencoder": "saes",
    "SteeringVector": "artifacts",
    "Use": "recipes",
    "build": "building",
    "cosines": "combining",
    "feature_vector": "features",
    "load": "storage",
    "load_model": "models",
    "load_sae": "saes",
    "orthogonalise": "combining",
    "paste_examples": "examples",
    "pull": "hub",
    "push": "hub",
    "read_examples": "examples",
    "save": "storage",
    "search": "hub",
}

__all__ = [
    "ContrastSet",
    "LanguageModel",
    "NeuroSteerError",
    "NeuronCircuit",
    "Recipe",
    "Row",
    "Sampling",
    "Session",
    "SparseAutoencoder",
    "SteeringVector",
    "Use",
    "__version__",
    "build",
    "cosines",
    "feature_vector",
    "load",
    "load_model",
    "load_sae",
    "orthogonalise",
    "paste_examples",
    "pull",
    "push",
    "read_examples",
    "save",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neurosteer' has no attribute {name!r}")
    return getattr(import_module(f"neurosteer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
