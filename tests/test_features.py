"""Single SAE features as artifacts, in what people write after --use, and the list of SAEs for a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Run
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, N_LAYERS, Tiny, make_tiny, make_vector, naive_greedy, naive_logits, naive_states, writes_of
from torch import Tensor

import neurosteer
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, MismatchError, ModelError, NeuroSteerError, UsageError
from neurosteer.examples.files import neutral_prompts
from neurosteer.hub.references import FeatureUse, parse_use, resolve, resolve_uses
from neurosteer.saes import loading
from neurosteer.saes.feature_vector import feature_vector
from neurosteer.saes.loading import load_sae
from neurosteer.saes.offers import offered_saes
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.plans import applied, compile_plan
from neurosteer.steering.session import Session

D_SAE, LAYER = 40, 1
SILENT = 7  # a feature whose bias keeps it off


def write_sae(
    folder: Path,
    *,
    architecture: str = "jumprelu",
    model_name: str = "",
    layer: int = LAYER,
    seed: int = 0,
    measured: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """An SAE of random weights in sae-lens's format, made without sae-lens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {
        "W_enc": random(D_MODEL, D_SAE) * 0.2,
        "W_dec": random(D_SAE, D_MODEL),
        "b_enc": random(D_SAE),
        "b_dec": random(D_MODEL) * 3,
    }
    weights["b_enc"][SILENT] = -1e4
    if architecture == "jumprelu":
        weights["threshold"] = random(D_SAE)  # some below 0, where ReLU decides
    metadata = {"model_name": model_name, "hook_name": f"blocks.{layer}.hook_resid_post", "prepend_bos": False}
    config = {
        "architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "dtype": "float32", "device": "cpu",
        "metadata": {**metadata, **({"measured": measured} if measured else {})}, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def naive_activations(folder: Path, stream: Tensor) -> Tensor:
    """`[..., d_model]` to `[..., d_sae]` in float64 from the file's own tensors."""
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    weights = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    read = stream.double() - weights["b_dec"] if config["apply_b_dec_to_input"] else stream.double()
    before = read @ weights["W_enc"] + weights["b_enc"]
    passes = (before > 0) & (before > weights.get("threshold", torch.zeros(1)))
    return torch.where(passes, before, torch.zeros_like(before))


def naive_neutral_states(this: Tiny) -> Tensor:
    """The stream after `LAYER` at every token of the neutral prompts that counts, `[n, d_model]`."""
    rows = []
    for prompt in neutral_prompts():
        start = this.lm.prompt_ids("") if this.lm.chat else []
        ids = [*start, *this.lm.tokenizer(prompt, add_special_tokens=not this.lm.chat)["input_ids"]]
        states, _ = naive_states(this, ids)
        rows.append(states[LAYER][max(1, len(start)) :])
    return torch.cat(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sae(tmp_path_factory.mktemp("saes") / "layer_1")


@pytest.fixture(scope="module")
def states(request: pytest.FixtureRequest) -> Tensor:
    return naive_neutral_states(request.getfixturevalue("llama"))


# --- one feature's encoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}, {"architecture": "standard"}], ids=str)
@pytest.mark.parametrize("through", ["files", "sae-lens"])
def test_a_features_encoder_alone_gives_what_encoding_all_of_them_gives(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], through: str
) -> None:
    place = write_sae(tmp_path / "sae", **options)
    if through == "sae-lens":
        plain = loading.is_plain
        answers = iter([False])  # only the question which way to load it
        monkeypatch.setattr(loading, "is_plain", lambda config: next(answers, None) is None and plain(config))
    sae = load_sae(llama.lm, place)
    assert sae.kind == options.get("architecture", "jumprelu")
    stream = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(3)) * 8
    wanted = naive_activations(place, stream)
    assert torch.allclose(sae.encode(stream).double(), wanted, atol=1e-4)
    for index in (0, SILENT, D_SAE - 1):
        encoder = sae.feature_encoder(index)
        assert encoder.weights.dtype == torch.float32 and encoder.weights.shape == (D_MODEL,)
        before = stream @ encoder.weights + encoder.bias
        found = torch.where(before > max(encoder.threshold, 0.0), before, 0.0)
        assert torch.allclose(found.double(), wanted[:, index], atol=1e-4)


