"""NeuroSteer: steer language models with vectors and neuron circuits built from examples in seconds.

Names are loaded when first used, so that importing the package is fast and touches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neurosteer.version import VERSION as __version__

if TYPE_CHECKING:
    from neurosteer.artifacts import NeuronCircuit, SteeringVector
    from neurosteer.building import build
    from neurosteer.calibration import calibrate
    from neurosteer.circuits import (
        attribute,
        compare_with_circuit,
        decompose,
        find_edges,
        measure_faithfulness,
        next_token_probs,
        sweep_multipliers,
        top_predictions,
    )
    from neurosteer.combining import cosines, orthogonalise
    from neurosteer.decoding import Sampling
    from neurosteer.errors import NeuroSteerError
    from neurosteer.evaluation import evaluate, judge_for, write_evaluation
    from neurosteer.examples import ContrastSet, paste_examples, read_examples
    from neurosteer.features import feature_vector
    from neurosteer.hub import pull, push, search
    from neurosteer.lm_harness import harness
    from neurosteer.models import LanguageModel, load_model
    from neurosteer.recipes import Recipe, Use
    from neurosteer.saes import SparseAutoencoder, load_sae
    from neurosteer.serving import SharedSession
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
    "SharedSession": "serving",
    "SparseAutoencoder": "saes",
    "SteeringVector": "artifacts",
    "Use": "recipes",
    "attribute": "circuits",
    "build": "building",
    "calibrate": "calibration",
    "compare_with_circuit": "circuits",
    "cosines": "combining",
    "decompose": "circuits",
    "evaluate": "evaluation",
    "feature_vector": "features",
    "find_edges": "circuits",
    "harness": "lm_harness",
    "judge_for": "evaluation",
    "load": "storage",
    "load_model": "models",
    "load_sae": "saes",
    "measure_faithfulness": "circuits",
    "next_token_probs": "circuits",
    "orthogonalise": "combining",
    "paste_examples": "examples",
    "pull": "hub",
    "push": "hub",
    "read_examples": "examples",
    "save": "storage",
    "search": "hub",
    "sweep_multipliers": "circuits",
    "top_predictions": "circuits",
    "write_evaluation": "evaluation",
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
    "SharedSession",
    "SparseAutoencoder",
    "SteeringVector",
    "Use",
    "__version__",
    "attribute",
    "build",
    "calibrate",
    "compare_with_circuit",
    "cosines",
    "decompose",
    "evaluate",
    "feature_vector",
    "find_edges",
    "harness",
    "judge_for",
    "load",
    "load_model",
    "load_sae",
    "measure_faithfulness",
    "next_token_probs",
    "orthogonalise",
    "paste_examples",
    "pull",
    "push",
    "read_examples",
    "save",
    "search",
    "sweep_multipliers",
    "top_predictions",
    "write_evaluation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neurosteer' has no attribute {name!r}")
    return getattr(import_module(f"neurosteer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
