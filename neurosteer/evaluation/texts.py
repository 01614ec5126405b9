"""Writing the texts of an evaluation, a part at a time, so that work which was cut goes on where it was.

`texts.jsonl` in the folder holds a line per text; every part that is finished is appended at once. Lines belong to
the settings whose SHA-256 they name: those of other settings stay, and count for nothing here.
"""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import Cancelled, UsageError
from neurosteer.evaluation.controls import Group
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

TEXTS_FILE = "texts.jsonl"
PART_ROWS = 128
"""Texts that decode together. Always the same ones, whether work was cut or not: in bfloat16, what decodes beside a
text can show in its rare last bits."""

_BEGINNING = b'{"settings": '


@dataclass(frozen=True)
class Writing:
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
            Row(group.ask(prompt), group.recipes[group.turn(place, sample)], sample, group.strength)
            for group in self.groups
            for place, prompt in enumerate(self.prompts)
            for sample in range(self.samples)
        ]

    def sha256(self, lm: LanguageModel) -> str:
        """A hash of all that the texts depend on."""
        groups = [
            [group.kind, group.strength, group.instruction, *map(_recipe_data, group.recipes)] for group in self.groups
        ]
        sampling = vars(self.sampling)
        model: list[Any] = [lm.name, lm.fingerprint, str(lm.dtype), lm.chat]
        model += [dict(lm.template_options)] if lm.template_options else []
        content = [model, groups, self.prompts, self.samples, self.max_new_tokens, sampling, PART_ROWS]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def write_texts(
    lm: LanguageModel,
    writing: Writing,
    *,
    out: Path | None,
    progress: Progress,
    cancel: threading.Event | None,
) -> list[Row]:
    """All rows with their texts. Raises `Cancelled` after the step under way; parts finished by then stay in `out`."""
    rows = writing.rows
    store = _Store(out, writing.sha256(lm)) if out is not None else None
    known = store.open(len(rows)) if store else {}
    session = Session(lm)
    done: list[Row] = []
    for first in range(0, len(rows), PART_ROWS):
        part = rows[first : first + PART_ROWS]
        places = range(first, first + len(part))
        if all(place in known for place in places):
            done += [_filled(row, known[place]) for row, place in zip(part, places, strict=True)]
            continue
        progress(f"Writing texts {first + 1} to {first + len(part)} of {len(rows)}", first / len(rows))
        written = session.generate(
            part,
            max_new_tokens=writing.max_new_tokens,
            sampling=writing.sampling,
            batch_rows=PART_ROWS,
            cancel=cancel,
        )
        if cancel is not None and cancel.is_set():
            kept = f"{first} of {len(rows)} texts are kept in {str(out)[:200]!r}" if out else "no text is kept"
            raise Cancelled(f"The evaluation was cancelled; {kept}.")
        if store:
            store.append(first, written)
        done += written
    return done


class _Store:
    """`texts.jsonl` in a folder. Raises `UsageError` where it cannot be read or written."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.path, self.settings = folder / TEXTS_FILE, settings

    def open(self, n_rows: int) -> dict[int, dict[str, Any]]:
        """The texts of finished parts, by their place. Lines of parts that were cut are taken out of the file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            found = [(line, _parsed(line)) for line in lines]
            mine = {data["place"]: data for _, data in found if data is not None and self._is_mine(data, n_rows)}
            whole = {place for place in mine if all(other in mine for other in _part_of(place, n_rows))}
            kept = [line for line, data in found if self._stays(line, data, whole)]
            if kept and not kept[-1].endswith(b"\n"):
                kept[-1] += b"\n"
            if kept != lines:
                _write_anew(self.path, b"".join(kept))
        except OSError as error:
            raise self._refusal(error) from error
        return {place: mine[place] for place in whole}

    def append(self, first: int, rows: Sequence[Row]) -> None:
        lines = [self._line(first + number, row) for number, row in enumerate(rows)]
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refusal(error) from error

    def _line(self, place: int, row: Row) -> bytes:
        data = {
            "settings": self.settings,
            "place": place,
            "prompt": row.prompt,
            "strength": row.strength,
            "sample": row.sample,
            "text": row.text,
            "ids": list(row.ids),
            "finish": row.finish,
        }
        return json.dumps(data, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"

    def _is_mine(self, data: dict[str, Any], n_rows: int) -> bool:
        place, ids = data.get("place"), data.get("ids")
        is_text = isinstance(data.get("text"), str) and isinstance(data.get("finish"), str)
        is_ids = isinstance(ids, list) and all(type(token) is int for token in ids)
        return data["settings"] == self.settings and type(place) is int and 0 <= place < n_rows and is_text and is_ids

    def _stays(self, line: bytes, data: dict[str, Any] | None, whole: set[int]) -> bool:
        """What is not known to be left of cut work stays, whoever wrote it."""
        if data is None:
            return line.endswith(b"\n") or not line.startswith(_BEGINNING)
        return data["settings"] != self.settings or data.get("place") in whole

    def _refusal(self, error: OSError) -> UsageError:
        reason = error.strerror or error
        return UsageError(f"{str(self.path)[:300]!r} cannot be used ({reason}); choose another folder.")


def _part_of(place: int, n_rows: int) -> range:
    first = place // PART_ROWS * PART_ROWS
    return range(first, min(first + PART_ROWS, n_rows))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The line's object, or None where it was cut or is none of ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("settings"), str) else None


def _write_anew(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def _filled(row: Row, data: dict[str, Any]) -> Row:
    ids = tuple(data["ids"])
    return replace(row, text=data["text"], ids=ids, tokens=len(ids), finish=data["finish"])


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
