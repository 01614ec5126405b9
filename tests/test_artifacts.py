"""Artifacts: what makes a valid one, their algebra, and the folder they are kept in."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import FrozenInstanceError, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import D_MLP, D_MODEL, N_LAYERS, REFERENCE, clamping, make_circuit, make_vector

from neurosteer.artifacts import storage
from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.features import Feature
from neurosteer.artifacts.provenance import Provenance, Receipt
from neurosteer.artifacts.storage import is_artifact, load, pack, save, unpack
from neurosteer.artifacts.strength import Calibration, default_calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, MismatchError
from neurosteer.models.reference import ModelReference

NAN, INFINITY = float("nan"), float("inf")


def short(value: object) -> str:
    return str(value)[:50]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def directions(*layers: int, width: int = D_MODEL, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    return {layer: torch.ones(width, dtype=dtype) for layer in layers}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 0}, {"n_layers": -1}, {"n_layers": 4097}, {"n_layers": True}, {"n_layers": 4.0}, {"n_layers": "4"},
        {"d_model": 0}, {"d_model": (1 << 20) + 1}, {"d_mlp": None}, {"d_mlp": 1 << 40},
        {"name": ""}, {"name": None}, {"name": "x" * 301}, {"name": 5},
        {"revision": ""}, {"revision": 5}, {"revision": "x" * 301},
        {"fingerprint": ""}, {"fingerprint": None}, {"fingerprint": "x" * 101},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_reference_checks_every_field(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as error:
        replace(REFERENCE, **changes)
    assert next(iter(changes)).split("_")[0] in one_line(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"created": None}, {"version": 1}, {"examples": "x" * 1001}, {"examples_sha256": b"x"}, {"framing": None},
        {"tokens": 3}, {"layer_choice": ["x"]}, {"n_positive": -1}, {"n_negative": 1.5}, {"n_cut": True},
        {"separation": {"1": 0.5}}, {"separation": {1: NAN}}, {"separation": {1: "high"}}, {"separation": {True: 0.5}},
    ],
    ids=str,
)  # fmt: skip
def test_provenance_checks_every_field(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as error:
        Provenance(**changes)
    assert next(iter(changes)) in one_line(error)


@pytest.mark.parametrize(
    "given", [(NAN,), (INFINITY,), ("1",), (None,), (True,), (1.0, 1), (1.0, "yes"), (10**400,)], ids=short
)
def test_a_calibration_is_a_finite_number(given: tuple[Any, ...]) -> None:
    with pytest.raises(ArtifactError) as error:
        Calibration(*given)
    assert "calibrat" in one_line(error)


def test_default_calibrations_are_the_documented_ones() -> None:
    amounts = {name: default_calibration(name).amount for name in ("add", "ablate", "scale", "shift")}
    assert amounts == {"add": 0.3, "ablate": 1.0, "scale": 2.0, "shift": 6.0}
    assert not any(default_calibration(name).measured for name in amounts)


ODD_NAMES = [
    "", " x", "-x", ".x", "../x", "/x", "a/b", "a\\b", "a b", "é", "a\nb", "a\0b", "x" * 97, "a\n", None, 5,
]  # fmt: skip
COMMON_MISTAKES: list[dict[str, Any]] = [
    *({"name": name} for name in ODD_NAMES),
    {"model": None},
    {"model": "tiny"},
    {"method": ""},
    {"method": None},
    {"method": "x" * 101},
    {"description": None},
    {"description": "x" * 10_001},
    {"parameters": {"x": NAN}},
    {"parameters": {"x": INFINITY}},
    {"parameters": {"x": object()}},
    {"parameters": {"x": torch.ones(2)}},
    {"parameters": {"x": {1, 2}}},
    {"parameters": {(1, 2): 3}},
]  # fmt: skip


@pytest.mark.parametrize("changes", COMMON_MISTAKES, ids=lambda changes: str(changes)[:40])
@pytest.mark.parametrize("make", [make_vector, make_circuit])
def test_names_and_descriptions_and_parameters_are_checked(make: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as error:
        make(**changes)
    one_line(error)


@pytest.mark.parametrize("name", ["a", "A", "0", "a.b", "a_b-c.1", "x" * 96, "v1..2"])
def test_plain_names_are_allowed(name: str) -> None:
    assert make_vector(name=name).name == make_circuit(name=name).name == name


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"operation": "scale"}, "add, ablate"),
        ({"operation": None}, "add, ablate"),
        ({"directions": {}, "norms": {}}, "no layers"),
        ({"norms": {1: 1.0}}, "same layers"),
        ({"norms": {1: 1.0, 2: 1.0, 3: 1.0}}, "same layers"),
        ({"norms": {1: 1.0, 2: 0.0}}, "above 0"),
        ({"norms": {1: 1.0, 2: -1.0}}, "above 0"),
        ({"norms": {1: 1.0, 2: NAN}}, "above 0"),
        ({"norms": {1: 1.0, 2: INFINITY}}, "above 0"),
        ({"norms": {1: 1.0, 2: "1"}}, "above 0"),
        ({"norms": {1: 1.0, 2: 10**400}}, "above 0"),
        ({"directions": directions(1, 4), "norms": {1: 1.0, 4: 1.0}}, "layer 4"),
        ({"directions": directions(-1), "norms": {-1: 1.0}}, "layer -1"),
        ({"directions": {True: torch.ones(D_MODEL)}, "norms": {True: 1.0}}, "layer True"),
        ({"directions": {"1": torch.ones(D_MODEL)}, "norms": {"1": 1.0}}, "layer '1'"),
        ({"directions": directions(1, 2, width=D_MODEL + 1)}, "float32"),
        ({"directions": directions(1, 2, dtype=torch.float16)}, "float16"),
        ({"directions": {1: torch.ones(1, D_MODEL), 2: torch.ones(D_MODEL)}}, "[1, 32]"),
        ({"directions": {1: [1.0] * D_MODEL, 2: torch.ones(D_MODEL)}}, "list"),
        ({"directions": {1: torch.full((D_MODEL,), NAN), 2: torch.ones(D_MODEL)}}, "not finite"),
        ({"directions": {1: torch.full((D_MODEL,), INFINITY), 2: torch.ones(D_MODEL)}}, "not finite"),
        ({"directions": {1: torch.zeros(D_MODEL), 2: torch.ones(D_MODEL)}}, "zero at layer 1"),
    ],
    ids=short,
)
def test_a_vector_checks_every_field(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ArtifactError) as error:
        make_vector(**changes)
    assert word in one_line(error)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"operation": "add"}, "scale, shift"),
        (
            {"neurons": ints(), "neuron_layers": ints(), "scores": torch.ones(0), "differences": torch.ones(0)},
            "no neurons",
        ),
        ({"neurons": [1, 2, 3, 4]}, "no neurons"),
        ({"neurons": ints(1, 2, 3)}, "int32"),
        ({"neurons": torch.tensor([1, 2, 3, 4])}, "int64"),
        ({"neurons": ints(1, 2, 3, 4)[:, None]}, "no neurons"),
        ({"neurons": ints(3, 5, 60, D_MLP)}, f"0 to {D_MLP - 1}"),
        ({"neurons": ints(3, 5, -60, 0)}, "neuron -60"),
        ({"neuron_layers": ints(0, 1, 1, N_LAYERS)}, f"layer {N_LAYERS}"),
        ({"neuron_layers": ints(0, 1, 1, -1)}, "layer -1"),
        ({"neuron_layers": torch.ones(4)}, "int32"),
        ({"scores": torch.ones(3)}, "scores"),
        ({"scores": torch.tensor([1, NAN, 1, 1])}, "scores holds values that are not finite"),
        ({"differences": torch.tensor([1, INFINITY, 1, 1])}, "differences holds values that are not finite"),
        ({"differences": torch.ones(4, dtype=torch.float64)}, "float64"),
        ({"neuron_layers": ints(1, 1, 1, 1), "neurons": ints(1, 2, 3, 2)}, "twice"),
    ],
    ids=short,
)
def test_a_circuit_checks_every_field(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ArtifactError) as error:
        make_circuit(**changes)
    assert word in one_line(error)


def test_the_same_neuron_number_in_two_layers_is_two_neurons() -> None:
    circuit = make_circuit([(0, 5), (1, 5)])
    assert circuit.size == 2 and circuit.layers == [0, 1]
    assert circuit.share == 2 / (N_LAYERS * D_MLP)


def test_artifacts_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_vector().name = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        make_circuit().scores = torch.ones(4)  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["", "...", "../../etc/passwd", "日本語", "My Mood!", "a" * 300, "--x--", "a\0b\n", "x." * 60]
)
def test_a_safe_name_is_always_a_valid_one(text: str) -> None:
    assert make_vector(name=safe_name(text)).name == safe_name(text)
    assert safe_name("My Mood!") == "My-Mood"


# --- algebra ---------------------------------------------------------------------------------------------------------


def frozen_copy(vector: SteeringVector) -> dict[int, torch.Tensor]:
    return {layer: tensor.clone() for layer, tensor in vector.directions.items()}


def test_vectors_add_over_the_layers_of_either_into_a_new_one() -> None:
    one, other = make_vector((1, 2), seed=1), make_vector((2, 3), seed=2, norms={2: 9.0, 3: 8.0})
    before = frozen_copy(one), frozen_copy(other)
    total = one + other
    assert total.layers == [1, 2, 3]
    assert torch.equal(total.directions[1], one.directions[1])
    assert torch.equal(total.directions[2], torch.add(one.directions[2], other.directions[2]))
    assert torch.equal(total.directions[3], other.directions[3])
    assert total.norms == {1: one.norms[1], 2: one.norms[2], 3: 8.0}
    assert total.provenance.parents == ("vector-1", "vector-2")
    assert total.calibration == Calibration(0.3) and total.receipts == ()
    for vector, kept in zip((one, other), before, strict=True):
        assert all(torch.equal(vector.directions[layer], kept[layer]) for layer in kept)
    total.directions[1].add_(1.0)  # even what nobody should do does not reach the parents
    assert torch.equal(one.directions[1], before[0][1])


def test_vectors_scale_negate_and_subtract_as_torch_does() -> None:
    one, other = make_vector((1, 2), seed=1), make_vector((1, 2), seed=2)
    before = frozen_copy(one)
    for layer in (1, 2):
        a, b = one.directions[layer], other.directions[layer]
        assert torch.equal((one * 2.5).directions[layer], torch.mul(a, 2.5))
        assert torch.equal((-3 * one).directions[layer], torch.mul(a, -3.0))
        assert torch.equal((-one).directions[layer], torch.neg(a))
        assert torch.equal((one - other).directions[layer], torch.sub(a, b))
        assert torch.allclose((0.5 * one + 2 * other).directions[layer], 0.5 * a + 2 * b)
        unit = one.normalised().directions[layer]
        assert torch.allclose(unit, torch.nn.functional.normalize(a, dim=0)) and abs(float(unit.norm()) - 1) < 1e-6
    assert all(torch.equal(one.directions[layer], before[layer]) for layer in before)
    assert (one * 2).name == one.name and (one * 2).norms == one.norms


def test_what_was_measured_of_a_vector_is_not_claimed_of_another() -> None:
    measured = make_vector(receipts=(Receipt({"effect": 1}),), calibration=Calibration(0.7, True))
    assert (measured + make_vector(seed=2)).receipts == ()
    assert (measured + make_vector(seed=2)).calibration.measured is False
    assert (-measured).receipts == ()


def test_a_vector_minus_itself_is_refused_because_it_has_no_direction() -> None:
    with pytest.raises(ArtifactError, match="zero at layer"):
        _ = make_vector() - make_vector()


@pytest.mark.parametrize("factor", [0, 0.0, NAN, INFINITY, True, "2", None, 10**400, 1e-60, 1e60], ids=short)
def test_a_vector_is_not_scaled_to_nothing_or_infinity(factor: Any) -> None:
    with pytest.raises((ArtifactError, TypeError)) as error:
        _ = make_vector() * factor
    one_line(error)


def test_only_vectors_of_one_model_add() -> None:
    other = replace(REFERENCE, name="other/model", d_model=D_MODEL * 2)
    wide = make_vector(model=other, directions=directions(1, 2, width=D_MODEL * 2))
    with pytest.raises(MismatchError) as error:
        _ = make_vector() + wide
    assert "d_model 32" in one_line(error) and "d_model 64" in one_line(error)
    for term in (3, "x", make_circuit()):
        with pytest.raises(TypeError):
            _ = make_vector() + term  # type: ignore[operator]


def test_long_names_still_add() -> None:
    total = make_vector(name="a" * 96) + make_vector(name="b" * 96, seed=2)
    assert len(total.name) <= 96


# --- artifacts and models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"n_layers": 5}, {"d_model": 64}, {"d_mlp": 65}])
def test_a_model_of_another_shape_is_refused(changes: dict[str, int]) -> None:
    model = replace(REFERENCE, name="other/model", **changes)
    assert "d_mlp" not in changes or check_model(make_vector(), model) is None  # which no vector needs to know
    for artifact in (make_circuit(),) if "d_mlp" in changes else (make_vector(), make_circuit()):
        with pytest.raises(MismatchError) as error:
            check_model(artifact, model)
        assert "tiny/any" in one_line(error) and "other/model" in one_line(error)


def test_other_weights_of_the_same_shape_are_warned_about() -> None:
    for artifact in (make_vector(), make_circuit()):
        assert check_model(artifact, REFERENCE) is None
        assert check_model(artifact, replace(REFERENCE, name="renamed", revision=None)) is None
        warning = check_model(artifact, replace(REFERENCE, fingerprint="feedbeef"))
        assert warning and "feedbeef" in warning and REFERENCE.fingerprint in warning


def test_what_an_artifact_says_of_its_model_cannot_break_a_message_into_lines() -> None:
    sly = replace(REFERENCE, name="tiny\nERROR: all is lost", fingerprint="aa\nbb")
    artifact = make_vector(model=sly)
    with pytest.raises(MismatchError) as error:
        check_model(artifact, replace(REFERENCE, n_layers=9))
    one_line(error)
    assert "\n" not in (check_model(artifact, REFERENCE) or "")
    with pytest.raises(ArtifactError) as refused:
        make_vector((9,), model=sly, norms={9: 1.0})
    one_line(refused)


# --- the folder ------------------------------------------------------------------------------------------------------

RICH: dict[str, Any] = {
    "description": "Fröhlich 😀\n\nzweite Zeile \"quoted\" \\ \t 日本 \u2028",
    "parameters": {
        "flag": True, "off": False, "none": None, "text": "ü'\"", "list": [1, 2.5, [None]],
        "deep": {"a": {"b": 1e-300}},
    },
    "calibration": Calibration(0.123456789, True),
    "provenance": Provenance(
        created="2026-01-02T03:04:05+00:00", version="0.1.0", examples="moods", examples_sha256="ab" * 32,
        n_positive=30, n_negative=31, n_cut=2, dropped={"blank": 1, "duplicate": 2}, framing="raw", tokens="mean",
        layer_choice="given", separation={0: 0.5, 3: 0.9876}, parents=("a", "b"),
    ),
    "receipts": (Receipt({"effect": {"+1": [1, 2.5, None]}, "note": "ñ"}), Receipt({})),
}  # fmt: skip


def same(one: Artifact, other: Artifact) -> bool:
    keys = ("name", "model", "method", "operation", "description", "calibration", "provenance", "receipts")
    if type(one) is not type(other) or any(getattr(one, key) != getattr(other, key) for key in keys):
        return False
    if json.dumps(dict(one.parameters)) != json.dumps(dict(other.parameters)):  # where True is not 1
        return False
    if isinstance(one, SteeringVector) and isinstance(other, SteeringVector):
        tensors = [(one.directions[layer], other.directions[layer]) for layer in one.layers]
        if encoder_figures(one) != encoder_figures(other):
            return False
        tensors += [(one.encoders[layer].weights, other.encoders[layer].weights) for layer in one.encoders]
        return one.norms == other.norms and all(map(identical, *zip(*tensors, strict=True)))
    assert isinstance(one, NeuronCircuit) and isinstance(other, NeuronCircuit)
    return all(
        identical(getattr(one, key), getattr(other, key))
        for key in ("neuron_layers", "neurons", "scores", "differences")
    )


def encoder_figures(vector: SteeringVector) -> dict[int, tuple[float, float, bool]]:
    return {layer: (one.bias, one.threshold, one.centred) for layer, one in vector.encoders.items()}


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


MAKERS = {
    "vector": lambda: make_vector((0, 3), **RICH),
    "ablation": lambda: make_vector((2,), operation="ablate"),
    "clamp": lambda: clamping((0, 3), seed=1, centred=True, **{**RICH, "calibration": Calibration(0.0)}),
    "circuit": lambda: make_circuit(**RICH),
    "shift": lambda: make_circuit(operation="shift", model=replace(REFERENCE, revision=None)),
}


@pytest.fixture(params=MAKERS)
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return MAKERS[request.param]()


def test_what_is_loaded_is_bit_for_bit_what_was_saved(artifact: Artifact, tmp_path: Path) -> None:
    assert save(artifact, tmp_path / "a") == tmp_path / "a"
    loaded = load(tmp_path / "a")
    assert same(loaded, artifact)
    save(loaded, tmp_path / "b")
    for file in ("config.json", "weights.safetensors", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_folder_holds_the_documented_files_and_keys(tmp_path: Path) -> None:
    save(MAKERS["vector"](), tmp_path / "v")
    save(MAKERS["circuit"](), tmp_path / "c")
    assert {file.name for file in (tmp_path / "v").iterdir()} == {"config.json", "weights.safetensors", "README.md"}
    config = json.loads((tmp_path / "v" / "config.json").read_text(encoding="utf-8"))
    assert config["schema_version"] == 1 and config["kind"] == "steering-vector" and config["site"] == "resid_post"
    assert config["layers"] == [0, 3] and config["operation"] == "add"
    assert {"name", "description", "model", "method", "parameters", "calibration", "provenance", "receipts"} <= set(
        config
    )
    assert {
        key: (value.dtype, tuple(value.shape))
        for key, value in load_file(tmp_path / "v" / "weights.safetensors").items()
    } == {
        "layer.0": (torch.float32, (D_MODEL,)),
        "layer.3": (torch.float32, (D_MODEL,)),
    }
    config = json.loads((tmp_path / "c" / "config.json").read_text(encoding="utf-8"))
    assert config["kind"] == "neuron-circuit" and config["site"] == "mlp_neurons"
    kinds = {key: value.dtype for key, value in load_file(tmp_path / "c" / "weights.safetensors").items()}
    assert kinds == {
        "layers": torch.int32,
        "neurons": torch.int32,
        "scores": torch.float32,
        "differences": torch.float32,
    }


def test_special_values_and_views_survive(tmp_path: Path) -> None:
    stored = torch.zeros(D_MODEL * 2)
    stored[::2] = torch.tensor([-0.0, 1e-45, 3.4e38, -1.0] * (D_MODEL // 4))
    vector = make_vector((1,), directions={1: stored[::2]}, norms={1: 1e-300})
    loaded = load(save(vector, tmp_path / "a"))
    assert isinstance(loaded, SteeringVector)
    assert loaded.directions[1].numpy().tobytes() == stored[::2].contiguous().numpy().tobytes()
    assert loaded.norms == {1: 1e-300}


def test_parent_folders_are_made_and_is_artifact_tells(tmp_path: Path) -> None:
    folder = save(make_vector(), tmp_path / "deep" / "er" / "a")
    assert is_artifact(folder) and not is_artifact(folder.parent) and not is_artifact(tmp_path / "nothing")


def test_saving_again_replaces_the_artifact_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save(make_vector(name="one"), tmp_path / "a")
    save(make_circuit(name="two"), tmp_path / "a")
    assert load(tmp_path / "a").name == "two"
    assert names(tmp_path) == ["a"]
    assert "two" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_a_card_that_somebody_edited_is_kept_as_it_is(tmp_path: Path) -> None:
    folder = save(make_vector(name="one"), tmp_path / "a")
    edited = "# Meine Karte\n\nvon Hand 😀\n"
    (folder / "README.md").write_text(edited, encoding="utf-8")
    save(make_vector(name="two", seed=5), folder)
    assert load(folder).name == "two"
    assert (folder / "README.md").read_text(encoding="utf-8") == edited


@pytest.mark.parametrize(
    "content", [b"windows\r\nlines\r\n", "grüße".encode("latin-1"), b"\xef\xbb\xbfmark", b""], ids=repr
)
def test_an_edited_card_is_kept_byte_for_byte(content: bytes, tmp_path: Path) -> None:
    folder = save(make_vector(), tmp_path / "a")
    (folder / "README.md").write_bytes(content)
    save(make_vector(seed=5), folder)
    assert (folder / "README.md").read_bytes() == content


def test_a_card_is_kept_even_when_the_artifact_beside_it_is_damaged(tmp_path: Path) -> None:
    folder = save(make_vector(), tmp_path / "a")
    (folder / "README.md").write_text("by hand", encoding="utf-8")
    (folder / "config.json").write_text("{", encoding="utf-8")
    save(make_vector(seed=5), folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "by hand"
    assert same(load(folder), make_vector(seed=5))


@pytest.mark.parametrize("files", [("notes.txt",), ("config.json",), ("config.json", "model.safetensors"), (".git",)])
def test_a_folder_that_holds_something_else_is_never_overwritten(files: tuple[str, ...], tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    for file in files:
        (target / file).write_text("precious", encoding="utf-8")
    with pytest.raises(ArtifactError) as error:
        save(make_vector(), target)
    assert "mine" in one_line(error)
    assert {file.name: file.read_text(encoding="utf-8") for file in target.iterdir()} == dict.fromkeys(
        files, "precious"
    )
    assert names(tmp_path) == ["mine"]


def test_an_empty_folder_is_used_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load(save(make_vector(), tmp_path / "empty")).name == "vector-0"
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError):
            save(make_vector(), path)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    "path", ["", ".", "nothing/there", "x" * 300, "a\0b", "~nobody-of-this-name/x"], ids=lambda path: path[:20]
)
def test_a_path_that_is_no_artifact_is_one_clear_line(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError) as error:
        load(path)
    one_line(error)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "~nobody-of-this-name/x", "/"], ids=lambda path: path[:20])
def test_a_path_that_cannot_be_written_is_one_clear_line(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError) as error:
        save(make_vector(), path)
    one_line(error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", [".", "", "../here"])
def test_the_working_folder_can_be_saved_to_by_its_short_names(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        save(make_vector(), path)
    except ArtifactError as error:  # to refuse is as good as to do it
        assert "\n" not in str(error)
        assert names(tmp_path / "here") == []
    else:
        assert load(tmp_path / "here").name == "vector-0"
    assert names(tmp_path) == ["here"]


# --- crashes ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process ending: nobody may catch it and carry on."""


