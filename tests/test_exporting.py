"""Exports, read by others and held against naive steering; and vectors of other programs, read by us."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checks import Run, assert_one_clear_line, refused
from families import family_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    Tiny,
    Writes,
    ablating,
    byte_tokenizer,
    clamping,
    make_circuit,
    make_tiny,
    make_vector,
    naive_logits,
    own_hooks,
    random_model,
    tiny,
    writes_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, MismatchError, UsageError
from neurosteer.exporting.export import export
from neurosteer.exporting.importing import import_vector
from neurosteer.exporting.placing import RECORD_FILE
from neurosteer.models.loading import describe_model

IDS = [5, 120, 17, 44, 201, 9, 77, 30]
BELOW = Calibration(0.4, amount_down=0.7)
"""Strength −1 by an amount of its own."""


def vector(this: Tiny, layers: Sequence[int] = (1, 2), **changes: Any) -> SteeringVector:
    return make_vector(layers, model=this.lm.reference, **changes)


def circuit(this: Tiny, **changes: Any) -> NeuronCircuit:
    return make_circuit(model=this.lm.reference, **changes)


def pushes(writes: Writes) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    for layer, push in writes.pushes:
        sums[layer] = sums.get(layer, torch.zeros(len(push))) + push
    return sums


def assert_same(found: Mapping[int, Tensor], expected: Mapping[int, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for layer, tensor in expected.items():
        torch.testing.assert_close(found[layer], tensor, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(torch.tensor([IDS]), use_cache=False).logits[0]


def assert_steers(model: Any, this: Tiny, uses: Sequence[Use]) -> None:
    """Within 1e-4 of naive steering, and far from the plain model."""
    expected = naive_logits(this, IDS, writes_of(uses))
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-4)
    assert float((logits_of(this.model) - expected).abs().max()) > 0.1


# --- one constant a layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "repeng"])
def test_a_control_vector_holds_the_push_of_the_strength_asked_for(llama: Tiny, to: str, tmp_path: Path) -> None:
    one, other = vector(llama, calibration=BELOW), vector(llama, (2, 3), seed=1)
    uses = [Use(one, -1.5), Use(other, 0.5)]
    done = export(llama.lm, Recipe(tuple(uses)), to, tmp_path / "deep" / "mood.gguf")
    reader = gguf.GGUFReader(done.place)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 3
    assert {str(tensor.tensor_type.name) for tensor in reader.tensors} == {"F32"}
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert sorted(found) == ["direction.1", "direction.2", "direction.3"]
    assert_same({int(name.split(".")[1]): one for name, one in found.items()}, pushes(writes_of(uses)))
    assert done.layers == (1, 2, 3)
    assert done.agreement.difference < 1e-4 < 0.1 < done.agreement.effect
    assert [path.name for path in done.place.parent.iterdir()] == ["mood.gguf"]


def test_tensors_by_layer_say_what_they_are_and_may_be_at_layer_0(llama: Tiny, tmp_path: Path) -> None:
    use = Use(vector(llama, (0, 3)), 2.0)
    export(llama.lm, Recipe((use,)), "tensors", tmp_path / "mood.safetensors")
    found = load_file(tmp_path / "mood.safetensors")
    assert_same({int(name): one for name, one in found.items()}, pushes(writes_of([use])))
    with safe_open(tmp_path / "mood.safetensors", framework="np") as file:
        metadata = file.metadata()
    assert metadata["model"] == "tiny/llama" and "strength 2" in metadata["recipe"]
    export(llama.lm, Recipe((use,)), "repeng", tmp_path / "mood.gguf")
    assert len(gguf.GGUFReader(tmp_path / "mood.gguf").tensors) == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_the_readme_of_steering_vectors_builds_what_steers_alike(architecture: str, tmp_path: Path) -> None:
    this = tiny(architecture)
    use = Use(vector(this), 1.5)
    folder = export(this.lm, Recipe((use,)), "steering-vectors", tmp_path / "mood").place
    lines = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("\n```")[0].splitlines()
    assert len(lines) == 3 and lines[1] == "from steering_vectors import SteeringVector"
    lines[2] = lines[2].replace('"layer_', f'"{folder}/layer_')
    built: dict[str, Any] = {"SteeringVector": dict}
    exec("\n".join([lines[0], lines[2]]), built)
    hooks = [
        (this.blocks[layer], lambda _module, _inputs, output, added=added: _added(output, added))
        for layer, added in built["vector"].items()
    ]
    with own_hooks(hooks):
        found = logits_of(this.model)
    torch.testing.assert_close(found, naive_logits(this, IDS, writes_of([use])), rtol=0, atol=1e-4)


def _added(output: Any, tensor: Tensor) -> Any:
    return (output[0] + tensor, *output[1:]) if isinstance(output, tuple) else output + tensor


# --- baked weights ---------------------------------------------------------------------------------------------------


def mixed(this: Tiny) -> list[Use]:
    scaling, shifting = circuit(this, seed=1), circuit(this, seed=2, operation="shift")
    return [Use(vector(this, (0, 1, 3)), 1.5), Use(scaling, 1.5), Use(shifting, -0.5)]


def baked(this: Tiny, uses: Sequence[Use], folder: Path) -> Any:
    before = {name: value.clone() for name, value in this.model.state_dict().items()}
    export(this.lm, Recipe(tuple(uses)), "weights", folder)
    for name, value in this.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_baked_weights_steer_as_pushes_scales_and_shifts_together_do(architecture: str, tmp_path: Path) -> None:
    this = tiny(architecture)
    model = baked(this, mixed(this), tmp_path / "model")
    assert_steers(model, this, mixed(this))
    assert model.config.model_type == architecture
    record = json.loads((tmp_path / "model" / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["model"] == this.lm.name and record["checked"]["difference"] < 1e-4


def test_mistral_without_a_window_and_qwen2_are_baked_as_the_llama_that_they_are(tmp_path: Path) -> None:
    for architecture, changes in (("mistral", {"sliding_window": None, "head_dim": 16}), ("qwen2", {})):
        this = make_tiny(architecture, **changes)
        model = baked(this, mixed(this), tmp_path / architecture)
        assert model.config.model_type == "llama"
        assert_steers(model, this, mixed(this))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    this = make_tiny("llama", tie_word_embeddings=True)
    model = baked(this, mixed(this), tmp_path / "model")
    assert_steers(model, this, mixed(this))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_scaled_neurons_are_baked_where_a_norm_follows_the_mlp_and_pushes_are_refused(tmp_path: Path) -> None:
    this = tiny("gemma3")
    uses = [Use(circuit(this), 2.0)]
    assert_steers(baked(this, uses, tmp_path / "model"), this, uses)
    for artifact, word in ((vector(this), "layer 1"), (circuit(this, operation="shift"), "layer 0")):
        refused(lambda one=artifact: export(this.lm, one, "weights", tmp_path / "no"), UsageError, word, "gguf")
    refused(lambda: export(tiny("mistral").lm, vector(tiny("mistral")), "weights", tmp_path / "no"), UsageError, "gguf")
    assert not (tmp_path / "no").exists()


def test_an_export_that_lost_a_bias_is_caught_and_what_was_there_before_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    this = tiny("llama")
    place = tmp_path / "model"
    export(this.lm, circuit(this), "weights", place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    whole = PreTrainedModel.save_pretrained

    def without_a_bias(model: Any, folder: Path, **options: Any) -> None:
        model.model.layers[2].mlp.down_proj.bias.data.zero_()
        whole(model, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", without_a_bias)
    refused(lambda: export(this.lm, vector(this), "weights", place), ArtifactError, "does not steer", "removed")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", ["Granite", "MiniCPM 3", "StarCoder2", "Phi 1, 1.5, 2"])
def test_families_that_scale_what_the_mlp_adds_or_have_other_switches_are_baked(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    if hasattr(config, "residual_multiplier"):
        config.residual_multiplier = 0.5
    lm = describe_model(random_model(config), byte_tokenizer(), name=f"tiny/{family}")
    uses = [make_vector(model=lm.reference), make_circuit(((0, 3), (3, 40)), model=lm.reference, operation="shift")]
    found = export(lm, Recipe.of(*uses), "weights", tmp_path / "model").agreement
    assert found.difference < 1e-4 < 0.1 < found.effect


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_an_adapter_put_on_by_peft_scales_as_the_circuits_do(architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is needed to read adapters (pip install -e '.[test]')")
    this = tiny(architecture)
    uses = [Use(circuit(this, seed=1), 1.5), Use(circuit(this, seed=2), -1.0)]
    export(this.lm, Recipe(tuple(uses)), "lora", tmp_path / "adapter")
    fresh = make_tiny(architecture, bos=architecture.startswith("gemma")).model
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert_steers(adapted, this, uses)
    assert {name.split(".lora_")[0][-9:] for name, _ in adapted.named_parameters() if ".lora_" in name} <= {
        "down_proj",
        "lp.c_proj",
    }
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(uses[0].artifact.layers)


# --- what cannot be said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("artifact", "strength", "to", "words"),
    [
        (make_vector((0, 1)), 1.0, "gguf", ["layer 0", "--to weights"]),
        (make_vector(), 0.0, "gguf", ["nothing"]),
        (ablating((1,), seed=1), 1.0, "weights", ["projects", "token"]),
        (clamping((1,), seed=1), 1.0, "gguf", ["clamps", "token"]),
        (make_circuit(), 1.0, "gguf", ["circuit-0", "--to lora"]),
        (make_circuit(operation="shift"), 1.0, "tensors", ["circuit-0", "--to weights"]),
        (make_circuit(operation="shift"), 1.0, "lora", ["shift", "--to weights"]),
        (make_vector(), 1.0, "lora", ["vector-0", "--to weights"]),
        (make_vector(), 1.0, "onnx", ["onnx", "gguf"]),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_the_model_is_looked_at(
    artifact: Artifact, strength: float, to: str, words: list[str], tmp_path: Path
) -> None:
    no_model: Any = None
    refused(lambda: export(no_model, Recipe.of((artifact, strength)), to, tmp_path / "out"), UsageError, *words)
    assert not list(tmp_path.iterdir())


def test_some_positions_only_and_a_model_in_half_precision_are_refused(llama: Tiny, tmp_path: Path) -> None:
    place = tmp_path / "out"
    refused(
        lambda: export(llama.lm, vector(llama), "gguf", place, positions="prompt"), UsageError, "prompt", "every token"
    )
    half = make_tiny("llama")
    half.model.to(torch.bfloat16)
    refused(lambda: export(half.lm, vector(half), "gguf", place), UsageError, "bfloat16", "float32")
    other = make_tiny("llama", num_hidden_layers=5)
    refused(lambda: export(other.lm, vector(llama), "gguf", place), MismatchError, "5 layers")
    assert not place.exists()


def test_nothing_that_is_no_export_of_the_kind_is_written_over(llama: Tiny, tmp_path: Path) -> None:
    notes, artifact, kept = tmp_path / "notes.gguf", save(vector(llama), tmp_path / "mood"), tmp_path / "kept"
    notes.write_text("mine", encoding="utf-8")
    kept.mkdir()
    (kept / "notes.txt").write_text("mine", encoding="utf-8")
    for to, place in (("gguf", notes), ("tensors", notes), ("gguf", artifact), ("weights", artifact), ("weights", kept),
                      ("weights", notes), ("steering-vectors", kept)):  # fmt: skip
        refused(lambda to=to, place=place: export(llama.lm, vector(llama), to, place), ArtifactError, place.name)
    assert notes.read_text(encoding="utf-8") == "mine" and load(artifact).name == "vector-0"
    assert (kept / "notes.txt").is_file()
    for _ in range(2):  # what is of the same kind is replaced
        export(llama.lm, vector(llama), "gguf", tmp_path / "mood.gguf")
        export(llama.lm, vector(llama), "steering-vectors", tmp_path / "peer")


# --- vectors of other programs ---------------------------------------------------------------------------------------


def control_vector(path: Path, directions: Mapping[str, Any], architecture: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, direction in directions.items():
        writer.add_tensor(name, direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_imported_vector_adds_what_the_file_adds_until_it_is_calibrated(llama: Tiny, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    given = {layer: draw.normal(size=32).astype(np.float32) * (1 + layer) for layer in (0, 2, 3)}
    path = control_vector(tmp_path / "my mood.gguf", {f"direction.{layer}": one for layer, one in given.items()})
    found = import_vector(llama.lm, path, calibrate=False)
    assert (found.name, found.method, found.layers) == ("my-mood", "imported", [0, 2, 3])
    expected = {layer: torch.from_numpy(one) for layer, one in given.items()}
    assert_same(pushes(writes_of([Use(found)])), expected)
    measured = import_vector(llama.lm, path, name="mood")
    assert measured.name == "mood" and measured.calibration.measured
    assert measured.calibration.kl == pytest.approx(1.0, abs=0.1)
    export(llama.lm, Recipe.of(import_vector(llama.lm, path, calibrate=False)), "repeng", tmp_path / "again.gguf")
    again = import_vector(llama.lm, tmp_path / "again.gguf", calibrate=False)
    assert_same(again.directions, expected)


def test_safetensors_by_layer_are_imported_in_any_float(llama: Tiny, tmp_path: Path) -> None:
    given = {"layers.1": torch.randn(32, generator=torch.Generator().manual_seed(0)).bfloat16()}
    save_file(given, tmp_path / "v.safetensors")
    found = import_vector(llama.lm, tmp_path / "v.safetensors", calibrate=False)
    assert_same(found.directions, {1: given["layers.1"].float()})


def test_what_is_no_vector_is_refused_in_one_line_and_a_pickle_is_never_loaded(llama: Tiny, tmp_path: Path) -> None:
    torch.save({1: torch.ones(32)}, tmp_path / "v.pt")
    torch.save({1: torch.ones(32)}, tmp_path / "v.safetensors")
    one = np.ones(32, dtype=np.float32)
    for path, kind, *words in (
        (tmp_path / "v.pt", ArtifactError, "pickle", "save_file"),
        (tmp_path / "v.safetensors", ArtifactError, "pickle"),
        (tmp_path / "none.gguf", ArtifactError, "no file"),
        (control_vector(tmp_path / "a.gguf", {"direction.1": one}, "llama"), ArtifactError, "llama", "controlvector"),
        (control_vector(tmp_path / "b.gguf", {"output.weight": one}), ArtifactError, "output.weight"),
        (control_vector(tmp_path / "c.gguf", {"direction.1": one * 0}), ArtifactError, "zero"),
        (control_vector(tmp_path / "d.gguf", {"direction.1": one[:8]}), MismatchError, "width 8", "width 32"),
        (control_vector(tmp_path / "e.gguf", {"direction.4": one}), MismatchError, "layer 4", "0 to 3"),
        (control_vector(tmp_path / "f.gguf", {"direction.1": one.reshape(4, 8)}), ArtifactError, "one vector"),
    ):
        refused(lambda path=path: import_vector(llama.lm, path), kind, *words)


def test_a_damaged_control_vector_is_refused_wherever_it_is_cut_or_changed(llama: Tiny, tmp_path: Path) -> None:
    whole = control_vector(tmp_path / "v.gguf", {"direction.1": np.ones(32, dtype=np.float32)}).read_bytes()
    path = tmp_path / "damaged.gguf"
    for length in range(0, len(whole) - 64, 7):
        path.write_bytes(whole[:length])
        refused(lambda: import_vector(llama.lm, path, calibrate=False), ArtifactError, "damaged.gguf")
    draw = np.random.default_rng(1)
    for place in draw.integers(4, len(whole) - 160, size=60):
        path.write_bytes(whole[:place] + bytes([int(draw.integers(256))]) + whole[place + 1 :])
        try:
            import_vector(llama.lm, path, calibrate=False)
        except ArtifactError as error:
            assert "\n" not in str(error)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_exports_and_imports(run: Run, llama: Tiny, model_folder: Path, tmp_path: Path) -> None:
    mood = save(vector(llama), tmp_path / "mood")
    model, place = ("--model", model_folder), tmp_path / "mood.gguf"
    ran = run("export", f"{mood}:-2", "--to", "gguf", "--out", place, *model, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert (data["place"], data["format"], data["layers"]) == (str(place), "gguf", [1, 2])
    assert data["difference"] < 1e-4 < data["effect"] and data["seconds"] > 0
    ran = run("import", place, "--out", tmp_path / "back", "--no-calibrate", *model, "--dtype", "float32")
    assert ran.code == 0, ran.err
    back = load(tmp_path / "back")
    assert_same(pushes(writes_of([Use(back)])), pushes(writes_of([Use(vector(llama), -2.0)])))


def test_the_command_line_bakes_several_artifacts(run: Run, llama: Tiny, model_folder: Path, tmp_path: Path) -> None:
    mood, terse = save(vector(llama), tmp_path / "mood"), save(circuit(llama), tmp_path / "terse")
    ran = run("export", f"{mood}:1.5", terse, "--to", "weights", "--out", tmp_path / "model", "--model", model_folder)
    assert ran.code == 0, ran.err
    assert "same text" in ran.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert_steers(model, llama, [Use(vector(llama), 1.5), Use(circuit(llama))])


def test_the_command_line_refuses_in_one_line_before_a_model_is_loaded(run: Run, llama: Tiny, tmp_path: Path) -> None:
    mood, first = save(vector(llama), tmp_path / "mood"), save(vector(llama, (0, 1)), tmp_path / "first")
    model = ("--model", "no/such-model-anywhere")
    notes = tmp_path / "notes.txt"
    notes.write_text("mine", encoding="utf-8")
    out = ("--out", tmp_path / "new")
    assert_one_clear_line(run("export", first, "--to", "gguf", *out, *model), "layer 0", "weights")
    assert_one_clear_line(run("export", mood, "--to", "lora", *out, *model), "adapter")
    assert_one_clear_line(run("export", mood, "--to", "gguf", *out, *model, "--positions", "prompt"), "prompt")
    assert_one_clear_line(run("export", mood, "--to", "onnx", *out, *model), "onnx", "gguf")
    assert_one_clear_line(run("export", mood, "--to", "gguf", "--out", notes, *model), "notes.txt", "no export")
    assert_one_clear_line(run("import", notes, *out, *model), "notes.txt", "control vector")
    assert_one_clear_line(run("import", notes, "--out", notes, *model), "notes.txt", "a file")
    assert notes.read_text(encoding="utf-8") == "mine" and not (tmp_path / "new").exists()
