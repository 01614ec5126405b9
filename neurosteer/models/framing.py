"""Prompts and texts as token ids: the one place that renders chat templates, and what those are given."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Literal

from neurosteer.errors import ModelError, UsageError
from neurosteer.validation import check_option

Framing = Literal["raw", "prompt", "answer"]
FRAMINGS: tuple[Framing, ...] = ("raw", "prompt", "answer")
Message = Mapping[str, str]
Prompt = str | Sequence[Message]

TODAY = "2024-07-26"
"""The date that templates which print one are given, so that the same seed gives the same text on any day. It is the
one that Llama's templates fall back to themselves."""

MAX_PROMPT_TOKENS = 1024
"""Of what a text answers, in a chat; of more the end is kept. Without a chat template, `MAX_RAW_PROMPT_TOKENS`: older
base models see 1,024 tokens in all."""

MAX_RAW_PROMPT_TOKENS = 480
_TOKENIZE_AT_ONCE = 500
_DATE_LETTERS = "dmbBYyaAjHMSIp"  # of strftime: those that do not depend on where one is


@dataclass(frozen=True)
class FramedText:
    """A text as token ids; its own tokens begin at `start`. `cut` says that it, or what it answers, was longer than
    allowed."""

    ids: list[int]
    start: int
    cut: bool


def template_options(tokenizer: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a tokenizer's chat template is given: `given`, over what it would otherwise decide by itself.

    By default a template that knows `enable_thinking` gets False, so that what is measured is the answer and not the
    thinking; and one that prints the date gets `today`, a date as in `TODAY` (it reaches the template as `date_string`
    and through `strftime_now`). Raises `UsageError` for options that JSON cannot hold, or a `today` that is no date.
    """
    source = _template_source(tokenizer)
    options: dict[str, Any] = {}
    if "enable_thinking" in source:
        options["enable_thinking"] = False
    if "strftime_now" in source or "date_string" in source:
        options["today"] = TODAY
    try:
        options.update(given or {})
        json.dumps(options, allow_nan=False)
        _variables(options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"template_options is {options!r:.200}: {error}; give names with JSON values.") from error
    return options


def _template_source(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # several templates, none of which is the default one
        return ""


def _variables(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as variables of the template."""
    variables = {name: value for name, value in options.items() if name != "today"}
    if "today" in options:
        today = date.fromisoformat(options["today"])
        variables = {"date_string": today.strftime("%d %b %Y"), **variables}
    return variables


def _dated(source: str, options: Mapping[str, Any]) -> str | None:
    """The template with a `strftime_now` that knows one day only, in place of transformers' own; None where it prints
    none. It is a macro, since whatever reaches a template from outside reaches it as text."""
    if "today" not in options or "strftime_now" not in source:
        return None
    today = date.fromisoformat(options["today"])
    known = "".join(f"|replace('%{letter}', '{today.strftime(f'%{letter}')}')" for letter in _DATE_LETTERS)
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{known} }}}}{{%- endmacro -%}}{source}"


