"""Artifacts from strangers: whatever is done to the files, loading gives a valid artifact or one clear line.

What loads can be saved and loads again as the same, and nothing is ever written outside the place it belongs to.
"""

import copy
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from test_artifacts import RICH, same
from tiny import D_MODEL, clamping, make_circuit, make_vector

from neurosteer.artifacts import storage
from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.storage import load, pack, save, unpack
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, MismatchError

CONFIG, WEIGHTS, CARD = "config.json", "weights.safetensors", "README.md"
FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def files_of(artifact: Artifact) -> dict[str, bytes]:
    with TemporaryDirectory() as temporary:
        folder = save(artifact, Path(temporary) / "a")
        return {file.name: file.read_bytes() for file in folder.iterdir()}


ARTIFACTS = {
    "vector": make_vector((0, 3), **RICH),
    "clamp": clamping((0, 3), seed=1, **RICH),
    "circuit": make_circuit(**RICH),
}
FILES = {kind: files_of(artifact) for kind, artifact in ARTIFACTS.items()}
CONFIGS = {kind: json.loads(files[CONFIG]) for kind, files in FILES.items()}
KINDS = pytest.mark.parametrize("kind", FILES)


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    """Nothing here is about power cuts: files need not reach the disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(storage.os, "fsync", lambda _: None)
        yield


def one_line(message: str) -> None:
    assert message and len(message.splitlines()) == 1, message
    assert len(message) < 1500


def check_loaded(read: Callable[[], Artifact]) -> Artifact | None:
    """What `read` gives, held against the rule; None where it refused as it should."""
    try:
        artifact = read()
    except ArtifactError as error:
        one_line(str(error))
        return None
    with TemporaryDirectory() as temporary:
        again = load(save(artifact, Path(temporary) / "again"))
    assert same(again, artifact)
    return artifact


def load_files(files: dict[str, bytes]) -> Artifact | None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "a"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return check_loaded(lambda: load(folder))


def with_config(kind: str, config: Any) -> dict[str, bytes]:
    return {**FILES[kind], CONFIG: json.dumps(config).encode()}


def with_weights(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {**FILES[kind], WEIGHTS: safetensors_bytes(tensors)}


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    artifact = ARTIFACTS[kind]
    if isinstance(artifact, SteeringVector):
        directions = {f"layer.{layer}": tensor.clone() for layer, tensor in artifact.directions.items()}
        encoders = {f"encoder.{layer}": found.weights.clone() for layer, found in artifact.encoders.items()}
        return directions | encoders
    values = (artifact.neuron_layers, artifact.neurons, artifact.scores, artifact.differences)
    return dict(zip(("layers", "neurons", "scores", "differences"), (value.clone() for value in values), strict=True))


@KINDS
def test_the_untouched_files_load(kind: str) -> None:
    loaded = load_files(FILES[kind])
    assert loaded is not None and same(loaded, ARTIFACTS[kind])


# --- bytes -----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_cut_at_any_point_are_refused(kind: str, name: str) -> None:
    data = FILES[kind][name]
    end = len(data.rstrip())  # without its last line feed JSON is still whole
    for cut in sorted({*range(0, end, max(1, end // 60)), *range(16), end - 1}):
        assert load_files({**FILES[kind], name: data[:cut]}) is None


@KINDS
def test_a_card_of_any_bytes_never_keeps_an_artifact_from_loading(kind: str) -> None:
    for card in (b"", b"\xff\xfe\0", b"---\n: [", FILES[kind][CARD][:20]):
        assert load_files({**FILES[kind], CARD: card}) is not None
    assert load_files({name: data for name, data in FILES[kind].items() if name != CARD}) is not None


@KINDS
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(kind: str, name: str, tmp_path: Path) -> None:
    for other, data in FILES[kind].items():
        if other != name:
            (tmp_path / other).write_bytes(data)
    with pytest.raises(ArtifactError, match=name):
        load(tmp_path)


@KINDS
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_a_pipe_or_a_dead_link_in_a_files_place_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    makers: list[Callable[[Path], Any]] = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]
    for place, make in enumerate(makers):
        folder = tmp_path / str(place)
        folder.mkdir()
        for other, data in FILES[kind].items():
            if other != name:
                (folder / other).write_bytes(data)
        make(folder / name)
        with pytest.raises(ArtifactError) as error:
            load(folder)
        one_line(str(error.value))


@KINDS
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_surprise(kind: str, name: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(FILES[kind][name])
    for place, value in flips:
        data[place % len(data)] = value
    load_files({**FILES[kind], name: bytes(data)})


@KINDS
@FUZZ
@given(data=st.binary(max_size=300), name=st.sampled_from([CONFIG, WEIGHTS]))
def test_files_of_random_bytes_are_refused(kind: str, data: bytes, name: str) -> None:
    assert load_files({**FILES[kind], name: data}) is None


# --- the config ------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, the whole of it first."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def replaced(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(config)
    if not path:
        return value
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return changed


ODD: dict[str, Any] = {
    "null": None,
    "true": True,
    "list": [],
    "list of lists": [[[]], [None]],
    "list of 3": [3],
    "object": {},
    "object of null": {"x": None},
    "nested": {"a": [{"b": {"c": [1]}}]},
    "text": "text",
    "empty text": "",
    "number as text": "3",
    "lines": "one\ntwo\r\nthree\u2028four",
    "half a character": "\ud800",
    "NUL": "a\0b",
    "path": "../../x",
    "absolute path": "/etc/passwd",
    "long text": "x" * 20_000,
    "zero": 0,
    "minus one": -1,
    "one and a half": 1.5,
    "huge": 10**18,
    "beyond floats": 10**400,
    "huge float": 1e308,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
}


@KINDS
@pytest.mark.parametrize("odd", ODD)
def test_any_value_of_the_config_may_be_anything(kind: str, odd: str) -> None:
    for path in places(CONFIGS[kind]):
        load_files(with_config(kind, replaced(CONFIGS[kind], path, ODD[odd])))


@KINDS
def test_any_key_of_the_config_may_be_missing(kind: str) -> None:
    config = CONFIGS[kind]
    needed = {"schema_version", "kind", "name", "model", "method", "operation", "layers", "calibration"}
    for path in places(config):
        if path and isinstance(path[-1], str):
            outer = config
            for step in path[:-1]:
                outer = outer[step]
            without = {key: value for key, value in outer.items() if key != path[-1]}
            loaded = load_files(with_config(kind, replaced(config, path[:-1], without)))
            if len(path) == 1 and path[0] in needed:
                assert loaded is None, path


@KINDS
def test_keys_of_a_later_version_are_passed_over(kind: str) -> None:
    config = CONFIGS[kind]
    for path in places(config):
        inner = config
        for step in path:
            inner = inner[step]
        if isinstance(inner, dict):
            loaded = load_files(with_config(kind, replaced(config, path, {**inner, "new_in_2030": [1]})))
            by_layer = (("norms",), ("encoders",), ("provenance", "separation"), ("provenance", "dropped"))
            assert loaded is not None or path in by_layer


@KINDS
@pytest.mark.parametrize("version", [0, 2, 99, "1", 1.5, None])
def test_another_schema_version_is_refused_by_its_number(kind: str, version: Any, tmp_path: Path) -> None:
    for name, data in with_config(kind, {**CONFIGS[kind], "schema_version": version}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="schema version"):
        load(tmp_path)


ODD_KEYS = ["x", "", "1.5", "-1", "4", "9" * 12, "01", "1\n", "½", "0x1", "\ud800", "9" * 5000, "..", "a\0"]


@KINDS
@pytest.mark.parametrize("key", ODD_KEYS, ids=lambda key: ascii(key)[:20])
def test_layer_numbers_as_odd_texts_never_surprise(kind: str, key: str) -> None:
    config = copy.deepcopy(CONFIGS[kind])
    layered = [config.get("norms", {}), config.get("encoders", {})]
    for outer in (*layered, config["provenance"]["separation"], config["provenance"]["dropped"]):
        outer[key] = 1
        load_files(with_config(kind, config))
        del outer[key]


@KINDS
@pytest.mark.parametrize("where", ["parameters", "receipts", "provenance", "whole"])
def test_deeply_nested_json_never_overflows_the_stack(kind: str, where: str) -> None:
    for depth in (50, 300, 500, 700, 850, *range(900, 1000, 20), 2000, 100_000):
        nested = "[" * depth + "]" * depth
        config = json.dumps({**CONFIGS[kind], where: "HERE"})
        inner = {
            "parameters": f'{{"x": {nested}}}',
            "receipts": f'[{{"x": {nested}}}]',
            "provenance": f'{{"parents": {nested}}}',
        }
        text = nested if where == "whole" else config.replace('"HERE"', inner[where])
        load_files({**FILES[kind], CONFIG: text.encode()})


@KINDS
def test_a_config_larger_than_any_artifacts_is_refused_unread(kind: str, tmp_path: Path) -> None:
    for name, data in FILES[kind].items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / CONFIG).open("ab") as file:
        file.truncate(1 << 33)  # a hole: nothing of it may be read
    with pytest.raises(ArtifactError, match="larger than"):
        load(tmp_path)


@pytest.mark.parametrize("fill", ["[],", '{"a":0},', '[[["x"]]],', "0,"])
def test_a_small_zip_of_a_config_of_very_many_values_costs_little_memory(fill: str) -> None:
    """5 kB that became 120 MB once parsed."""
    import tracemalloc

    many = "[" + (fill * ((2 << 20) // len(fill)))[: (2 << 20) - 5000].rpartition(fill)[0] + "0]"
    config = json.dumps({**CONFIGS["vector"], "parameters": {"x": "HERE"}}).replace('"HERE"', many)
    data = zipped([*((n, d) for n, d in FILES["vector"].items() if n != CONFIG), (CONFIG, config.encode())],
                  compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    assert len(data) < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="values"):
            unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    for parameters in ({"x": [0] * 60_000}, {"x": "long" * 600_000}):
        with pytest.raises(ArtifactError, match="keep fewer"):
            save(make_vector(parameters=parameters), tmp_path / "big")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("provenance", "candidates", [{"label": "x"}] * 201),
        ("provenance", "separation", {str(layer): 0.5 for layer in range(1001)}),
        ("provenance", "parents", ["x"] * 1001),
        ("provenance", "dropped", {str(number): 1 for number in range(1001)}),
        ("", "receipts", [{}] * 101),
    ],
)
def test_more_entries_than_anything_is_drawn_from_are_refused(where: str, key: str, value: Any, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["vector"])
    (config[where] if where else config)[key] = value
    for name, data in with_config("vector", config).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{key}.*at most"):
        load(tmp_path)


@KINDS
def test_configs_in_other_encodings_or_with_repeated_keys_never_surprise(kind: str) -> None:
    text = FILES[kind][CONFIG].decode()
    for data in (text.encode("utf-16"), text.encode("utf-8-sig"), text.encode("utf-32"), b"\xff" + text.encode()):
        load_files({**FILES[kind], CONFIG: data})
    twice = text.rstrip()[:-1] + ', "name": "../again", "kind": "neuron-circuit", "layers": [999]}'
    assert load_files({**FILES[kind], CONFIG: twice.encode()}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@KINDS
@FUZZ
@given(data=st.data())
def test_two_random_values_at_random_places_never_surprise(kind: str, data: st.DataObject) -> None:
    config = CONFIGS[kind]
    for _ in range(2):
        path = data.draw(st.sampled_from(list(places(config))[1:]))
        config = replaced(config, path, data.draw(json_values))
    load_files(with_config(kind, config))


# --- the weights -----------------------------------------------------------------------------------------------------


OTHER_TYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
)  # fmt: skip


@KINDS
def test_wrong_shapes_types_and_values_of_any_tensor_are_refused(kind: str) -> None:
    wrong: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda tensor: tensor[:-1].clone(),
        lambda tensor: torch.cat([tensor, tensor]),
        lambda tensor: tensor[None].clone(),
        lambda tensor: tensor[:0].clone(),
        lambda tensor: tensor.sum().to(tensor.dtype),
        *(lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in OTHER_TYPES),
    ]
    tensors = tensors_of(kind)
    for name, tensor in tensors.items():
        for change in wrong:
            assert load_files(with_weights(kind, {**tensors, name: change(tensor)})) is None
        if tensor.is_floating_point():
            for value in (float("nan"), float("inf"), float("-inf")):
                broken = tensor.clone()
                broken[-1] = value
                assert load_files(with_weights(kind, {**tensors, name: broken})) is None
        else:
            for value in (-1, 1 << 30, -(1 << 31)):
                broken = tensor.clone()
                broken[0] = value
                assert load_files(with_weights(kind, {**tensors, name: broken})) is None


@KINDS
def test_missing_and_extra_tensors_are_refused_whatever_they_are_called(kind: str) -> None:
    tensors = tensors_of(kind)
    for name in tensors:
        assert load_files(with_weights(kind, {key: value for key, value in tensors.items() if key != name})) is None
    for extra in ("layer.1", "layer.x", "__metadata", "two\nlines", "../x", "x" * 5000, "", "\0", "日本"):
        assert load_files(with_weights(kind, {**tensors, extra: torch.ones(D_MODEL)})) is None
    assert load_files(with_weights(kind, {})) is None


def raw_weights(header: dict[str, Any] | bytes, body: bytes = b"", size: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if size is None else size) + data + body


def header_of(shape: list[Any], dtype: str = "F32", end: Any = None) -> dict[str, Any]:
    return {f"layer.{layer}": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]} for layer in (0, 3)}


@pytest.mark.parametrize(
    "data",
    [
        raw_weights(header_of([D_MODEL], end=128)),
        raw_weights(header_of([1 << 40], end=1 << 42)),
        raw_weights(header_of([1 << 62, 1 << 62], end=128), b"\0" * 128),
        raw_weights(header_of([2**63], end=128), b"\0" * 128),
        raw_weights(header_of([-1], end=128), b"\0" * 128),
        raw_weights(header_of([D_MODEL], end=-128), b"\0" * 128),
        raw_weights(header_of([D_MODEL], end=10**30), b"\0" * 128),
        raw_weights(header_of(["32"], end=128), b"\0" * 128),
        raw_weights(header_of([D_MODEL] * 2000, end=128), b"\0" * 128),
        raw_weights(b"{}"),
        raw_weights(b"[]"),
        raw_weights(b"null"),
        raw_weights(b"{" * 5000),
        raw_weights(b'{"a":' * 5000),
        raw_weights(b"\xff\xfe{}"),
        raw_weights(b"{}", size=1 << 63),
        raw_weights(b"{}", size=(1 << 64) - 1),
        raw_weights(b"{}", size=0),
        raw_weights({"__metadata__": {"x": 5}}),
        raw_weights({"__metadata__": {"format": "\ud800"}}),
        b"",
        b"\0" * 7,
        b"\x80\x04\x95",  # how a pickle begins
        b"PK\x03\x04",
    ],
)
def test_hostile_headers_of_the_weights_are_refused(data: bytes) -> None:
    assert load_files({**FILES["vector"], WEIGHTS: data}) is None


BITS = {
    4: ["F4"],
    6: ["F6_E2M3", "F6_E3M2"],
    8: ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"],
    16: ["I16", "U16", "F16", "BF16"],
    32: ["I32", "U32", "f32", ""],
    64: ["F64", "I64", "U64", "C64"],
    128: ["F128"],
}


@pytest.mark.parametrize(("dtype", "bits"), [(dtype, bits) for bits, dtypes in BITS.items() for dtype in dtypes])
def test_every_other_type_of_number_is_refused(dtype: str, bits: int) -> None:
    size = D_MODEL * bits // 8
    header = {
        f"layer.{layer}": {"dtype": dtype, "shape": [D_MODEL], "data_offsets": [place * size, (place + 1) * size]}
        for place, layer in enumerate((0, 3))
    }
    assert load_files({**FILES["vector"], WEIGHTS: raw_weights(header, b"\x01" * (2 * size))}) is None


def test_counts_that_the_weights_do_not_hold_are_refused_without_being_believed() -> None:
    for count in (0, -1, 3, 5, 1 << 40, 10**30, 4.0, "4", None, True):
        assert load_files(with_config("circuit", {**CONFIGS["circuit"], "n_neurons": count})) is None
    for layers in ([], [0], [0, 3, 3, 1], [3, 0, 7], list(range(100_000)), [0.0, 3], ["0", 3], {"0": 1}):
        assert load_files(with_config("vector", {**CONFIGS["vector"], "layers": layers})) is None
    for width in (31, 33, 1 << 40, -32):
        model = {**CONFIGS["vector"]["model"], "d_model": width}
        assert load_files(with_config("vector", {**CONFIGS["vector"], "model": model})) is None


# --- zip files -------------------------------------------------------------------------------------------------------


def zipped(members: list[tuple[str, bytes]], **named: Any) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", **named) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def unzip(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact | None:
    """Unpack in a folder of its own, and see that nothing was left there or beside it."""
    scratch = tmp_path / "deep" / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(scratch)
    found = check_loaded(lambda: unpack(data))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["deep", "deep/scratch"]
    return found


NAMES = [
    "../../{}", "../" * 12 + "{}", "/{}", "a/../../{}", "..\\..\\{}", "C:\\{}", "C:/{}", "a//b///{}",
    "./{}", "~/{}", "日本/{}", "a\nb/{}", "x" * 5000 + "/{}",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
def test_paths_in_a_zip_lead_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(name.format(file), data) for file, data in FILES["vector"].items()]
    unzip(zipped([*members, (name.format("evil.txt"), b"evil")]), tmp_path, monkeypatch)
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_in_a_zip_are_read_as_data_and_never_followed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path.parent / f"secret-{tmp_path.name}"
    secret.write_bytes(FILES["vector"][name])
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file, data in FILES["vector"].items():
            entry = zipfile.ZipInfo(file)
            if file == name:
                entry.create_system, entry.external_attr = 3, 0o120777 << 16
                data = str(secret).encode()
            archive.writestr(entry, data)
    assert unzip(buffer.getvalue(), tmp_path, monkeypatch) is None


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_of_two_artifacts_or_of_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = list(FILES["vector"].items())
    for odd in (
        [*members, *members],
        [*members, ("b/config.json", b"{}")],
        [],
        members[:1],
        [("config.json/", b"")],
        [("x", b"y")],
    ):
        assert unzip(zipped(odd), tmp_path, monkeypatch) is None


def test_folders_named_like_our_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("config.json/", b"")
        archive.writestr("weights.safetensors/", b"")
    assert unzip(buffer.getvalue(), tmp_path, monkeypatch) is None


def test_a_zip_of_very_many_files_or_bytes_is_refused_before_they_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    few = zipped([(f"{number}", b"") for number in range(1001 - len(FILES["vector"]))] + list(FILES["vector"].items()))
    entry = few[few.find(CENTRAL) : few.find(CENTRAL, few.find(CENTRAL) + 4)]
    at = few.find(CENTRAL)
    many = few[:at] + entry * 400_000 + few[at:]  # its directory is where the end says, counted from the end
    read: list[int] = []
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", lambda self: read.append(1))
    for data, words in ((few, "more than 1000 files"), (many, "files"), (b"x" * (26 << 20), "larger than 25 MB")):
        with pytest.raises(ArtifactError, match=words):
            unpack(data)
    assert read == []


@pytest.mark.parametrize("limit", [CONFIG, WEIGHTS, CARD])
def test_a_zip_bomb_is_refused_at_the_limit(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FILE_LIMITS", dict.fromkeys(FILES["vector"], 1 << 20))
    others = [(name, data) for name, data in FILES["vector"].items() if name != limit]
    bomb = zipped([*others, (limit, b"\0" * (64 << 20))], compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 200_000
    assert unzip(bomb, tmp_path, monkeypatch) is None


def test_the_weights_of_a_zip_may_not_be_larger_than_its_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small upload must not grow to what the limit for the largest model allows."""
    import tracemalloc

    padded = FILES["vector"][WEIGHTS] + b"\0" * (64 << 20)
    bomb = zipped([(name, padded if name == WEIGHTS else data) for name, data in FILES["vector"].items()],
                  compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    del padded
    tracemalloc.start()
    try:
        assert unzip(bomb, tmp_path, monkeypatch) is None
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """`data` with `value` at `offset` of every record that begins with `signature`."""
    changed, at = bytearray(data), data.find(signature)
    while at >= 0:
        changed[at + offset : at + offset + len(value)] = value
        at = data.find(signature, at + 4)
    return bytes(changed)


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


@pytest.mark.parametrize(
    ("signature", "offset", "value"),
    [
        (CENTRAL, 24, b"\xff\xff\xff\x7f"),  # declared size, too large
        (CENTRAL, 24, b"\0\0\0\0"),  # declared size, none
        (CENTRAL, 20, b"\xff\xff\xff\x7f"),  # declared compressed size
        (CENTRAL, 42, b"\xff\xff\xff\x7f"),  # where the member is
        (CENTRAL, 8, b"\x01\0"),  # encrypted
        (LOCAL, 6, b"\x01\0"),  # encrypted in the local header only
        (CENTRAL, 8, b"\x20\0"),  # patched data
        (CENTRAL, 8, b"\0\x08"),  # names in UTF-8
        (CENTRAL, 10, b"\x09\0"),  # a method nobody knows
        (CENTRAL, 10, b"\x0c\0"),  # bzip2, which it is not
        (CENTRAL, 10, b"\x0e\0"),  # LZMA, which it is not
        (CENTRAL, 10, b"\x08\0"),
        (CENTRAL, 10, b"\0\0"),
        (CENTRAL, 16, b"\x12\x34\x56\x78"),  # checksum
        (CENTRAL, 28, b"\xff\xff"),  # length of the name
        (CENTRAL, 30, b"\xff\xff"),  # length of the extra field
        (CENTRAL, 46, b"\xff\xfe"),  # the name itself
        (CENTRAL, 6, b"\xff\xff"),  # version needed
        (LOCAL, 26, b"\xff\xff"),
        (LOCAL, 30, b"\0\0"),
        (END, 8, b"\xff\xff\xff\xff"),  # number of members
        (END, 12, b"\xff\xff\xff\x7f"),  # size of the directory
        (END, 16, b"\xff\xff\xff\xff"),  # where the directory is
        (END, 20, b"\xff\xff"),  # length of the comment
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_lying_records_of_a_zip_never_surprise(
    signature: bytes, offset: int, value: bytes, compression: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = zipped(list(FILES["vector"].items()), compression=compression)
    unzip(patched(whole, signature, offset, value), tmp_path, monkeypatch)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_a_zip_never_surprise(
    compression: int, flips: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(zipped(list(FILES["circuit"].items()), compression=compression))
    for place, value in flips:
        data[place % len(data)] = value
    unzip(bytes(data), tmp_path, monkeypatch)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_cut_at_any_point_is_refused(compression: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zipped(list(FILES["vector"].items()), compression=compression)
    for cut in range(0, len(data), max(1, len(data) // 60)):
        assert unzip(data[:cut], tmp_path, monkeypatch) is None
    assert unzip(data, tmp_path, monkeypatch) is not None


@FUZZ
@given(data=st.binary(max_size=200))
def test_random_bytes_are_no_zip(data: bytes) -> None:
    for made in (data, LOCAL + data, data + END + b"\0" * 18, CENTRAL + data + END + b"\0" * 18):
        assert check_loaded(lambda made=made: unpack(made)) is None


def test_a_path_to_no_zip_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.zip", tmp_path):
        with pytest.raises(ArtifactError) as error:
            unpack(path)
        one_line(str(error.value))


def test_an_artifact_of_a_zip_is_held_against_the_model_like_any_other() -> None:
    from dataclasses import replace

    from neurosteer.artifacts.artifact import check_model

    unpacked = unpack(pack(ARTIFACTS["circuit"]))
    with pytest.raises(MismatchError):
        check_model(unpacked, replace(unpacked.model, d_mlp=65))
    assert "other weights" in (check_model(unpacked, replace(unpacked.model, fingerprint="00")) or "")
