"""For how many seconds a GPU is asked for. Too little ends the work half way; too much has to wait longer for its turn.

All figures are for a large model on a GPU that others have just used.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from neurosteer.building.build import build
from neurosteer.building.described import ANSWER_TOKENS, described_examples
from neurosteer.evaluation import evaluate
from neurosteer.evaluation.controls import n_groups
from neurosteer.evaluation.worth import N_TEXTS, TEXT_TOKENS, worth_texts
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import calibration_prompts, described_prompts
from neurosteer.measuring.calibration import MAX_ROUNDS, N_TOKENS
from neurosteer.models.framing import MAX_PROMPT_TOKENS
from neurosteer.steering.session import Options, Row

_STEP_S = 0.05  # of decoding, whatever the model: a step waits for the many small things it launches
BATCH_ROWS = 64  # that decode in one step
_TOKENS_PER_S = 5_000  # read while building, by a large model
_TEXT_TOKENS, _CHARACTERS_PER_TOKEN = 512, 3
_AMOUNTS = 2  # that a round of calibrating tries: one for each sign
_CANDIDATES, _COMPARED_ON, _PART_OF_PROMPTS = 5, 24, 3  # choices of layers, texts of a class, a third of the prompts
_OTHER_S = 15.0  # whatever else there is to do with a prompt and a text or two


def writing_s(rows: Sequence[Row], options: Options) -> float:
    """For texts that are written."""
    return math.ceil(len(rows) / BATCH_ROWS) * options.max_new_tokens * _STEP_S


def calling_s(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], callbacks: tuple[str, ...]
) -> float:
    """For a function of the library, by its arguments."""
    if function is build:
        (examples,) = arguments
        return _building_s(examples, options)
    if function is evaluate:
        return _evaluating_s(options)
    if function is described_examples:
        rows = 2 * len(described_prompts()) * options.get("samples", 2)
        return _OTHER_S + math.ceil(rows / BATCH_ROWS) * options.get("max_new_tokens", ANSWER_TOKENS) * _STEP_S
    if function is worth_texts:
        return _OTHER_S + math.ceil(N_TEXTS / BATCH_ROWS) * TEXT_TOKENS * _STEP_S
    return _OTHER_S


def _building_s(examples: ContrastSet, options: dict[str, Any]) -> float:
    """All texts are read once. Calibration writes its prompts' continuations and reads them in every round; where a
    choice of layers is compared, each candidate is calibrated on a part of them and read on held-out texts."""
    texts = (*examples.positive, *examples.negative)
    asked = [len(json.dumps(prompt)) for prompt in examples.prompts or []] or [0] * len(texts)
    lengths = [
        min(_TEXT_TOKENS, len(text) / _CHARACTERS_PER_TOKEN) + min(MAX_PROMPT_TOKENS, before / _CHARACTERS_PER_TOKEN)
        for text, before in zip(texts, asked, strict=True)
    ]
    seconds = sum(lengths) / _TOKENS_PER_S
    if not options.get("calibrate", True):
        return seconds
    prompts = calibration_prompts()
    read = sum(len(prompt) / _CHARACTERS_PER_TOKEN + N_TOKENS for prompt in prompts)
    rounds_s = MAX_ROUNDS * (_AMOUNTS * read / _TOKENS_PER_S + _STEP_S)
    seconds += math.ceil(len(prompts) / BATCH_ROWS) * N_TOKENS * _STEP_S + rounds_s
    if options.get("layers", "auto") in ("auto", "all"):
        held_out = 2 * _COMPARED_ON * sum(lengths) / max(1, len(lengths))
        seconds += _CANDIDATES * (rounds_s / _PART_OF_PROMPTS + 2 * held_out / _TOKENS_PER_S)
    return seconds


def _evaluating_s(options: dict[str, Any]) -> float:
    """All texts are written once and read once; so many groups more are read to measure KL, and twins to bring them to
    the same."""
    groups = n_groups(options["strengths"])
    texts = groups * len(options["prompts"]) * options["samples"]
    steps = math.ceil(texts / BATCH_ROWS) * options["max_new_tokens"]
    matching = 2 * options.get("n_random", 10) * 8 * 3  # signs, twins, prompts, and how often a strength is tried
    return _OTHER_S + steps * _STEP_S + (2 * texts + matching) * _TEXT_TOKENS / 4 / _TOKENS_PER_S