class Framer:
    """What of a language model turns prompts and texts into token ids: its tokenizer, and its chat template where it
    is used with one (`chat`)."""

    tokenizer: Any
    name: str
    chat: bool
    template_options: Mapping[str, Any]

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given beside the conversation."""
        return _variables(self.template_options)

    def prompt_ids(self, prompt: Prompt, *, raw: bool = False, seed_response: str = "") -> list[int]:
        """Token ids of a prompt (or a conversation) up to where the model is to write.

        A chat model gets its chat template unless `raw`. `seed_response` is how the answer begins. Raises `UsageError`
        for a conversation without a template.
        """
        if raw or not self.chat:
            if not isinstance(prompt, str):
                raise UsageError(f"{self.name} is used without a chat template: give the prompt as one text.")
            return self._ids(prompt + seed_response)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        return self.token_ids(self._rendered(messages) + seed_response)

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens."""
        return self._ids(text, special=False)

    def frame(
        self, texts: Sequence[str], framing: Framing, *, max_tokens: int, prompts: Sequence[Prompt] | None = None
    ) -> list[FramedText]:
        """Texts as token ids under a framing; each text keeps its first `max_tokens` tokens.

        `prompts` are what the texts answer, requests or conversations: under `answer` through the chat template, under
        `raw` as lines before the text; a text's own tokens begin behind. Without them, under `answer` every text
        answers an empty turn. Raises `UsageError` for a framing that is none, that needs a chat template the model
        lacks, or for prompts under `prompt`.
        """
        check_option("framing", framing, FRAMINGS)
        if framing != "raw" and not self.chat:
            raise UsageError(f"framing {framing!r} needs a chat model; {self.name} is a base model, use 'raw'.")
        if framing == "prompt" and prompts is not None:
            raise UsageError(
                "framing 'prompt' reads texts as requests, but these answer prompts; use 'answer' or 'raw'."
            )
        plain = self._batch_ids(texts, special=framing == "raw" and prompts is None)
        cut = [len(ids) > max_tokens for ids in plain]
        plain = [ids[:max_tokens] for ids in plain]
        if framing == "raw" and prompts is None:
            return [FramedText(ids, 0, was_cut) for ids, was_cut in zip(plain, cut, strict=True)]
        if framing != "prompt":
            starts = self._beginnings(prompts or [""] * len(texts), framing)
            return [
                FramedText(start + ids, len(start), was_cut or start_was_cut)
                for (start, start_was_cut), ids, was_cut in zip(starts, plain, cut, strict=True)
            ]
        kept = [
            self.tokenizer.decode(ids) if was_cut else text
            for text, ids, was_cut in zip(texts, plain, cut, strict=True)
        ]
        start = self._user_turn_start()
        rendered = self._batch_ids([self._user_turn(text) for text in kept], special=False)
        return [FramedText(ids, start, was_cut) for ids, was_cut in zip(rendered, cut, strict=True)]

    def _beginnings(self, prompts: Sequence[Prompt], framing: Framing) -> list[tuple[list[int], bool]]:
        """What comes before each text, as token ids, and whether it was cut: its prompt up to where the model is to
        answer, or, without a chat template, the prompt's words on lines of their own."""
        most = MAX_PROMPT_TOKENS if framing == "answer" else MAX_RAW_PROMPT_TOKENS
        known: dict[str, tuple[list[int], bool]] = {}
        found = []
        for prompt in prompts:
            key = prompt if isinstance(prompt, str) else json.dumps(prompt)
            if key not in known:
                ids = self.prompt_ids(prompt) if framing == "answer" else self._ids(_in_lines(prompt))
                known[key] = ids[-most:], len(ids) > most
            found.append(known[key])
        return found

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _user_turn(self, text: str) -> str:
        return self._rendered([{"role": "user", "content": text}])

    def _user_turn_start(self) -> int:
        """Where the chat template's fixed beginning ends, in tokens: up to there two different prompts are alike."""
        one, other = (self.token_ids(self._user_turn(text)) for text in ("A", "?"))
        return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)

    @cached_property
    def _template(self) -> str | None:
        return _dated(_template_source(self.tokenizer), self.template_options)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True,
                **self.template_variables,
            )  # fmt: skip
        except Exception as error:  # templates raise whatever they like
            raise ModelError(f"The chat template of {self.name} refused the conversation: {error}") from error

    def _batch_ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """A few hundred texts at a time, since what a tokenizer returns beside the ids is many times their size; and
        one object per different id, or 20,000 texts would cost a number object for each of their tokens."""
        found: list[list[int]] = []
        known: dict[int, int] = {}
        for first in range(0, len(texts), _TOKENIZE_AT_ONCE):
            chunk = list(texts[first : first + _TOKENIZE_AT_ONCE])
            rows = self.tokenizer(chunk, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            found += [[known.setdefault(token, token) for token in ids] for ids in rows]
        return found


def _in_lines(prompt: Prompt) -> str:
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return "".join(f"{turn}\n" for turn in turns)
