"""What a model would write next, with and without a recipe, and over a sweep of a circuit's multipliers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Recipe, check_recipes_fit
from neurosteer.circuits.parts import at_multiplier
from neurosteer.circuits.relp.choices import NextToken, checked_ids, next_tokens
from neurosteer.errors import UsageError
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.models.logits import last_logits
from neurosteer.steering.plans import applied, compile_plan
from neurosteer.validation import check_count

logger = logging.getLogger(__name__)

_ROWS = 32  # recipes that are tried at once
_MOST_PREDICTIONS = 1000


@dataclass(frozen=True)
class Prediction:
    """A token that may come next, and its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class SweepPoint:
    """What comes next with a circuit at `multiplier`: the likeliest tokens, and the probabilities of those asked for,
    in their order."""

    multiplier: float
    predictions: tuple[Prediction, ...]
    asked: tuple[Prediction, ...]


def next_token_probs(
    lm: LanguageModel,
    prompt: Prompt,
    tokens: str | Sequence[str],
    recipe: Recipe = UNSTEERED,
    *,
    raw: bool = False,
    seed_response: str = "",
) -> dict[str, float]:
    """The probability of each of `tokens` to come next after `prompt`, steered by `recipe`; of a text of several tokens
    that of the first.

    Raises `UsageError` as `next_tokens` does, `MismatchError` for an artifact of another model.
    """
    ids, asked = _asked(lm, prompt, tokens, raw, seed_response)
    probabilities = _probabilities(lm, ids, [recipe])[0]
    return {token.given: float(probabilities[token.id]) for token in asked}


def top_predictions(
    lm: LanguageModel,
    prompt: Prompt,
    recipe: Recipe = UNSTEERED,
    k: int = 10,
    *,
    raw: bool = False,
    seed_response: str = "",
) -> list[Prediction]:
    """The `k` likeliest next tokens after `prompt`, steered by `recipe`, likeliest first.

    Raises `UsageError` for an empty or too long prompt or a `k` that is no number from 1 to 1000, `MismatchError` for
    an artifact of another model.
    """
    check_count("k", k, 1, _MOST_PREDICTIONS)
    ids = checked_ids(lm, prompt, raw, seed_response)
    return _top(lm, _probabilities(lm, ids, [recipe])[0], k)


def sweep_multipliers(
    lm: LanguageModel,
    circuit: NeuronCircuit,
    prompt: Prompt,
    multipliers: Sequence[float],
    tokens: str | Sequence[str] = (),
    k: int = 5,
    *,
    raw: bool = False,
    seed_response: str = "",
) -> list[SweepPoint]:
    """What comes next after `prompt` with the circuit's neurons multiplied by each of `multipliers`, batched.

    Raises `UsageError` for no multipliers, one that is no finite number, or as `top_predictions` and
    `next_token_probs` do; `MismatchError` for a circuit of another model.
    """
    check_count("k", k, 1, _MOST_PREDICTIONS)
    if not multipliers:
        raise UsageError("There is nothing to sweep; give at least one multiplier, like 0, 1 and 2.")
    recipes = [at_multiplier(circuit, multiplier) for multiplier in multipliers]
    ids, asked = _asked(lm, prompt, tokens, raw, seed_response)
    rows = _probabilities(lm, ids, recipes)
    return [
        SweepPoint(
            float(multiplier),
            tuple(_top(lm, row, k)),
            tuple(Prediction(token.id, token.given, float(row[token.id])) for token in asked),
        )
        for multiplier, row in zip(multipliers, rows, strict=True)
    ]


def _asked(
    lm: LanguageModel, prompt: Prompt, tokens: str | Sequence[str], raw: bool, seed_response: str
) -> tuple[Sequence[int], list[NextToken]]:
    """The prompt's ids, and the tokens that may follow it."""
    wanted = [tokens] if isinstance(tokens, str) else list(tokens)
    if not wanted:
        return checked_ids(lm, prompt, raw, seed_response), []
    choices = next_tokens(lm, [prompt] * len(wanted), wanted, raw=raw, seed_response=seed_response)
    return choices[0].ids, [choice.target for choice in choices]


def _probabilities(lm: LanguageModel, ids: Sequence[int], recipes: Sequence[Recipe]) -> Tensor:
    """Of every next token under each recipe, float32 `[len(recipes), vocabulary]`, on the CPU."""
    for warning in check_recipes_fit(recipes, lm.reference):
        logger.warning(warning)
    found = []
    for first in range(0, len(recipes), _ROWS):
        part = recipes[first : first + _ROWS]
        with torch.inference_mode(), applied(lm, compile_plan(lm, part)):
            found.append(last_logits(lm, [ids] * len(part)).softmax(-1).cpu())
    return torch.cat(found)


def _top(lm: LanguageModel, probabilities: Tensor, k: int) -> list[Prediction]:
    values, ids = probabilities.topk(min(k, len(probabilities)))
    return [
        Prediction(token, lm.tokenizer.decode([token]), value)
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    ]
