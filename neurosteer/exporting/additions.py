"""One constant a layer, in files: control vectors of llama.cpp (GGUF) and safetensors of layers.

Tensors are float32 `[d_model]` by layer, counted from 0, and are added to the residual stream after that block. In a
GGUF file the one of layer L is called `direction.L`: llama.cpp adds it after block L, too, and refuses L = 0.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurosteer.errors import ArtifactError
from neurosteer.text import error_line, shown

ARCHITECTURE = "controlvector"
TENSORS_FORMAT = "neurosteer-layers"
ACTIVATIONS_FILE = "layer_activations.safetensors"

_ADDED = "to the residual stream after the block of that number, counted from 0, at every token"
_MAX_BYTES = 64 << 20  # 80 layers of 8,192 dimensions need 3 MB
_MAX_LAYERS = 4096
_DIRECTION = re.compile(r"direction\.([0-9]{1,4})")
_LAYER = re.compile(r"(?:[A-Za-z_.]{0,60}[._])?([0-9]{1,4})")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_STEERING_VECTORS_README = """\
Made by NeuroSteer for the package `steering-vectors`; the strength is in it already (multiplier 1).

```python
from safetensors.torch import load_file
from steering_vectors import SteeringVector
vector = SteeringVector({int(layer): one for layer, one in load_file("layer_activations.safetensors").items()})
```

Then `with vector.apply(model): model.generate(...)`.
"""


# --- writing ---------------------------------------------------------------------------------------------------------


def write_control_vector(
    path: Path, additions: Mapping[int, Tensor], model_type: str, about: Mapping[str, str]
) -> None:
    """A control vector as llama.cpp and repeng read it; `model_type` is transformers' name of the architecture."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string("general.description", about["recipe"])
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(additions))
    for layer, addition in sorted(additions.items()):
        writer.add_tensor(f"direction.{layer}", addition.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensors(path: Path, additions: Mapping[int, Tensor], about: Mapping[str, str]) -> None:
    """Safetensors whose names are the layers' numbers; `about` is in its metadata."""
    named = {str(layer): addition.contiguous() for layer, addition in sorted(additions.items())}
    save_file(named, path, {**about, "added": _ADDED, "format": TENSORS_FORMAT})


def write_steering_vectors(folder: Path, additions: Mapping[int, Tensor], about: Mapping[str, str]) -> None:
    """Tensors by layer, and the lines that make the peer's object of them: its own files are pickles."""
    folder.mkdir()
    write_tensors(folder / ACTIVATIONS_FILE, additions, about)
    (folder / "README.md").write_text(_STEERING_VECTORS_README, encoding="utf-8")


# --- reading ---------------------------------------------------------------------------------------------------------


def is_control_vector(path: Path) -> bool:
    """Whether `path` is a GGUF file with a control vector in it."""
    try:
        return _starts_as_gguf(path) and bool(read_control_vector(path))
    except ArtifactError:
        return False


def is_layer_tensors(path: Path) -> bool:
    """Whether `path` is a file that `write_tensors` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == TENSORS_FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def read_additions(path: str | Path) -> dict[int, Tensor]:
    """The tensors of a control vector or of a safetensors file whose names end in a layer's number, float32 `[d]`.

    Raises `ArtifactError` naming the file and what is wrong with it. A pickle is never loaded.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"There is no file {str(path)[:300]!r}; check the path.")
    if file.stat().st_size > _MAX_BYTES:
        raise ArtifactError(f"{file} is larger than {_MAX_BYTES >> 20} MB; a vector a layer is a few MB.")
    if _starts_as_gguf(file):
        found = read_control_vector(file)
    elif file.suffix.lower() in _PICKLES or _starts_with(file, b"PK"):
        raise ArtifactError(
            f"{file} is a pickle, which can run code when it is read, so it is not; write its tensors by layer with "
            "safetensors.torch.save_file({str(layer): tensor, ...}) where you trust it."
        )
    else:
        found = read_tensors(file)
    return {layer: _checked(file, layer, tensor) for layer, tensor in sorted(found.items())}


def read_control_vector(path: Path) -> dict[int, Tensor]:
    """The directions of a control vector by layer. Raises `ArtifactError`."""
    from gguf import GGMLQuantizationType, GGUFReader

    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    try:
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field is not None else None
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        kept = {name: np.array(one.data) for name, one in tensors.items() if one.tensor_type in plain}
    except Exception as error:  # the reader believes what a damaged file says of itself, and fails in many ways
        raise ArtifactError(f"{path} is no GGUF file that can be read ({error_line(error)}).") from error
    if architecture != ARCHITECTURE:
        raise ArtifactError(
            f"{path} is a GGUF file of architecture {shown(architecture)}; a control vector's is {ARCHITECTURE!r}."
        )
    if len(kept) != len(tensors):
        raise ArtifactError(f"{path} holds tensors that are packed; a control vector's are float32 or float16.")
    return _by_layer(path, _DIRECTION, {name: torch.from_numpy(one) for name, one in kept.items()})


def read_tensors(path: Path) -> dict[int, Tensor]:
    """The tensors of a safetensors file by layer. Raises `ArtifactError`."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > _MAX_LAYERS:
                raise ArtifactError(f"{path} holds {len(names)} tensors; a file of vectors has one a layer.")
            return _by_layer(path, _LAYER, {name: file.get_tensor(name) for name in names})
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is neither a control vector (GGUF) nor safetensors ({error_line(error)}); pickles are not read."
        ) from error


def _by_layer(path: Path, pattern: re.Pattern[str], named: Mapping[str, Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for name, tensor in named.items():
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) in found:
            raise ArtifactError(
                f"{path} has a tensor {shown(name)}, which names no layer or one twice; write direction.12 (GGUF) or "
                "12 (safetensors)."
            )
        found[int(match[1])] = tensor
    if not found:
        raise ArtifactError(f"{path} holds no tensors; a file of vectors has one a layer.")
    return found


def _checked(path: Path, layer: int, tensor: Tensor) -> Tensor:
    if tensor.dim() != 1 or not tensor.is_floating_point():
        raise ArtifactError(
            f"{path}: the tensor of layer {layer} is {tensor.dtype} {list(tensor.shape)}; it must be one vector."
        )
    found = tensor.float().contiguous()
    if not found.isfinite().all() or not found.any():
        raise ArtifactError(f"{path}: the vector of layer {layer} is zero or not finite; it has no direction.")
    return found


def _starts_as_gguf(path: Path) -> bool:
    return _starts_with(path, b"GGUF")


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def about(recipe_text: str, model: str, revision: str | None, version: str) -> dict[str, str]:
    """What a file says of itself, as texts."""
    return {
        "recipe": recipe_text,
        "model": model,
        "revision": revision or "",
        "made_by": f"neurosteer {version}",
    }
