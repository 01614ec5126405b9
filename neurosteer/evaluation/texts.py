"""Writing the texts of an evaluation, a part at a time, so that work which was cut goes on where it was.

In the folder, `texts/SETTINGS/PART.json` holds the texts of a part; SETTINGS begins the SHA-256 of all that the texts
depend on. A part's file gets its name when it is whole, so one that is there is whole.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from neurosteer import processes
from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import Cancelled, UsageError
from neurosteer.evaluation.controls import Group
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

TEXTS_FOLDER = "texts"
_KEPT = ("prompt", "strength", "sample", "text", "ids", "finish")  # the first three for people who read the file
PART_ROWS = 128
"""Texts that decode together. Always the same ones, whether work was cut or not: in bfloat16, what decodes beside a
text can show in its rare last bits."""


@dataclass(frozen=True)
class TextPlan:
    """What is to be written: every prompt, `samples` times, in every group."""

    groups: tuple[Group, ...]
    prompts: tuple[str, ...]
    samples: int
    max_new_tokens: int
    sampling: Sampling

    @property
    def rows(self) -> list[Row]:
        """Groups outermost, then prompts, then samples."""
        return [
            Row(
                group.ask(prompt),
                group.recipes[group.turn(place, sample)],
                sample + self.samples * group.again,
                group.strength,
            )
            for group in self.groups
            for place, prompt in enumerate(self.prompts)
            for sample in range(self.samples)
        ]

    def sha256(self, lm: LanguageModel) -> str:
        """A hash of all that the texts depend on: the model, the prompts as it reads them (with its chat template and
        whatever that prints), recipes and sampling."""
        groups = [
            [group.kind, group.strength, *map(_recipe_data, group.recipes), self._asked(lm, group.instruction)]
            for group in self.groups
        ]
        model = [lm.name, lm.fingerprint, str(lm.dtype), lm.chat]
        content = [model, groups, self.prompts, self.samples, self.max_new_tokens, vars(self.sampling), PART_ROWS]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()

    def _asked(self, lm: LanguageModel, instruction: str) -> list[list[int]]:
        group = Group("instruction", 0.0, instruction=instruction)
        return [lm.prompt_ids(group.ask(prompt)) for prompt in self.prompts]


def write_texts(
    lm: LanguageModel,
    plan: TextPlan,
    *,
    out: Path | None,
    progress: Progress,
    cancel: threading.Event | None,
) -> list[Row]:
    """All rows with their texts. Raises `Cancelled` after the step under way; parts finished by then stay in `out`."""
    rows = plan.rows
    parts = {first: rows[first : first + PART_ROWS] for first in range(0, len(rows), PART_ROWS)}
    settings = plan.sha256(lm)
    kept = processes.agreed(lambda: _kept_parts(out, settings, parts))
    missing = [first for first in parts if first not in kept]
    writer = partial(_write_part, lm, plan, parts, progress, cancel)
    for start in range(0, len(missing), processes.count()):  # one part each
        turn = missing[start : start + processes.count()]
        written = processes.shared_out(turn, lambda mine: [writer(first) for first in mine])
        if cancel is not None and cancel.is_set():
            what = f"{turn[0]} of {len(rows)} texts are kept in {str(out)[:200]!r}" if out else "no text is kept"
            raise Cancelled(f"The evaluation was cancelled; {what}.")
        for first, some in zip(turn, written, strict=True):
            kept[first] = some
            if out is not None and processes.rank() == 0:
                _Store(out, settings).write(first, some)
    return [row for first in parts for row in kept[first]]


def _kept_parts(out: Path | None, settings: str, parts: Mapping[int, Sequence[Row]]) -> dict[int, list[Row]]:
    """What was written before, by where it begins."""
    if out is None:
        return {}
    store = _Store(out, settings)
    read = {first: store.read(first, rows) for first, rows in parts.items()}
    return {first: rows for first, rows in read.items() if rows}


def _write_part(
    lm: LanguageModel,
    plan: TextPlan,
    parts: Mapping[int, Sequence[Row]],
    progress: Progress,
    cancel: threading.Event | None,
    first: int,
) -> list[Row]:
    rows, total = parts[first], sum(map(len, parts.values()))
    progress(f"Writing texts {first + 1} to {first + len(rows)} of {total}", first / total)
    return Session(lm).generate(
        rows, max_new_tokens=plan.max_new_tokens, sampling=plan.sampling, batch_rows=PART_ROWS, cancel=cancel
    )


class _Store:
    """The parts of one evaluation in a folder. Raises `UsageError` where it cannot be read or written."""

    def __init__(self, out: Path, settings: str) -> None:
        self.settings, self.folder = settings, out / TEXTS_FOLDER / settings[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from error

    def read(self, first: int, rows: Sequence[Row]) -> list[Row]:
        """`rows` with their texts; empty where their part is not there, or is none of ours."""
        try:
            content = self._file(first).read_bytes() if self._file(first).exists() else b""
        except OSError as error:
            raise self._refusal(error) from error
        try:
            data = json.loads(content)
            if data["settings"] != self.settings or len(data["texts"]) != len(rows):
                return []
            return [_filled(row, **one) for row, one in zip(rows, data["texts"], strict=True)]
        except (ValueError, TypeError, KeyError, RecursionError):
            return []

    def write(self, first: int, rows: Sequence[Row]) -> None:
        texts = [{key: getattr(row, key) for key in _KEPT} for row in rows]
        content = json.dumps({"settings": self.settings, "texts": texts}, ensure_ascii=False)
        file = self._file(first)
        temporary = file.with_name(f".{file.name}.new")
        try:
            with temporary.open("wb") as opened:
                opened.write(content.encode(errors="surrogatepass"))
                opened.flush()
                os.fsync(opened.fileno())
            temporary.replace(file)
        except OSError as error:
            raise self._refusal(error) from error

    def _file(self, first: int) -> Path:
        return self.folder / f"{first // PART_ROWS:04}.json"

    def _refusal(self, error: OSError) -> UsageError:
        reason = error.strerror or error
        return UsageError(f"{str(self.folder)[:300]!r} cannot be used ({reason}); choose another folder.")


def _filled(row: Row, *, text: str, ids: list[int], finish: str, **_: Any) -> Row:
    if not isinstance(text, str) or not all(type(token) is int for token in ids):
        raise TypeError("not a text as it is written here")
    return replace(row, text=text, ids=tuple(ids), tokens=len(ids), finish=finish)


def _recipe_data(recipe: Recipe) -> list[Any]:
    return [
        [_artifact_sha256(use.artifact), use.artifact.operation, use.amount, use.share, use.strength]
        for use in recipe.uses
    ]


def _artifact_sha256(artifact: Artifact) -> str:
    """A hash of the numbers that steer."""
    digest = hashlib.sha256()
    if isinstance(artifact, SteeringVector):
        for layer in artifact.layers:
            digest.update(f"{layer} {artifact.norms[layer]!r}".encode())
            digest.update(artifact.directions[layer].numpy(force=True).tobytes())
            if layer in artifact.encoders:
                encoder = artifact.encoders[layer]
                digest.update(f"{encoder.bias!r} {encoder.threshold!r} {encoder.centred}".encode())
                digest.update(encoder.weights.numpy(force=True).tobytes())
        return digest.hexdigest()
    for tensor in (artifact.neuron_layers, artifact.neurons, artifact.differences):
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()
