"""Prompts as token ids, each with the next tokens that are in question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from neurosteer.circuits.relp.linearised import batch_tokens_for
from neurosteer.errors import UsageError
from neurosteer.models.batching import length_batches
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.models.logits import last_logits
from neurosteer.models.memory import halving


@dataclass(frozen=True)
class NextToken:
    """A token that may come next: its `id` and `text`, and what was asked for.

    `given` is empty where the token was chosen as the best other one. Of a text of several tokens (`n_tokens` above 1)
    the first one is meant.
    """

    id: int
    text: str
    given: str = ""
    n_tokens: int = 1

    @property
    def is_part(self) -> bool:
        """Whether this is only the beginning of what was given."""
        return self.n_tokens > 1


@dataclass(frozen=True)
class Choice:
    """A prompt as token ids, and the token whose logit is in question. Without a counterfactual, none was named."""

    prompt: Prompt
    ids: tuple[int, ...]
    target: NextToken
    counterfactual: NextToken | None = None


def next_tokens(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    targets: str | Sequence[str],
    counterfactuals: str | Sequence[str] | None = None,
    *,
    raw: bool = False,
    seed_response: str = "",
) -> tuple[Choice, ...]:
    """One choice per prompt. One target, or counterfactual, serves all prompts; several are theirs in order.

    Raises `UsageError` for no prompts, an empty or too long one, an empty or unknown token, a counterfactual that is
    the same token as the target, or numbers that do not agree.
    """
    asked = as_prompts(prompts)
    wanted = _one_each("targets", targets, len(asked))
    named = counterfactuals is not None
    against = _one_each("counterfactuals", counterfactuals, len(asked)) if named else [None] * len(asked)
    return tuple(
        _choice(lm, prompt, target, other, raw, seed_response)
        for prompt, target, other in zip(asked, wanted, against, strict=True)
    )


def likely_choices(lm: LanguageModel, prompts: Sequence[str]) -> tuple[Choice, ...]:
    """The model's own best next token after each prompt as it is, against its second best.

    Raises `UsageError` for no prompts or an empty one.
    """
    choices: dict[int, Choice] = {}
    drafts = [Choice(one, tuple(checked_ids(lm, one, raw=True)), NextToken(0, "")) for one in as_prompts(prompts)]

    @torch.inference_mode()
    def run(indices: list[int]) -> list[list[int]]:
        return last_logits(lm, [drafts[index].ids for index in indices]).topk(2).indices.tolist()

    for indices, best in halving(lm, length_batches(drafts, batch_tokens_for(lm)), run):
        for index, pair in zip(indices, best, strict=True):
            target, other = (NextToken(one, lm.tokenizer.decode([one])) for one in pair)
            choices[index] = replace(drafts[index], target=target, counterfactual=other)
    return tuple(choices[index] for index in range(len(drafts)))


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text, a conversation or several of them as a list. Raises `UsageError` where there is none."""
    if isinstance(prompts, str) or (prompts and all(isinstance(message, Mapping) for message in prompts)):
        return [prompts]  # type: ignore[list-item]
    if not prompts:
        raise UsageError("There is no prompt; give at least one.")
    return list(prompts)  # type: ignore[arg-type]


def checked_ids(lm: LanguageModel, prompt: Prompt, raw: bool, seed_response: str = "") -> list[int]:
    """The prompt's token ids. Raises `UsageError` where there is none, or more than the model was made for."""
    ids = lm.prompt_ids(prompt, raw=raw, seed_response=seed_response) if prompt else []
    if not ids:
        raise UsageError("A prompt is empty; write at least one character.")
    limit = lm.max_positions
    if limit is not None and len(ids) > limit:
        raise UsageError(f"A prompt of {len(ids)} tokens exceeds the {limit} tokens of {lm.name}; shorten it.")
    return ids


def _one_each(what: str, texts: str | Sequence[str], count: int) -> list[str]:
    if isinstance(texts, str):
        return [texts] * count
    if len(texts) != count:
        raise UsageError(f"There are {len(texts)} {what} and {count} prompts; give one for all, or one each.")
    return list(texts)


def _choice(
    lm: LanguageModel, prompt: Prompt, target: str, counterfactual: str | None, raw: bool, seed_response: str
) -> Choice:
    ids = checked_ids(lm, prompt, raw, seed_response)
    wanted = _next_token(lm, prompt, target, ids, raw, seed_response)
    other = None
    if counterfactual is not None:
        other = _next_token(lm, prompt, counterfactual, ids, raw, seed_response)
        if other.id == wanted.id:
            raise UsageError(
                f"The target {target!r:.60} and the counterfactual {counterfactual!r:.60} begin with the same token "
                f"{wanted.text!r}; name two that differ in their first token."
            )
    return Choice(prompt, tuple(ids), wanted, other)


def _next_token(
    lm: LanguageModel, prompt: Prompt, text: str, before: list[int], raw: bool, seed_response: str
) -> NextToken:
    """The token with which `text` begins where it follows the prompt: tokenizers may cut it otherwise by itself."""
    if not text:
        raise UsageError("A target or counterfactual is empty; write the next token, its leading space included.")
    after = lm.prompt_ids(prompt, raw=raw, seed_response=seed_response + text)
    ids = after[len(before) :] if after[: len(before)] == before else []
    ids = ids or lm.token_ids(text)
    unknown = lm.tokenizer.unk_token_id
    if not ids or (ids[0] == unknown and text != lm.tokenizer.unk_token):
        raise UsageError(f"{text!r:.60} is no token of {lm.name}; write something its tokenizer knows.")
    return NextToken(ids[0], lm.tokenizer.decode([ids[0]]), text, len(ids))
