"""Recipes to text: batched, steered, streamed generation."""

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import UNSTEERED, Positions, Recipe, check_recipes_fit
from neurosteer.errors import UsageError
from neurosteer.models.framing import Prompt
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.steering.batches import Batch, RowInFlight
from neurosteer.steering.decoding import RowText, Sampler, Sampling
from neurosteer.steering.plans import check_recipes
from neurosteer.validation import check_count, check_positions

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 4096
MAX_BATCH_ROWS = 4096
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Row:
    """One text to write: a prompt, a recipe, and a number that tells samples of the same prompt apart.

    `strength` is what the recipe was scaled by, for tables; `text` and the rest are filled in by generation:
    `tokens` counts the new tokens, whose ids are `ids`; `finish` is `stop`, `length` or `cancelled`.
    """

    prompt: Prompt
    recipe: Recipe = UNSTEERED
    sample: int = 0
    strength: float = 0.0
    text: str = ""
    tokens: int = 0
    finish: str = ""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """What one decoding step added: `pieces[i]` is the new text of row `first + i`, often empty.

    On a model that several callers share, `waiting` says how many requests come before this one, as long as its rows
    have no place yet.
    """

    first: int
    pieces: tuple[str, ...]
    waiting: int | None = None


@dataclass(frozen=True)
class Options:
    """How rows are written; as for `Session.stream`. Raises `UsageError` for one out of its range."""

    max_new_tokens: int
    sampling: Sampling
    positions: Positions
    raw: bool

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        check_positions(self.positions)


@dataclass(frozen=True)
class Begun:
    """A row to write, and its text under way."""

    row: Row
    writing: RowInFlight

    @property
    def filled(self) -> Row:
        """The row with what is written by now."""
        text = self.writing.text
        ended = "stop" if text.stopped else "length"
        finish = ended if self.writing.ended else "cancelled"
        return replace(self.row, text=text.text, tokens=len(text.ids), finish=finish, ids=tuple(text.ids))


Decode = Callable[[int, Sequence[RowInFlight]], Generator[Step, None, None]]
"""Writes texts until they have ended or it is told to stop, a step at a time; the first is row number `first`."""


class Writer:
    """What every session makes of its stream."""

    def stream(self, *arguments: Any, **options: Any) -> Generator[Step, None, list[Row]]:
        raise NotImplementedError

    def generate(self, rows: Sequence[Row] | Prompt, recipe: Recipe = UNSTEERED, **options: Any) -> list[Row]:
        """All rows with their texts filled in. Options as for `stream`.

        `rows` may also be one prompt, which is written once under `recipe`.
        """
        return drained(self.stream(rows, recipe, **options))

    def sweep(
        self,
        uses: Recipe | Artifact,
        strengths: Sequence[float],
        prompts: Sequence[Prompt],
        *,
        samples: int = 1,
        **options: Any,
    ) -> list[Row]:
        """Every prompt × sample at every strength (a factor on all strengths of the recipe), batched.

        The same prompt and sample share their random numbers across strengths. Options as for `stream`.
        """
        recipe = uses if isinstance(uses, Recipe) else Recipe.of(uses)
        return self.generate(sweep_rows(recipe, strengths, prompts, samples=samples), **options)


