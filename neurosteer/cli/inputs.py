"""What several verbs read from their options: artifacts at strengths, prompts and numbers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neurosteer import processes
from neurosteer.errors import UsageError
from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.hub.references import Named
    from neurosteer.models.language_model import LanguageModel

STDIN = "-"


def named_by(texts: Sequence[str]) -> "Named":
    """What --use names: mistakes show before the model is loaded; features of SAEs are looked up after."""
    from neurosteer.hub.references import look_up_all

    return look_up_all(texts)


def recipe_of(named: "Named", lm: "LanguageModel", progress: Progress) -> "tuple[Recipe, float]":
    """The recipe, and the strength to show beside its texts: its own when it is one artifact, else 1 (as given)."""
    return named.recipe(lm, progress=progress), named.uses[0].strength if len(named.uses) == 1 else 1.0


def steered_where(named: "Named", positions: str) -> str:
    """The positions of --use, or else of --positions. Raises `UsageError` where both are given and differ."""
    if "all" not in (named.positions, positions) and named.positions != positions:
        raise UsageError(f"--use says @{named.positions} and --positions {positions}; give one of them.")
    return positions if named.positions == "all" else named.positions


def everywhere(named: "Named") -> "Named":
    """`named`, for verbs that steer all tokens. Raises `UsageError` where others are meant."""
    if named.positions != "all":
        raise UsageError(f"--use says @{named.positions}; this steers all tokens: leave that out.")
    return named


def given_prompts(prompt: Sequence[str] | None, file: Path | None = None) -> list[str]:
    """The texts of --prompt, then the lines of --prompts; where neither is given, what is piped in.

    Raises `UsageError` where there is none.
    """
    if [*(prompt or []), str(file)].count(STDIN) > 1:
        raise UsageError("Standard input can be read once only; give one - among --prompt and --prompts.")
    if prompt is None and file is None:
        piped = "" if sys.stdin is None or sys.stdin.isatty() else _standard_input()
        if not piped:
            raise UsageError("There is no prompt; give --prompt TEXT or --prompts FILE, or pipe one in.")
        return [piped]
    texts = [_standard_input() if text == STDIN else text for text in prompt or []]
    return [*texts, *(read_prompts(file) if file is not None else [])]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, or of standard input for `-`: one a line. Raises `UsageError` where there is none."""
    if str(path) == STDIN:
        text, named = _standard_input(), "Standard input"
    else:
        named = f"The prompts file {str(path)[:200]!r}"
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UsageError(f"There is no such file as {str(path)[:200]!r}; --prompts takes a text file.") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{named} could not be read as UTF-8 text ({reason}).") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UsageError(f"{named} holds no prompt; write one a line.")
    return found


def _standard_input() -> str:
    """What is piped in, which several processes share, without the line breaks at its end; empty where it cannot be
    read."""
    return processes.agreed(_read_standard_input)


def _read_standard_input() -> str:
    try:
        return sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"Standard input is not UTF-8 text ({error}).") from error
    except OSError:
        return ""


def numbers(text: str, what: str) -> list[float]:
    """Numbers parted by commas or spaces. Raises `UsageError` where there is none or one is no number."""
    try:
        found = [float(one) for one in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"{what} is {text[:60]!r}; give numbers parted by commas, like 0,1,2.") from error
    if not found:
        raise UsageError(f"{what} is empty; give numbers parted by commas, like 0,1,2.")
    return found


def whole_numbers(text: str, what: str) -> list[int]:
    """Layer numbers parted by commas. Raises `UsageError`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{what} is {text[:60]!r}; give layer numbers parted by commas, like 0,1.")
    return [int(part) for part in parts]
