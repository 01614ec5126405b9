"""Recipes as one line of text, the same on the command line, over HTTP and in Python.

    sentiment                                one artifact, at strength 1
    sentiment:1.5 + formality:-0.5           several; " - " takes the other sign: sentiment - formality:0.5
    someone/moods/joy@v2:1                   of the Hub: user/repo[/name][@revision], or an address of it
    "./my folder":2                          in quotes, what holds spaces or marks of this grammar
    refusal-circuit×0                        a circuit's neurons multiplied (also *0)
    embedded/14#1234:2 + embedded/14#7=8     features of an SAE: added, or held at a value
    orthogonal(sentiment:1, formality:1)     without the overlap between these vectors
    sentiment:1 @generated                   where: @all, @prompt, @generated, @first:8 (of what is written), @last:4
                                             (of the prompt)

    recipe    = [sign] term { (" + " | " - ") term } [" @" positions]
    term      = use | "orthogonal(" use { "," use } ")"
    use       = reference [":" number | ("×" | "*") number]
    reference = a word without spaces, quotes, commas, brackets, "×" and "*", and with ":" in "://" only | a quoted text

`parse_recipe` reads it, `str` of what it gives writes it; `hub.references.look_up` finds what it names.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from neurosteer.artifacts.recipes import Positions, Recipe
from neurosteer.errors import UsageError
from neurosteer.validation import check_positions

MAX_TEXT, MAX_TERMS = 4000, 64

_WORD = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?[^\s\"',()×*:]+")
_PLAIN = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?[^\s\"'“”,()×*:+@-][^\s\"'“”,()×*:]*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
_QUOTED = re.compile(r"\"((?:[^\"\\]|\\.)*)\"")
_GROUP = re.compile(r"orthogonal\s*\(")
_SPACE = re.compile(r"\s*")
_ENDS = re.compile(r"(?=[\s,)]|$)")


@dataclass(frozen=True)
class Term:
    """What an artifact, or a feature of an SAE, is called, and its strength or its neurons' multiplier."""

    reference: str
    strength: float = 1.0
    multiplier: float | None = None

    def __str__(self) -> str:
        named = self.reference if _PLAIN.fullmatch(self.reference) else _quoted(self.reference)
        return f"{named}×{self.multiplier:.12g}" if self.multiplier is not None else f"{named}:{self.strength:.12g}"


@dataclass(frozen=True)
class Group:
    """Vectors without the overlap between them (`combining.orthogonalise`)."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return f"orthogonal({', '.join(map(str, self.terms))})"


@dataclass(frozen=True)
class RecipeText:
    """A recipe in words: what it names is not looked up yet."""

    parts: tuple[Term | Group, ...]
    positions: Positions = "all"

    def __str__(self) -> str:
        where = "" if self.positions == "all" else f" @{self.positions}"
        return " + ".join(map(str, self.parts)) + where

    @staticmethod
    def of(recipe: Recipe, names: Sequence[str] | None = None, positions: Positions = "all") -> "RecipeText":
        """A recipe in words; its artifacts are called by `names`, or as they call themselves."""
        called = names or [use.artifact.name for use in recipe.uses]
        pairs = zip(called, recipe.uses, strict=True)
        return RecipeText(tuple(Term(name, use.strength, use.multiplier) for name, use in pairs), positions)

    @property
    def terms(self) -> tuple[Term, ...]:
        """All of them, those of groups too."""
        return tuple(term for part in self.parts for term in (part.terms if isinstance(part, Group) else (part,)))


def parse_recipe(text: str) -> RecipeText:
    """Read a recipe. Raises `UsageError` that names the character at which it cannot be gone on, and what may stand
    there."""
    if len(text) > MAX_TEXT:
        raise UsageError(f"The recipe has {len(text):,} characters; use at most {MAX_TEXT:,}.")
    return _Reader(text).recipe()


class _Reader:
    """Goes through a text once, from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def recipe(self) -> RecipeText:
        self._skip()
        parts: list[Term | Group] = []
        sign = -1.0 if self._take("-") else 1.0
        while True:
            self._skip()
            parts.append(_signed(self._part(), sign))
            if sum(len(part.terms) if isinstance(part, Group) else 1 for part in parts) > MAX_TERMS:
                raise self._error(f"a recipe of at most {MAX_TERMS} artifacts")
            before = self.place
            self._skip()
            if self.place == len(self.text):
                return RecipeText(tuple(parts))
            if self._take("@"):
                return RecipeText(tuple(parts), self._positions())
            sign = 1.0 if self._take("+") else -1.0 if self._take("-") else 0.0
            if not sign or self.place - 1 == before:
                self.place = before
                raise self._error("“ + ”, “ - ”, “ @” and where, or the end")

    def _part(self) -> Term | Group:
        found = _GROUP.match(self.text, self.place)
        if not found:
            return self._use()
        self.place = found.end()
        terms: list[Term] = []
        while True:
            self._skip()
            terms.append(self._use())
            self._skip()
            if self._take(")"):
                return Group(tuple(terms))
            if not self._take(","):
                raise self._error("“,” and another vector, or “)”")

    def _use(self) -> Term:
        reference = self._reference()
        if self._take(":"):
            return Term(reference, self._number("a strength", f"{reference[:40]}:1.5"))
        if self._take("×") or self._take("*"):
            return Term(reference, multiplier=self._number("a multiplier", f"{reference[:40]}×0"))
        return Term(reference)

    def _reference(self) -> str:
        if quoted := _QUOTED.match(self.text, self.place):
            self.place = quoted.end()
            return re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL)
        word = _WORD.match(self.text, self.place)
        if not word or word[0][0] in "+@-":
            raise self._error("an artifact: a name, user/repo, a folder or SAE#INDEX, in quotes where it holds spaces")
        self.place = word.end()
        return word[0]

    def _number(self, what: str, like: str) -> float:
        found = _NUMBER.match(self.text, self.place)
        value = float(found[0]) if found and _ENDS.match(self.text, found.end()) else math.nan
        if not math.isfinite(value):
            raise self._error(f"{what}, like {like}")
        assert found is not None
        self.place = found.end()
        return value

    def _positions(self) -> Positions:
        start, where = self.place, self.text[self.place :].strip()
        try:
            return check_positions(where)
        except UsageError:
            self.place = start
            raise self._error("all, prompt, generated, first:N or last:N, and nothing behind it") from None

    def _skip(self) -> None:
        found = _SPACE.match(self.text, self.place)
        assert found is not None
        self.place = found.end()

    def _take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.place):
            return False
        self.place += len(mark)
        return True

    def _error(self, wanted: str) -> UsageError:
        rest = self.text[self.place : self.place + 20]
        there = f"at character {self.place + 1} («{rest}»)" if rest else "at its end"
        return UsageError(f"The recipe «{self.text[:200]}» cannot be read {there}: there should be {wanted}.")


def _signed(part: Term | Group, sign: float) -> Term | Group:
    if sign > 0:
        return part
    if isinstance(part, Group):
        return Group(tuple(_opposite(term) for term in part.terms))
    return _opposite(part)


def _opposite(term: Term) -> Term:
    if term.multiplier is not None:
        raise UsageError(f"“-” before {str(term)[:80]!r} means nothing: a multiplier has no sign to turn; write “+”.")
    return replace(term, strength=-term.strength)


def _quoted(text: str) -> str:
    return '"' + re.sub(r"([\"\\])", r"\\\1", text) + '"'
