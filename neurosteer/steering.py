"""Recipes to text: batched, steered, streamed generation."""

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from neurosteer.artifacts import Artifact, check_model
from neurosteer.decoding import RowTexts, Sampler, Sampling
from neurosteer.errors import UsageError
from neurosteer.hooks import Hook, InputHook, hooked
from neurosteer.models import LanguageModel, Prompt
from neurosteer.plans import applied, compile_plan
from neurosteer.progress import Progress, silent
from neurosteer.recipes import POSITIONS, UNSTEERED, Positions, Recipe

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 4096
MAX_BATCH_ROWS = 4096
_Stopped = Callable[[], bool]
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Row:
    """One text to write: a prompt, a recipe, and a number that tells samples of the same prompt apart.

    `strength` is what the recipe was scaled by, for tables; `text` and the rest are filled in by generation:
    `tokens` counts the new tokens, `finish` is `stop`, `length` or `cancelled`.
    """

    prompt: Prompt
    recipe: Recipe = UNSTEERED
    sample: int = 0
    strength: float = 0.0
    text: str = ""
    tokens: int = 0
    finish: str = ""


@dataclass(frozen=True)
class Step:
    """What one decoding step added: `pieces[i]` is the new text of row `first + i`, often empty."""

    first: int
    pieces: tuple[str, ...]


class Session:
    """Generates with one model. Holds no state of a call; safe to use from several threads at once."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._warned: set[str] = set()

    def generate(self, rows: Sequence[Row] | Prompt, recipe: Recipe = UNSTEERED, **options: Any) -> list[Row]:
        """All rows with their texts filled in. Options as for `stream`.

        `rows` may also be one prompt, which is written once under `recipe`.
        """
        stream = self.stream(rows, recipe, **options)
        while True:
            try:
                next(stream)
            except StopIteration as finished:
                return finished.value

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
            UsageError: an option out of its range, or a prompt that is too long for the model.
            MismatchError: an artifact was made on a model of another shape.
        """
        todo = _as_rows(rows, recipe)
        options = _Options(max_new_tokens, sampling or Sampling(), positions, raw, use_cache, batch_rows)
        options.check()
        self._check_artifacts(todo)
        prompts = [self._prompt_ids(row.prompt, options) for row in todo]
        finished: list[Row] = []

        def stop() -> bool:
            return cancel is not None and cancel.is_set()

        for first in range(0, len(todo), batch_rows):
            batch = slice(first, first + batch_rows)
            if stop():
                finished += [replace(row, finish="cancelled") for row in todo[batch]]
                continue
            finished += yield from self._stream_batch(first, todo[batch], prompts[batch], options, stop)
            progress(f"Wrote {len(finished)} of {len(todo)} texts", len(finished) / len(todo))
        return finished

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

    def _check_artifacts(self, rows: Sequence[Row]) -> None:
        for artifact in {id(use.artifact): use.artifact for row in rows for use in row.recipe.uses}.values():
            warning = check_model(artifact, self.lm.reference)
            if warning and warning not in self._warned:
                self._warned.add(warning)
                logger.warning(warning)

    def _prompt_ids(self, prompt: Prompt, options: "_Options") -> list[int]:
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

    def _stream_batch(
        self, first: int, rows: Sequence[Row], prompts: Sequence[list[int]], options: "_Options", stop: _Stopped
    ) -> Generator[Step, None, list[Row]]:
        """Decode a batch in the consumer's own thread, one step for each time it asks.

        Hooks are on the model only while a step runs: a consumer that pauses, leaves, or goes on in another thread
        leaves nothing behind. (Decoding in a thread of its own costs half as much again on a CPU, where the maths
        library's threads then sleep between two operations.)
        """
        plan = compile_plan(self.lm, [row.recipe for row in rows], options.positions)
        lengths = [len(prompt) for prompt in prompts]
        sampler = Sampler(options.sampling, _random_streams(rows), lengths)
        texts = RowTexts(self.lm.tokenizer, len(rows), _stop_ids(self.lm))
        batch = _Batch(self.lm, prompts, use_cache=options.use_cache)
        for _ in range(options.max_new_tokens):
            if stop() or all(texts.stopped):
                break
            with torch.inference_mode(), applied(self.lm, plan, prompt_width=max(lengths)):
                tokens = sampler(batch.ids, batch.next_scores())
                batch.append(tokens)
            yield Step(first, texts.push(tokens.tolist()))
        yield Step(first, texts.finish())
        return [_filled(row, texts, index, options) for index, row in enumerate(rows)]


