"""Artifacts on disk: a folder of `config.json`, `weights.safetensors` and a card. Loading one never runs code."""

import io
import json
import lzma
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import EVALUATION_PLOT, is_generated, render_card
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.config import SCHEMA_VERSION, artifact_data, artifact_of, expected_shapes, tensors_of
from neurosteer.artifacts.metadata import CARD_FILE
from neurosteer.artifacts.plots import receipt_plot
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError
from neurosteer.text import error_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"

_MAX_CONFIG_BYTES = 2 << 20  # 1,000 SAE features with the places where they fire; others take 10 to 100 kB
_MAX_CONFIG_VALUES = 50_000  # a value may take up to 200 bytes, however short its text is
_MAX_ZIP_BYTES = 25 << 20
_MAX_ZIP_FILES = 1000
_MAX_WEIGHTS_BYTES = 64 << 20  # 80 layers of 8,192 dimensions need 3 MB
_MAX_CARD_BYTES = 4 << 20
FILE_LIMITS = {CONFIG_FILE: _MAX_CONFIG_BYTES, WEIGHTS_FILE: _MAX_WEIGHTS_BYTES, CARD_FILE: _MAX_CARD_BYTES}
"""The files of an artifact, and the bytes up to which each is read."""

_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    RuntimeError,
    NotImplementedError,
    EOFError,
    ValueError,
    IndexError,
    struct.error,
)


def save(artifact: Artifact, folder: str | Path) -> Path:
    """Write `artifact` to `folder`, whole or not at all, and return the folder.

    An artifact that is there already is replaced; a card that somebody edited and other files beside it are kept. The
    last receipt that can be drawn is, as `evaluation.png`.

    Raises `ArtifactError` when `folder` holds something else or cannot be written.
    """
    target = check_target(folder)
    plots = (receipt_plot(receipt.data) for receipt in reversed(artifact.receipts))
    plot = next((plot for plot in plots if plot is not None), None)
    card = _card_to_write(artifact, target, () if plot is None else (EVALUATION_PLOT,))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:80]}-"))
        try:
            _keep_other_files(target, temporary)
            _write(artifact, card, temporary)
            if plot is not None:
                (temporary / EVALUATION_PLOT).write_bytes(plot)
            _replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"{str(target)!r} could not be written ({error.strerror or error}); nothing was changed."
        ) from error
    return target


def check_target(folder: str | Path) -> Path:
    """The folder as an absolute path that `save` can write to: not there, empty, or an artifact. Raises
    `ArtifactError`."""
    target = _path(folder)
    present = _present(target)
    if present.exists() and (not present.is_dir() or (any(present.iterdir()) and not is_artifact(present))):
        raise ArtifactError(f"{str(target)!r} exists and is no artifact; choose another folder.")
    return target


def load(folder: str | Path) -> Artifact:
    """Read an artifact from `folder`.

    Raises `ArtifactError` naming the file and what is wrong with it: missing, damaged, of another schema, not finite.
    """
    path = _present(_path(folder))
    if not path.is_dir():
        raise ArtifactError(f"There is no artifact folder {str(folder)[:300]!r}; check the path.")
    config = _read_config(path / CONFIG_FILE)
    tensors = _read_tensors(path / WEIGHTS_FILE, expected_shapes(config, path / CONFIG_FILE))
    return artifact_of(config, tensors, path / CONFIG_FILE)


def is_artifact(folder: str | Path) -> bool:
    """Whether `folder` looks like an artifact (it holds the two files every artifact has)."""
    return (Path(folder) / CONFIG_FILE).is_file() and (Path(folder) / WEIGHTS_FILE).is_file()


def pack(artifact: Artifact) -> bytes:
    """The artifact as a zip file with one folder of its name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(artifact, Path(temporary) / artifact.name)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"{artifact.name}/{file.name}")
    return buffer.getvalue()


def unpack(data: bytes | Path) -> Artifact:
    """The artifact in a zip file, read without writing any path the zip names. Raises `ArtifactError`."""
    try:
        data = _zip_bytes(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive, tempfile.TemporaryDirectory() as temporary:
            for name, member in _members(archive).items():
                _extract(archive, member, Path(temporary) / name, FILE_LIMITS[name])
            return load(temporary)
    except _ZIP_ERRORS as error:
        raise ArtifactError(
            f"The upload is not a zip file that can be read ({error_line(error)}); zip an artifact's folder."
        ) from error


def _zip_bytes(data: bytes | Path) -> bytes:
    """The zip's bytes, unless listing what it holds would cost much already."""
    if (len(data) if isinstance(data, bytes) else data.stat().st_size) > _MAX_ZIP_BYTES:
        raise ArtifactError(f"The zip is larger than {_MAX_ZIP_BYTES >> 20} MB; zip the folder of one artifact.")
    data = data if isinstance(data, bytes) else data.read_bytes()
    if data.count(b"PK\x01\x02") > _MAX_ZIP_FILES:  # every file's entry begins with it
        raise ArtifactError(f"The zip holds more than {_MAX_ZIP_FILES} files; zip the folder of one artifact.")
    return data


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Our files by their bare names, wherever the zip keeps them; everything else in it is ignored."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.replace("\\", "/").rsplit("/", 1)[-1]
        if name in FILE_LIMITS and name in found:
            raise ArtifactError(f"The zip holds {name} twice; zip the folder of one artifact.")
        if name in FILE_LIMITS:
            found[name] = member
    for needed in (CONFIG_FILE, WEIGHTS_FILE):
        if needed not in found:
            raise ArtifactError(f"The zip holds no {needed}; zip the folder of one artifact.")
    return found


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, limit: int) -> None:
    """In small pieces: what a zip says of its sizes is not to be believed."""
    written = 0
    with archive.open(member) as source, target.open("wb") as file:
        while piece := source.read(1 << 18):
            written += len(piece)
            if written > limit:
                raise ArtifactError(f"{target.name} in the zip is larger than {limit >> 20} MB.")
            file.write(piece)