@pytest.mark.parametrize("index", [-1, D_SAE, 10**9, 1.0, True, None, "3"])
def test_a_feature_that_is_not_there_is_refused_with_the_range(llama: Tiny, folder: Path, index: Any) -> None:
    sae = load_sae(llama.lm, folder)
    for ask in (sae.feature_encoder, lambda index: feature_vector(llama.lm, sae, index)):
        with pytest.raises(UsageError, match=f"0 to {D_SAE - 1}"):
            ask(index)


@pytest.mark.parametrize("kind", ["topk", "layer_norm"])
def test_where_a_feature_cannot_be_computed_alone_it_can_be_added_but_not_clamped(
    llama: Tiny, tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = (
        {"architecture": "topk", "k": 5} if kind == "topk" else {"normalize_activations": "layer_norm"}
    )
    sae = load_sae(llama.lm, write_sae(tmp_path / "sae", **options))
    for ask in (sae.feature_encoder, lambda index: feature_vector(llama.lm, sae, index, operation="clamp", value=1)):
        with pytest.raises(UsageError, match=r"cannot be clamped.*add"):
            ask(3)
    assert torch.equal(feature_vector(llama.lm, sae, 3).directions[LAYER], sae.decoder[3])


def test_weights_of_shapes_that_do_not_fit_are_refused(llama: Tiny, tmp_path: Path) -> None:
    place = write_sae(tmp_path / "sae")
    weights = load_file(place / "sae_weights.safetensors")
    save_file({**weights, "threshold": torch.zeros(D_SAE - 1)}, place / "sae_weights.safetensors")
    with pytest.raises(ModelError, match="shapes"):
        load_sae(llama.lm, place)


# --- the vector ------------------------------------------------------------------------------------------------------


def test_an_added_feature_is_its_decoder_row_with_the_norm_of_neutral_prompts(
    llama: Tiny, folder: Path, states: Tensor
) -> None:
    sae = load_sae(llama.lm, folder)
    vector = feature_vector(llama.lm, sae, 12)
    row = load_file(folder / "sae_weights.safetensors")["W_dec"][12]
    assert torch.equal(vector.directions[LAYER], row) and vector.layers == [LAYER]
    assert vector.norms[LAYER] == pytest.approx(float(states.norm(dim=-1).median()), rel=0.01)
    assert (vector.operation, vector.method, vector.calibration) == ("add", "sae-feature", Calibration(0.3))
    assert vector.parameters == {"sae": str(folder), "index": 12} and vector.encoders == {}
    assert vector.model == llama.lm.reference and "12" in vector.name


def test_a_clamp_without_a_value_takes_the_highest_activation_on_neutral_prompts(each: Tiny, folder: Path) -> None:
    sae = load_sae(each.lm, folder)
    wanted = naive_activations(folder, naive_neutral_states(each)).amax(0)
    indices = wanted.topk(3).indices.tolist()
    for index in indices:
        vector = feature_vector(each.lm, sae, index, operation="clamp")
        assert vector.operation == "clamp" and vector.encoders[LAYER].centred is False
        assert vector.calibration.amount == pytest.approx(float(wanted[index]), rel=1e-3)


def test_a_feature_that_neutral_prompts_leave_silent_needs_a_value(llama: Tiny, folder: Path) -> None:
    sae = load_sae(llama.lm, folder)
    with pytest.raises(UsageError, match=r"active nowhere.*value"):
        feature_vector(llama.lm, sae, SILENT, operation="clamp")
    assert feature_vector(llama.lm, sae, SILENT, operation="clamp", value=4).calibration == Calibration(4.0)


@pytest.mark.parametrize("value", [0, 2.5, -1.0])
def test_a_clamped_feature_steers_as_the_sae_itself_says(llama: Tiny, folder: Path, value: float) -> None:
    sae = load_sae(llama.lm, folder)
    index = 12
    vector = feature_vector(llama.lm, sae, index, operation="clamp", value=value, name="mine")
    assert vector.name == "mine" and vector.calibration.amount == value
    ids = llama.lm.prompt_ids("bread and cheese under the dark mountain")
    before = naive_states(llama, ids)[0][LAYER]
    active = naive_activations(folder, before)[:, index]
    assert (active > 0).any()
    row = load_file(folder / "sae_weights.safetensors")["W_dec"][index].double()
    wanted = before.double() + (value - active)[:, None] * row
    seen: list[Tensor] = []
    handle = llama.blocks[LAYER + 1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].clone()))
    try:
        with torch.no_grad(), applied(llama.lm, compile_plan(llama.lm, [Recipe.of(vector)])):
            llama.model(torch.tensor([ids]), use_cache=False)
    finally:
        handle.remove()
    assert torch.allclose(seen[0].double(), wanted, atol=1e-4 * float(before.abs().max()))


