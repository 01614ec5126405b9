"""Circuits against figures that the public neural-steering code computed on the embedded model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from neurosteer.artifacts import NeuronCircuit
from neurosteer.building import build
from neurosteer.examples import ContrastSet
from neurosteer.models import LanguageModel

SHARED = Path(os.environ.get("NEUROSTEER_SHARED") or Path(__file__).resolve().parents[2] / "shared")
FIGURES = SHARED / "golden" / "circuits.json"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.embedded,
    pytest.mark.skipif(
        not FIGURES.is_file(), reason=f"no reference figures: {FIGURES.name} is not beside the checkout"
    ),
]


def cases(kind: str) -> list[Any]:
    if not FIGURES.is_file():
        return [pytest.param(None, id="none")]
    found = json.loads(FIGURES.read_text(encoding="utf-8"))["cases"]
    return [
        pytest.param(case, id=f"{case['name']}-{'chat' if case['chat_template'] else 'raw'}")
        for case in found
        if case["kind"] == kind
    ]


@pytest.mark.parametrize("case", cases("contrastive"))
def test_contrastive_neurons_are_those_of_the_public_code(case: dict[str, Any], embedded_lm: LanguageModel) -> None:
    circuit = build(
        embedded_lm,
        ContrastSet(tuple(case["positive"]), tuple(case["negative"]), name=case["name"]),
        method="cna",
        rank="difference",
        operation="scale",
        top_k=case["top_k"],
        skip_layers=case["skip_layers"],
        framing="prompt" if case["chat_template"] else "raw",
        tokens=case["token"],
    )
    assert isinstance(circuit, NeuronCircuit)
    wanted = {(layer, neuron): value for layer, _, neuron, value in case["neurons"]}
    found = dict(
        zip(
            zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True),
            circuit.differences.tolist(),
            strict=True,
        )
    )
    shared = wanted.keys() & found.keys()
    assert len(wanted) == len(found) == case["top_k"]
    assert len(shared) >= case["top_k"] - 2
    for neuron in shared:
        assert found[neuron] == pytest.approx(wanted[neuron], rel=1e-3)
