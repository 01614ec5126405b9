"""A recipe as a link: what to steer with, the prompt and the settings in the page's address, readable by people.

Only what anybody can get is in a link: released artifacts by name, pulled ones by their Hub reference. What a link
holds is a stranger's text: nothing in it names a file of the server, and every value is checked.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from neurosteer.errors import UsageError
from neurosteer.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT, MAX_STRENGTH

MOST_USES = 4

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}(?:/[A-Za-z0-9][\w.-]{0,95})?(?:@[\w.-]{1,100})?")


@dataclass(frozen=True)
class Link:
    """What a link holds. `uses` are references (a released name, or one of the Hub) with where their sliders stand."""

    uses: tuple[tuple[str, float], ...]
    prompt: str = ""
    model: str | None = None
    mode: str = "prompt"
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    greedy: bool = False
    apart: bool = False

    def query(self) -> str:
        """`?use=…&prompt=…`, to stand behind the page's address."""
        fields: list[tuple[str, object]] = [("use", f"{name}:{position:g}") for name, position in self.uses]
        fields += [("prompt", self.prompt), ("model", self.model), ("mode", self.mode)]
        fields += [("length", self.max_new_tokens), ("temperature", self.temperature), ("top_p", self.top_p)]
        fields += [("seed", self.seed), ("greedy", int(self.greedy) or None), ("apart", int(self.apart) or None)]
        return "?" + urlencode([(key, value) for key, value in fields if value not in (None, "")], safe=":/@,")


def check_shareable(labels: Sequence[str], origins: Mapping[str, str], own: str) -> None:
    """Raises `UsageError` naming what nobody else can get."""
    private = [label for label in labels if origins[label] == own]
    if private:
        raise UsageError(
            f"{', '.join(private)[:200]} is on this page only, so a link to it would lead nowhere: publish it on the "
            "Library tab first, or send it as a file."
        )


def parse_link(query: Mapping[str, Sequence[str]]) -> Link | None:
    """The link in a page's address (`query` maps keys to their values), or None where there is none.

    Raises `UsageError` naming what cannot be used.
    """
    uses = tuple(map(_use, query.get("use", ())))
    given = {key: values[0] for key, values in query.items() if values}
    prompt = given.get("prompt", "")
    if not uses and not prompt:
        return None
    if len(uses) > MOST_USES:
        raise UsageError(f"The link steers with {len(uses)} artifacts at once; at most {MOST_USES} can be used.")
    if len(prompt) > MAX_PROMPT:
        raise UsageError(f"The link's prompt has {len(prompt):,} characters; at most {MAX_PROMPT:,} can be used.")
    length, seed = _number(given, "length", 1, MAX_NEW_TOKENS), _number(given, "seed", 0, 2**53)
    return Link(
        uses,
        prompt,
        model=given.get("model", "")[:200] or None,
        mode="chat" if given.get("mode") == "chat" else "prompt",
        max_new_tokens=None if length is None else int(length),
        temperature=_number(given, "temperature", 0.05, 2.0),
        top_p=_number(given, "top_p", 0.05, 1.0),
        seed=None if seed is None else int(seed),
        greedy=given.get("greedy") == "1",
        apart=given.get("apart") == "1",
    )


def _use(text: str) -> tuple[str, float]:
    name, _, position = text.rpartition(":")
    try:
        number = float(position)
    except ValueError:
        number = math.nan
    if not (_NAME.fullmatch(name) or _HUB.fullmatch(name)) or ".." in name or not abs(number) <= MAX_STRENGTH:
        raise UsageError(f"The link says {text[:120]!r}, which is no artifact at a strength, like user/repo:1.")
    return name, number


def _number(given: Mapping[str, str], key: str, least: float, most: float) -> float | None:
    text = given.get(key)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise UsageError(f"The link's {key} is {text[:40]!r}; it must be a number from {least:g} to {most:g}.")
    return number
