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
    from neurosteer.models import LanguageModel, load_model
    from neurosteer.recipes import Recipe, Use
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
    "SteeringVector": "artifacts",
    "Use": "recipes",
    "build": "building",
    "cosines": "combining",
    "load": "storage",
    "load_model": "models",
    "orthogonalise": "combining",
    "paste_examples": "examples",
    "read_examples": "examples",
    "save": "storage",
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
    "SteeringVector",
    "Use",
    "__version__",
    "build",
    "cosines",
    "load",
    "load_model",
    "orthogonalise",
    "paste_examples",
    "read_examples",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neurosteer' has no attribute {name!r}")
    return getattr(import_module(f"neurosteer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