def break_at(stage: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    rename, write_text, calls = Path.rename, Path.write_text, 0

    def failing_write(self: Path, *arguments: Any, **named: Any) -> int:
        if self.name == f"{stage}.json":
            raise error
        return write_text(self, *arguments, **named)

    def failing_rename(self: Path, target: Any) -> Any:
        nonlocal calls
        calls += 1
        if f"rename {calls}" == stage:
            raise error
        return rename(self, target)

    if stage.startswith("rename"):
        monkeypatch.setattr(Path, "rename", failing_rename)
    elif stage == "config":
        monkeypatch.setattr(Path, "write_text", failing_write)
    else:
        owner, name = {
            "weights": (storage, "save_file"),
            "sync": (storage.os, "fsync"),
            "temporary": (storage.tempfile, "mkdtemp"),
        }[stage]
        monkeypatch.setattr(owner, name, fail)


STAGES = ["temporary", "config", "weights", "sync", "rename 1", "rename 2"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_a_save_that_is_cut_leaves_the_old_artifact_whole(
    stage: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_vector(name="old"), make_circuit(name="new")
    folder = save(old, tmp_path / "a")
    with monkeypatch.context() as patched:
        break_at(stage, patched, error)
        with pytest.raises(Killed if isinstance(error, Killed) else ArtifactError):
            save(new, folder)
    assert same(load(folder), old)
    assert [name for name in names(tmp_path) if name not in ("a", ".a.previous")] == []
    save(new, folder)  # and the next save works and cleans up
    assert same(load(folder), new)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_first_save_that_is_cut_leaves_no_artifact_at_all(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        break_at(stage, patched, Killed())
        with pytest.raises(Killed):
            save(make_vector(), tmp_path / "a")
    assert names(tmp_path) == []
    with pytest.raises(ArtifactError):
        load(tmp_path / "a")


def test_an_edited_card_outlives_a_save_that_was_cut_between_its_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(make_vector(), tmp_path / "a")
    (folder / "README.md").write_text("by hand", encoding="utf-8")
    with monkeypatch.context() as patched:
        break_at("rename 2", patched, Killed())
        with pytest.raises(Killed):
            save(make_vector(seed=5), folder)
    save(make_vector(seed=6), folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "by hand"


@pytest.mark.slow
def test_a_process_killed_while_saving_over_and_over_leaves_an_artifact_that_loads(tmp_path: Path) -> None:
    save(make_vector(name="start"), tmp_path / "a")
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from tiny import make_vector\nfrom neurosteer.artifacts.storage import save\n"
        "print('ready', flush=True)\n"
        "for seed in range(10**6): save(make_vector(name=f'v{seed}', seed=seed), sys.argv[1])\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path / "a"), str(here), str(here.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            process.wait(0.4)
        except subprocess.TimeoutExpired:
            process.kill()
    name = load(tmp_path / "a").name
    assert name == "start" or same(load(tmp_path / "a"), make_vector(name=name, seed=int(name[1:])))


def test_an_artifact_whose_folder_was_moved_away_mid_save_is_read_from_its_previous_place(tmp_path: Path) -> None:
    folder = save(make_vector(), tmp_path / "a")
    folder.rename(tmp_path / ".a.previous")
    assert same(load(folder), make_vector())


# --- zip files -------------------------------------------------------------------------------------------------------


def test_a_packed_artifact_unpacks_to_the_same(artifact: Artifact, tmp_path: Path) -> None:
    data = pack(artifact)
    assert same(unpack(data), artifact)
    (tmp_path / "a.zip").write_bytes(data)
    assert same(unpack(tmp_path / "a.zip"), artifact)
    with zipfile.ZipFile(BytesIO(data)) as archive:
        assert sorted(archive.namelist()) == [
            f"{artifact.name}/{file}" for file in ("README.md", "config.json", "weights.safetensors")
        ]
        archive.extractall(tmp_path)
    assert same(load(tmp_path / artifact.name), artifact)


def test_a_zip_made_by_hand_of_the_bare_files_or_by_another_tool_unpacks(tmp_path: Path) -> None:
    folder = save(make_vector(), tmp_path / "a")
    shutil.make_archive(str(tmp_path / "bare"), "zip", folder)
    assert same(unpack(tmp_path / "bare.zip"), make_vector())
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"my stuff/a/{file.name}")
        archive.writestr("__MACOSX/a/._config.json", b"\0\1")
    assert same(unpack(tmp_path / "mac.zip"), make_vector())


def test_a_model_reference_is_plain_data() -> None:
    assert ModelReference("a", None, 1, 2, 3, "f") == ModelReference("a", None, 1, 2, 3, "f")


def test_a_features_weight_follows_the_length_of_its_direction() -> None:
    one = make_vector((1,))
    feature = Feature(layer=1, index=3, weight=0.5, score=1.0, rates=(0.2, 0.1), means_active=(1.0, 1.0))
    vector = replace(one, features=(feature,))
    length = float(torch.linalg.vector_norm(one.directions[1]))
    assert (vector * -2.0).features[0].weight == -1.0
    assert vector.normalised().features[0].weight == pytest.approx(0.5 / length)


def test_what_is_projected_out_adds_to_what_is_projected_out_whole() -> None:
    total = make_vector((1,), operation="ablate") + make_vector((1, 2), seed=2, operation="ablate")
    assert total.operation == "ablate" and total.calibration == default_calibration("ablate")
    for one, other in (("add", "ablate"), ("ablate", "add")):
        with pytest.raises(ArtifactError, match="only vectors of one operation can be added") as error:
            _ = make_vector(operation=one) + make_vector(seed=2, operation=other)
        one_line(error)


def test_template_options_survive_saving_and_artifacts_without_them_stay_readable(tmp_path: Path) -> None:
    options = {"enable_thinking": False, "today": "2024-07-26"}
    artifact = make_vector(provenance=Provenance(template_options=options))
    save(artifact, tmp_path / "with")
    assert load(tmp_path / "with").provenance.template_options == options
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    del config["provenance"]["template_options"]
    (tmp_path / "with" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "with").provenance.template_options == {}