def test_an_sae_trained_on_centred_streams_is_read_without_the_mean(tmp_path: Path) -> None:
    this = make_tiny("gpt2", seed=2)  # its final norm is a LayerNorm
    place = write_sae(tmp_path / "sae")
    config = json.loads((place / "cfg.json").read_text(encoding="utf-8"))
    config["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    (place / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    sae = load_sae(this.lm, place)
    vector = feature_vector(this.lm, sae, 3, operation="clamp", value=5)
    assert sae.centred and vector.encoders[LAYER].centred
    ids = this.lm.prompt_ids("the cat sings over the river")
    with torch.no_grad(), applied(this.lm, compile_plan(this.lm, [Recipe.of(vector)])):
        found = this.model(torch.tensor([ids]), use_cache=False).logits[0]
    wanted = naive_logits(this, ids, writes_of([Use(vector)]))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_feature_saved_and_loaded_writes_the_same_text(llama: Tiny, folder: Path, tmp_path: Path) -> None:
    sae = load_sae(llama.lm, folder)
    vector = feature_vector(llama.lm, sae, 12, operation="clamp", value=30)
    loaded = load(save(vector, tmp_path / "feature"))
    options: dict[str, Any] = {"sampling": Sampling(greedy=True), "max_new_tokens": 10}
    texts = [Session(llama.lm).generate("we", Recipe.of(one), **options)[0].text for one in (vector, loaded)]
    ids = naive_greedy(
        llama, llama.lm.prompt_ids("we"), writes_of([Use(vector)]), 10, stop=[llama.lm.tokenizer.eos_token_id]
    )
    assert texts == [llama.lm.tokenizer.decode(ids, skip_special_tokens=True)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operation": "ablate"}, "add, clamp"),
        ({"operation": None}, "add, clamp"),
        ({"value": 3.0}, "operation='clamp'"),
        ({"operation": "clamp", "value": float("nan")}, "finite"),
        ({"operation": "clamp", "value": "3"}, "number"),
        ({"operation": "clamp", "value": True}, "number"),
    ],
)
def test_other_operations_and_values_are_refused(
    llama: Tiny, folder: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        feature_vector(llama.lm, load_sae(llama.lm, folder), 1, **options)


def test_an_sae_for_a_model_of_another_width_is_refused(llama: Tiny, folder: Path) -> None:
    sae = load_sae(llama.lm, folder)
    for other in (replace(sae, decoder=torch.ones(D_SAE, 8)), replace(sae, layer=N_LAYERS)):
        with pytest.raises(MismatchError, match="blocks 0 to 3"):
            feature_vector(llama.lm, other, 1)


@pytest.mark.parametrize("name", ["x" * 300, "/a/b/ü ñ", "embedded/14", "user/repo/blocks.3.hook_resid_pre", "../.."])
def test_any_name_of_an_sae_makes_a_valid_name_with_the_index(llama: Tiny, folder: Path, name: str) -> None:
    sae = replace(load_sae(llama.lm, folder), name=name)
    names = {feature_vector(llama.lm, sae, 12).name, feature_vector(llama.lm, sae, 12, operation="clamp", value=1).name}
    assert len(names) == 2 and all("12" in found for found in names)


# --- what people write -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("embedded/14#1234", FeatureUse("embedded/14", 1234)),
        ("embedded/14#1234:2", FeatureUse("embedded/14", 1234, None, 2.0)),
        ("embedded/14#0=8", FeatureUse("embedded/14", 0, 8.0)),
        ("embedded/14#5=-1.5e1:-0.5", FeatureUse("embedded/14", 5, -15.0, -0.5)),
        (
            "gpt2-small-res-jb/blocks.8.hook_resid_pre#57=10",
            FeatureUse("gpt2-small-res-jb/blocks.8.hook_resid_pre", 57, 10.0),
        ),
        ("/some/folder:with#marks/layer_3#9:1", FeatureUse("/some/folder:with#marks/layer_3", 9)),
        ("a#b#3", FeatureUse("a#b", 3)),
        ("C:\\saes\\layer_3#9=2", FeatureUse("C:\\saes\\layer_3", 9, 2.0)),
    ],
)
def test_features_are_written_with_a_number_sign(text: str, wanted: FeatureUse) -> None:
    assert parse_use(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "embedded/14#", "embedded/14#x", "embedded/14#-1", "embedded/14#1.5", "#5", "embedded/14#5=", "embedded/14#5=x",
        "embedded/14#5=nan", "embedded/14#5=inf:1", "embedded/14#5:", "embedded/14#5:strong", "embedded/14#5:nan",
        "embedded/14#5=1=2", "embedded/14#²", "embedded/14#" + "9" * 40, "e#5:inf",
    ],
)  # fmt: skip
def test_what_is_no_feature_is_refused_in_one_line_that_shows_the_form(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_use(text)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and ("#" in message or "STRENGTH" in message)


def test_folders_with_a_number_sign_are_still_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mood#3", "vectors/odd#4", "with#5/mood"):
        save(make_vector(), tmp_path / name)
    for text, strength in (("mood#3", 1.0), ("mood#3:2", 2.0), ("odd#4:0.5", 0.5), ("with#5/mood", 1.0)):
        use = parse_use(text)
        assert isinstance(use, Use) and use.strength == strength


def test_a_feature_is_no_artifact_to_inspect() -> None:
    with pytest.raises(UsageError, match="--use"):
        resolve("embedded/14#5")
    with pytest.raises(ArtifactError, match="neither a folder"):
        resolve("embedded/14")
    for odd in ("~nobody-of-that-name/x", "x" * 5000, "a\0b"):
        with pytest.raises(NeuroSteerError):
            parse_use(odd)


def test_uses_are_resolved_in_order_and_each_sae_is_loaded_once(
    llama: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counting(lm: Any, source: str, **options: Any) -> Any:
        loaded.append(source)
        return load_sae(lm, source, **options)

    monkeypatch.setattr(loading, "load_sae", counting)
    artifact = Use(make_vector(), 0.5)
    texts = [f"{folder}#12", f"{folder}#3=4:-2"]
    uses = resolve_uses([parse_use(texts[0]), artifact, parse_use(texts[1])], llama.lm)
    assert loaded == [str(folder)] and uses[1] is artifact
    assert [use.strength for use in uses] == [1.0, 0.5, -2.0]
    assert [use.artifact.operation for use in uses] == ["add", "add", "clamp"]
    assert uses[2].artifact.calibration.amount == 4.0


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "value", "strength"), [("#12:8", None, 8.0), ("#12=30", 30.0, 1.0)])
def test_steer_writes_under_a_feature_as_python_does(
    run: Run, llama: Tiny, model_folder: Path, folder: Path, written: str, value: float | None, strength: float
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--max-new-tokens", "6", "--greedy", "--json")
    ran = run("steer", "--use", f"{folder}{written}", "--prompt", "hello there", "--compare", *options)
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["rows"]
    assert [row["strength"] for row in rows] == [0.0, strength]
    sae = load_sae(llama.lm, folder)
    vector = feature_vector(llama.lm, sae, 12, operation="add" if value is None else "clamp", value=value)
    recipe = Recipe.of((vector, strength))
    (wanted,) = Session(llama.lm).generate("hello there", recipe, sampling=Sampling(greedy=True), max_new_tokens=6)
    assert rows[1]["text"] == wanted.text != rows[0]["text"]


def test_sweep_takes_features_beside_artifacts(
    run: Run, llama: Tiny, model_folder: Path, folder: Path, tmp_path: Path
) -> None:
    vector = save(make_vector((2,), model=llama.lm.reference), tmp_path / "mood")
    uses = ("--use", f"{folder}#12=5:0.5", "--use", f"{vector}:1")
    options = ("--strengths", "0,1", "--model", model_folder, "--dtype", "float32", "--max-new-tokens", "3", "--json")
    (tmp_path / "prompts.txt").write_text("one thing\n", encoding="utf-8")
    ran = run("sweep", *uses, "--prompts", tmp_path / "prompts.txt", *options)
    assert ran.code == 0, ran.err
    assert [row["strength"] for row in json.loads(ran.out)["rows"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("#99", f"0 to {D_SAE - 1}"),
        (f"#{SILENT}=x", "SAE#INDEX"),
        ("#1:much", "much"),
        ("-nowhere#1", "no such folder"),
    ],
)
def test_mistakes_about_features_end_with_code_2_and_one_line(
    run: Run, model_folder: Path, folder: Path, use: str, words: str
) -> None:
    ran = run("steer", "--use", f"{folder}{use}", "--prompt", "x", "--model", model_folder)
    assert ran.code == 2 and ran.out == "" and words in ran.err, ran
    assert len(ran.err.splitlines()) == 1


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two SAEs as if they came with NeuroSteer, one of them for another model; nothing may load a model."""
    figures = {"explained_variance": 0.8765, "l0": 48.25, "dead": 0.01, "cross_entropy_recovered": 0.9}
    write_sae(tmp_path / "saes" / "a", model_name="HuggingFaceTB/SmolLM2-135M-Instruct", layer=20)
    write_sae(tmp_path / "saes" / "b", model_name="HuggingFaceTB/SmolLM2-135M-Instruct", layer=3, measured=figures)
    write_sae(tmp_path / "saes" / "c", model_name="somebody/else", layer=1)
    monkeypatch.setattr("neurosteer.saes.offers.assets_folder", lambda: tmp_path)
    monkeypatch.setattr("neurosteer.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("model", [(), ("--model", "smollm2-135m-instruct")], ids=["default", "by name"])
def test_the_saes_of_a_model_are_listed_without_loading_it(run: Run, shipped: None, model: tuple[str, ...]) -> None:
    data = json.loads(run("sae", "list", "--json", *model).out)
    assert data["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["releases"] == []
    assert [(sae["name"], sae["layer"], sae["n_features"]) for sae in data["embedded"]] == [
        ("embedded/3", 3, D_SAE), ("embedded/20", 20, D_SAE)
    ]  # fmt: skip
    assert data["embedded"][0]["measured"]["l0"] == 48.25 and data["embedded"][1]["measured"] == {}
    printed = run("sae", "list", *model).out
    assert "embedded/3" in printed and "0.876" in printed and "48.250" in printed and "embedded/20" in printed
    assert "none" in printed


def test_the_catalogs_releases_are_listed_and_where_there_is_nothing_it_is_said(run: Run, shipped: None) -> None:
    ran = run("sae", "list", "--model", "gpt-2-SMALL")
    assert ran.code == 0 and "gpt2-small-res-jb" in ran.out and "None comes with NeuroSteer" in ran.out
    ran = run("sae", "list", "--model", "somebody/unknown")
    assert ran.code == 0 and "none" in ran.out
    ran = run("sae", "list", "--model", "no such model")
    assert ran.code == 2 and "no such model" in ran.err and len(ran.err.splitlines()) == 1


def test_a_model_in_a_folder_is_listed_under_the_name_that_loading_gives_it(model_folder: Path, tmp_path: Path) -> None:
    assert offered_saes(model_folder).model == "tiny-llama"
    assert offered_saes(tmp_path / "Some.Model-Q4.gguf").model == "Some.Model-Q4"


def test_what_is_needed_for_features_is_public() -> None:
    for name in ("feature_vector", "load_sae", "SparseAutoencoder"):
        assert name in dir(neurosteer) and getattr(neurosteer, name) is not None
    assert neurosteer.feature_vector is feature_vector and isinstance(make_vector(), SteeringVector)
