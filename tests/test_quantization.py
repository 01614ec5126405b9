"""Quantised models: steered exactly as a naive hook on the same weights, and honestly recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Run
from family_check import EXAMPLES, LAYERS, OK, PROMPTS, check_exact, naive_writes
from tiny import build, byte_tokenizer, own_hooks, random_model, tiny_config

from neurosteer.artifacts.artifact import check_model
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import load, save
from neurosteer.circuits import attribute
from neurosteer.errors import UsageError
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.divergence import divergences, kl_percentile, unsteered_texts
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.models.quantization import QUANTIZATIONS
from neurosteer.steering.plans import applied, compile_rows, join_plans
from neurosteer.steering.session import Session

pytest.importorskip("bitsandbytes")
NAMES = {"4bit": "bitsandbytes 4-bit nf4", "8bit": "bitsandbytes 8-bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    config = tiny_config("llama", hidden_size=64, intermediate_size=128)
    random_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def packed(request: pytest.FixtureRequest, folder: Path) -> tuple[str, LanguageModel]:
    return request.param, load_model(folder, device="cpu", dtype="float32", quantize=request.param)


def test_what_is_recorded_is_the_true_shape_and_that_the_weights_are_quantised(
    packed: tuple[str, LanguageModel], tmp_path: Path
) -> None:
    kind, lm = packed
    assert (lm.shape.n_layers, lm.shape.d_model, lm.shape.d_mlp) == (4, 64, 128)
    assert lm.reference.quantization == NAMES[kind]
    artifact = build(lm, EXAMPLES, layers=LAYERS)
    assert load(save(artifact, tmp_path / "one")).model == lm.reference


@pytest.mark.parametrize("method", ["caa", "cna"])
def test_logits_are_those_of_a_naive_hook_on_the_same_weights(packed: tuple[str, LanguageModel], method: str) -> None:
    kind, lm = packed
    options: dict[str, Any] = {"top_k": 0.05} if method == "cna" else {}
    artifact = build(lm, EXAMPLES, method=method, layers=LAYERS, **options)
    ids = torch.tensor([lm.prompt_ids(PROMPTS[2])])
    plan = join_plans(compile_rows(lm, [Recipe.of((artifact, 2.0))], ["all"]))
    writes, before = naive_writes(lm, artifact, 2.0)
    with torch.no_grad():
        with applied(lm, plan):
            steered = lm.model(input_ids=ids, use_cache=False).logits
        with own_hooks(writes, before=before):
            naive = lm.model(input_ids=ids, use_cache=False).logits
        plain = lm.model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(steered, naive, atol=1e-4) and not torch.allclose(steered, plain, atol=1e-2)
    if kind == "4bit":  # 8-bit looks for outliers over the whole batch
        assert check_exact(lm, artifact) == OK


def test_what_neurons_write_is_what_the_packed_projection_makes_of_them(packed: tuple[str, LanguageModel]) -> None:
    _, lm = packed
    down = lm.down_projections[1]
    neurons = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = down(neurons)
    found = neurons @ lm.write_columns(1)
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.99
    assert found.norm() == pytest.approx(float(wanted.norm()), rel=0.02)


def test_circuits_are_attributed(packed: tuple[str, LanguageModel]) -> None:
    scores = attribute(packed[1], PROMPTS[0], " cat", keep_universal=True).neuron_scores()
    assert bool(scores.isfinite().all()) and int((scores != 0).sum()) > 10


def test_an_artifact_of_the_plain_model_is_taken_with_one_line_and_the_other_way_round(
    packed: tuple[str, LanguageModel], folder: Path
) -> None:
    kind, lm = packed
    plain = load_model(folder, device="cpu", dtype="float32")
    assert plain.reference.quantization is None
    for one, other in ((plain, lm), (lm, plain)):
        line = check_model(build(one, EXAMPLES, layers=LAYERS), other.reference)
        assert line and "\n" not in line and "not quantised" in line and NAMES[kind] in line
        assert Session(other).generate(PROMPTS[0], Recipe.of(build(one, EXAMPLES, layers=LAYERS)), max_new_tokens=2)


def test_weights_that_come_packed_are_neither_rounded_nor_packed_again(
    packed: tuple[str, LanguageModel], tmp_path: Path
) -> None:
    kind, lm = packed
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu", dtype="float16" if kind == "4bit" else "float32")
    assert again.reference.quantization == NAMES[kind] and again.shape == lm.shape
    ids = torch.tensor([lm.prompt_ids(PROMPTS[2])])
    with torch.no_grad():
        mine, theirs = (one.model(input_ids=ids, use_cache=False).logits.float() for one in (lm, again))
    assert torch.allclose(mine, theirs, atol=0.05 * float(mine.std()))
    with pytest.raises(UsageError, match="comes quantised; leave quantize out"):
        load_model(tmp_path, quantize=kind)


def test_another_way_to_quantise_and_weights_that_are_packed_already_are_refused(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="quantize is '3bit'; it must be one of 4bit, 8bit"):
        load_model(folder, quantize="3bit")
    ran = run("steer", "--model", folder, "--quantize", "3bit", "--prompt", "x")
    assert ran.code == 2 and "4bit" in ran.err
    monkeypatch.setattr("neurosteer.models.quantization.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install 'neurosteer\\[quantize\\]'"):
        load_model(folder, quantize="4bit")


@pytest.mark.embedded
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_plain_models_vector_moves_the_quantised_one_by_the_same_kl(embedded_lm: LanguageModel, kind: str) -> None:
    from neurosteer.examples.reading import read_examples

    vector = build(embedded_lm, read_examples("sentiment"), layers=16)
    packed = load_model(device="cpu", dtype="float32", quantize=kind)
    found = []
    for lm in (embedded_lm, packed):
        texts = unsteered_texts(lm, calibration_prompts()[::4], 8)
        recipes = [Recipe.of((vector, strength)) for strength in (-1.0, 1.0)]
        found.append([kl_percentile(values.flatten().tolist(), 95) for values in divergences(lm, texts, recipes)])
    assert found[1] == pytest.approx(found[0], rel=0.2)
