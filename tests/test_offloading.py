"""Models whose weights accelerate keeps elsewhere do all that they do in one piece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tiny import N_LAYERS, byte_tokenizer, random_model, texts, tiny_config

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.circuits import attribute, measure_faithfulness
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.measuring.token_scores import token_divergences
from neurosteer.models.language_model import LanguageModel, fingerprint_of
from neurosteer.models.loading import describe_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

EXAMPLES = ContrastSet(tuple(f"happy {text}" for text in texts(10, seed=1)), tuple(texts(10, seed=2)), name="some")
KINDS = ("llama", "gemma3", "gpt2")
Offload = Callable[[Any, Path], None]


def all_in_memory(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def half_on_disk(model: Any, folder: Path) -> None:
    """The upper blocks, and what stands beside the blocks where it is."""
    base = model.base_model_prefix
    parts = [f"{base}.{name}" for name, _ in getattr(model, base).named_children()]
    lists = next(name for name in ("layers", "h") if hasattr(getattr(model, base), name))
    where: dict[str, Any] = {part: "cpu" for part in (*parts, "lm_head") if not part.endswith(f".{lists}")}
    where |= {f"{base}.{lists}.{place}": "cpu" if place < 2 else "disk" for place in range(N_LAYERS)}
    accelerate.dispatch_model(model, where, offload_dir=folder)


OFFLOADS = (all_in_memory, half_on_disk)


def described(model: Any) -> LanguageModel:
    return describe_model(model, byte_tokenizer(), name="tiny", revision="r1")


def pair(kind: str, offload: Offload, folder: Path, **changes: Any) -> tuple[LanguageModel, LanguageModel]:
    """The same model in one piece, and not."""
    config = tiny_config(kind, **changes)
    apart = random_model(config)
    offload(apart, folder)
    assert any(weight.is_meta for weight in apart.parameters())
    return described(random_model(config)), described(apart)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_and_what_neurons_write_are_those_of_the_whole_model(
    kind: str, tied: bool, offload: Offload, tmp_path: Path
) -> None:
    changes = {} if kind == "gpt2" else {"tie_word_embeddings": tied}
    plain, apart = pair(kind, offload, tmp_path, **changes)
    assert apart.fingerprint == plain.fingerprint == fingerprint_of(plain.model)
    assert apart.shape == plain.shape and apart.device.type == apart.layer_device(N_LAYERS - 1).type == "cpu"
    for layer in range(N_LAYERS):
        assert torch.allclose(apart.write_columns(layer), plain.write_columns(layer), atol=1e-6)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_built_calibrated_and_steer_as_on_the_whole_model(
    kind: str, offload: Offload, tmp_path: Path
) -> None:
    plain, apart = pair(kind, offload, tmp_path)
    one, other = (build(lm, EXAMPLES, layers=(1, 2)) for lm in (plain, apart))
    assert isinstance(one, SteeringVector) and isinstance(other, SteeringVector)
    assert one.model == other.model
    assert other.calibration.amount == pytest.approx(one.calibration.amount, rel=1e-3)
    for layer in (1, 2):
        assert torch.allclose(one.directions[layer], other.directions[layer], rtol=1e-3, atol=1e-4)
    rows = [Row("the cat", UNSTEERED), Row("the cat", Recipe.of((one, 2.0))), Row("Why?", Recipe.of((one, -2.0)))]
    given: dict[str, Any] = {"max_new_tokens": 8, "sampling": Sampling(greedy=True)}
    assert Session(apart).generate(rows, **given) == Session(plain).generate(rows, **given)
    scores = [[piece.score for piece in token_divergences(lm, rows[1].recipe, "we", " never")] for lm in (plain, apart)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", KINDS)
def test_circuits_are_found_and_checked_as_on_the_whole_model(kind: str, offload: Offload, tmp_path: Path) -> None:
    plain, apart = pair(kind, offload, tmp_path)
    found = [build(lm, EXAMPLES, method="cna", layers=(1, 2), top_k=0.05, calibrate=False) for lm in (plain, apart)]
    one, other = found
    assert isinstance(one, NeuronCircuit) and isinstance(other, NeuronCircuit)
    assert one.neurons.tolist() == other.neurons.tolist()
    scores = [attribute(lm, ["the cat", "a dog"], " runs", keep_universal=True) for lm in (plain, apart)]
    assert torch.allclose(scores[0].neuron_scores(), scores[1].neuron_scores(), rtol=1e-3, atol=1e-4)
    areas = [measure_faithfulness(lm, scores[0], percents=(0, 10, 100), draws=1).area for lm in (plain, apart)]
    assert areas[0] == pytest.approx(areas[1], rel=1e-3)


def test_a_model_in_bfloat16_is_asked_in_bfloat16(tmp_path: Path) -> None:
    model = random_model(tiny_config("gpt2")).bfloat16()
    plain = described(model).write_columns(1)
    apart = random_model(tiny_config("gpt2")).bfloat16()
    all_in_memory(apart, tmp_path)
    assert torch.equal(described(apart).write_columns(1), plain)