class Session(Writer):
    """Generates with one model. Holds no state of a call; safe to use from several threads at once."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._warned: set[str] = set()

    def stream(
        self,
        rows: Sequence[Row] | Prompt,
        recipe: Recipe = UNSTEERED,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        positions: Positions = "all",
        raw: bool = False,
        use_cache: bool = True,
        batch_rows: int = _BATCH_ROWS,
        cancel: threading.Event | None = None,
        progress: Progress = silent,
    ) -> Generator[Step, None, list[Row]]:
        """Write all rows, `batch_rows` at a time decoding together; yields every step and returns the filled rows.

        The work is done in the calling thread, a step for each item asked for. Setting `cancel` ends it after the step
        under way; the texts so far are kept.

        Raises:
            UsageError: an option out of its range, a prompt that is too long for the model, a strength beyond what the
                model's dtype can hold; or, after the other rows, one that was pushed to where the model's scores are no
                longer finite.
            MismatchError: an artifact was made on a model of another shape.
        """
        check_count("batch_rows", batch_rows, 1, MAX_BATCH_ROWS)
        begun = self.begin(rows, recipe, Options(max_new_tokens, sampling or Sampling(), positions, raw))

        def decode(first: int, writings: Sequence[RowInFlight]) -> Generator[Step, None, None]:
            """In the consumer's own thread, a step for each time it asks.

            Hooks are on the model only while a step runs: a consumer that pauses, leaves, or goes on in another
            thread leaves nothing behind. (Where other threads use the maths library too, a step takes longer.)
            """
            batch = Batch(self.lm, writings, use_cache=use_cache)
            while not batch.ended and not is_set(cancel):
                pieces = batch.step()
                yield Step(first, tuple(pieces.get(writing, "") for writing in writings))

        return (yield from in_parts(begun, batch_rows, decode, cancel, progress))

    def begin(self, rows: Sequence[Row] | Prompt, recipe: Recipe, options: Options) -> list[Begun]:
        """The rows, checked, with their prompts as tokens. Raises as `stream` does."""
        todo = _as_rows(rows, recipe)
        recipes = [row.recipe for row in todo]
        for warning in check_recipes_fit(recipes, self.lm.reference):
            if warning not in self._warned:
                self._warned.add(warning)
                logger.warning(warning)
        check_recipes(self.lm, recipes)
        prompts = [self._prompt_ids(row.prompt, options) for row in todo]
        return [self._begun(row, ids, options) for row, ids in zip(todo, prompts, strict=True)]

    def _prompt_ids(self, prompt: Prompt, options: Options) -> list[int]:
        ids = self.lm.prompt_ids(prompt, raw=options.raw) if prompt else []
        if not ids:
            raise UsageError("The prompt is empty; write at least one character.")
        limit = self.lm.max_positions
        if limit is not None and len(ids) + options.max_new_tokens > limit:
            raise UsageError(
                f"A prompt of {len(ids)} tokens and {options.max_new_tokens} new ones exceed the {limit} tokens of "
                f"{self.lm.name}; shorten the prompt or ask for fewer."
            )
        return ids

    def _begun(self, row: Row, prompt: list[int], options: Options) -> Begun:
        # The same prompt and sample draw the same random numbers under every recipe and in every batch.
        sampler = Sampler(options.sampling, f"{row.prompt}/{row.sample}")
        text = RowText(self.lm.tokenizer, stop_ids(self.lm))
        return Begun(row, RowInFlight(prompt, row.recipe, options.positions, options.max_new_tokens, sampler, text))


def in_parts(
    begun: Sequence[Begun], part_rows: int, decode: Decode, cancel: threading.Event | None, progress: Progress
) -> Generator[Step, None, list[Row]]:
    """Write rows `part_rows` at a time; yields the steps of `decode` and what a text held back till its end.

    A row that fails ends; its error is raised when the others that were written with it have ended, too.
    """
    finished: list[Row] = []
    for first in range(0, len(begun), part_rows):
        part = begun[first : first + part_rows]
        if not is_set(cancel):
            yield from decode(first, [one.writing for one in part])
            yield Step(first, tuple(one.writing.text.finish() for one in part))
            failure = next((one.writing.failure for one in part if one.writing.failure is not None), None)
            if failure is not None:
                raise failure
            progress(f"Wrote {first + len(part)} of {len(begun)} texts", (first + len(part)) / len(begun))
        finished += [one.filled for one in part]
    return finished


def drained(stream: Generator[Step, None, list[Row]]) -> list[Row]:
    """What a stream returns at its end."""
    while True:
        try:
            next(stream)
        except StopIteration as finished:
            return finished.value


def is_set(cancel: threading.Event | None) -> bool:
    return cancel is not None and cancel.is_set()


def sweep_rows(recipe: Recipe, strengths: Sequence[float], prompts: Sequence[Prompt], *, samples: int = 1) -> list[Row]:
    """The rows of a sweep, strengths outermost. Raises `UsageError` when there is nothing to do."""
    if not strengths or not prompts or samples < 1:
        raise UsageError("A sweep needs at least one strength, one prompt and one sample.")
    return [
        Row(prompt, recipe.scaled(strength), sample, strength)
        for strength in strengths
        for prompt in prompts
        for sample in range(samples)
    ]


def _as_rows(rows: Sequence[Row] | Prompt, recipe: Recipe) -> list[Row]:
    if not rows:
        raise UsageError("There is nothing to write; give at least one prompt.")
    if isinstance(rows, str) or (isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)):
        return [Row(rows, recipe, strength=1.0 if recipe.uses else 0.0)]  # type: ignore[arg-type]
    if isinstance(rows, Sequence) and all(isinstance(row, Row) for row in rows):
        return list(rows)  # type: ignore[arg-type]
    raise UsageError(f"Give one prompt, or a list of Row; not {type(rows).__name__} {rows!r:.60}.")


def stop_ids(lm: LanguageModel) -> list[int]:
    """What ends a text: the generation config's end tokens, and the tokenizer's own."""
    config = lm.model.generation_config
    found = config.eos_token_id if config is not None else None
    ids = found if isinstance(found, list) else [found]
    return sorted({int(token) for token in (*ids, lm.tokenizer.eos_token_id) if token is not None})