class _Batch:
    """Prompts padded on the left and what was written after them, `[batch, seq]`, with the keys and values so far."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[list[int]], *, use_cache: bool) -> None:
        width = max(map(len, prompts))
        ids, mask = torch.full((len(prompts), width), lm.pad_id), torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.lm = lm
        self.ids, self.mask = ids.to(lm.device), mask.to(lm.device)
        self.cache = DynamicCache(config=lm.model.config) if use_cache else None

    def next_scores(self) -> Tensor:
        """Logits of the next token, float32 `[batch, vocab]`."""
        done = self.cache.get_seq_length() if self.cache is not None else 0
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        with hooked(_contiguous_head(self.lm)):
            output = self.lm.model(
                input_ids=self.ids[:, done:],
                attention_mask=self.mask,
                position_ids=positions[:, done:],
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids.device)], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)


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


@dataclass(frozen=True)
class _Options:
    max_new_tokens: int
    sampling: Sampling
    positions: Positions
    raw: bool
    use_cache: bool
    batch_rows: int

    def check(self) -> None:
        for name, most in (("max_new_tokens", MAX_NEW_TOKENS), ("batch_rows", MAX_BATCH_ROWS)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
                raise UsageError(f"{name} is {count!r:.40}; it must be a whole number from 1 to {most}.")
        if self.positions not in POSITIONS:
            raise UsageError(f"positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}.")


def _as_rows(rows: Sequence[Row] | Prompt, recipe: Recipe) -> list[Row]:
    if not rows:
        raise UsageError("There is nothing to write; give at least one prompt.")
    if isinstance(rows, str) or (isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)):
        return [Row(rows, recipe, strength=1.0 if recipe.uses else 0.0)]  # type: ignore[arg-type]
    if isinstance(rows, Sequence) and all(isinstance(row, Row) for row in rows):
        return list(rows)  # type: ignore[arg-type]
    raise UsageError(f"Give one prompt, or a list of Row; not {type(rows).__name__} {rows!r:.60}.")


def _random_streams(rows: Sequence[Row]) -> list[str]:
    """The same prompt and sample draw the same random numbers under every recipe and in every batch."""
    return [f"{row.prompt}/{row.sample}" for row in rows]


def _contiguous_head(lm: LanguageModel) -> list[Hook]:
    """After the prompt, transformers hands the LM head a slice of the hidden states; on a CPU, multiplying a slice
    copies the whole vocabulary matrix once per row (16 rows: five times the time of the prompt itself)."""
    head = lm.model.get_output_embeddings()
    return [InputHook(head, lambda hidden: hidden.contiguous())] if head is not None else []


def _stop_ids(lm: LanguageModel) -> list[int]:
    """What ends a text: the generation config's end tokens, and the tokenizer's own."""
    config = lm.model.generation_config
    found = config.eos_token_id if config is not None else None
    ids = found if isinstance(found, list) else [found]
    return sorted({int(token) for token in (*ids, lm.tokenizer.eos_token_id) if token is not None})


def _filled(row: Row, texts: RowTexts, index: int, options: _Options) -> Row:
    tokens = len(texts.ids[index])
    finish = "stop" if texts.stopped[index] else ("length" if tokens >= options.max_new_tokens else "cancelled")
    return replace(row, text=texts.texts[index], tokens=tokens, finish=finish)