# --- writing ---------------------------------------------------------------------------------------------------------


def _path(folder: str | Path) -> Path:
    """`folder` as an absolute path that the file system can be asked about."""
    try:
        path = Path(folder).expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, NUL in it, an unknown ~user
        raise ArtifactError(f"{str(folder)[:100]!r} is no folder's name ({error_line(error)}).") from error
    if not path.name:
        raise ArtifactError(f"{str(folder)!r} cannot hold an artifact; name a folder of its own.")
    return path


def _present(target: Path) -> Path:
    """`target`, or where a save that was cut between its two renames left the old artifact."""
    previous = _previous(target)
    return previous if not target.exists() and previous.is_dir() else target


def _card_to_write(artifact: Artifact, target: Path, plots: Sequence[str]) -> bytes:
    """A fresh card, unless the one that is there differs from what we wrote: then somebody's edits are kept."""
    fresh, present = render_card(artifact, plots=plots).encode(), _present(target)
    if not present.exists():
        return fresh
    existing = present / CARD_FILE
    if not existing.is_file():
        return fresh
    card = existing.read_bytes()
    return fresh if is_generated(card.decode(errors="replace")) else card


def _keep_other_files(target: Path, new: Path) -> None:
    """Copy what else lies beside an artifact (pictures, a repository's own files)."""
    present = _present(target)
    for entry in present.iterdir() if present.is_dir() else ():
        if entry.name in FILE_LIMITS or entry.name == EVALUATION_PLOT:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _write(artifact: Artifact, card: bytes, folder: Path) -> None:
    config = json.dumps(artifact_data(artifact), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if len(config.encode()) > _MAX_CONFIG_BYTES or _n_values(config) > _MAX_CONFIG_VALUES:
        raise ArtifactError(
            f"{artifact.name!r} holds {len(config) / 1e6:.1f} MB of parameters, features and receipts, more than "
            f"{_MAX_CONFIG_BYTES >> 20} MB or {_MAX_CONFIG_VALUES:,} values, and could not be loaded again; keep fewer."
        )
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    save_file(tensors_of(artifact), folder / WEIGHTS_FILE)
    (folder / CARD_FILE).write_bytes(card)
    folder.chmod(0o755)
    for name in FILE_LIMITS:
        (folder / name).chmod(0o644)
        with (folder / name).open("rb") as opened:
            os.fsync(opened.fileno())


def _replace(new: Path, target: Path) -> None:
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    new.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name[:200]}.previous")


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(f"{path.parent} holds no {CONFIG_FILE}; it is not an artifact.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ArtifactError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MB; an artifact's is a few kB.")
    try:
        text = path.read_text(encoding="utf-8")
        if _n_values(text) > _MAX_CONFIG_VALUES:
            raise ArtifactError(
                f"{path} holds more than {_MAX_CONFIG_VALUES:,} values; an artifact's are a few hundred."
            )
        config = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error_line(error)}); fetch the artifact again.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds a {type(config).__name__}; an artifact's is an object.")
    version = config.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema version {version!r:.40}; this NeuroSteer reads {SCHEMA_VERSION}.")
    if config.get("kind") not in (SteeringVector.kind, NeuronCircuit.kind):
        raise ArtifactError(
            f"{path} is of kind {config.get('kind')!r:.40}; known are {SteeringVector.kind} and {NeuronCircuit.kind}."
        )
    return config


def _n_values(text: str) -> int:
    """At least as many as there are values in `text`, which is JSON: known before it is parsed."""
    return sum(text.count(mark) for mark in "[{,")


def _read_tensors(path: Path, expected: Mapping[str, tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, its header held against `expected` before any of them is read."""
    if not path.is_file():
        raise ArtifactError(f"{path.parent} holds no {WEIGHTS_FILE}; fetch the artifact again.")
    if path.stat().st_size > _MAX_WEIGHTS_BYTES:
        raise ArtifactError(f"{path} is larger than {_MAX_WEIGHTS_BYTES >> 20} MB.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                odd = sorted(names.symmetric_difference(expected))[:3]
                raise ArtifactError(
                    f"{path} does not match {CONFIG_FILE}: tensors {', '.join(map(repr, odd))[:200]} differ."
                )
            for name, (_, shape) in expected.items():
                found = file.get_slice(name).get_shape()
                if found != shape:
                    raise ArtifactError(f"{path}: {name} has shape {found}; {CONFIG_FILE} says {shape}.")
            return {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error_line(error)}); fetch the artifact again.") from error
