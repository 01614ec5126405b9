"""Layers as people write them."""

from collections.abc import Iterable, Sequence

from neurosteer.errors import UsageError

LayerChoice = str | int | Iterable[int]

MAX_LAYERS_TEXT = 1_000
"""How many characters of a text that names layers are read."""


def parse_layers(layers: LayerChoice, n_layers: int) -> tuple[int, ...] | None:
    """Layer numbers in ascending order, or None for `auto`. Raises `UsageError` naming the allowed forms.

    Each part is checked against the model before it is written out, so that no input costs more than its own length.
    """
    if isinstance(layers, str):
        text = layers[: MAX_LAYERS_TEXT + 1].strip().lower()
        if text == "auto":
            return None
        return tuple(range(n_layers)) if text == "all" else _parsed(text, n_layers)
    numbers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    if not numbers or not all(type(number) is int and 0 <= number < n_layers for number in numbers):
        raise _beyond(layers_shown(numbers), n_layers)
    return tuple(sorted(set(numbers)))


def _parsed(text: str, n_layers: int) -> tuple[int, ...]:
    if len(text) > MAX_LAYERS_TEXT:
        raise UsageError(f"layers is a text of more than {MAX_LAYERS_TEXT:,} characters; use ranges, like 0-9,12.")
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise UsageError(
                f"layers is {text[:60]!r}; use auto, all, a number (14), a range (10-18) or a list (3,7,9)."
            )
        low, high = int(first), int(last or first)
        if low > high:
            raise UsageError(f"layers is {text[:60]!r}; a range runs from the lower layer to the higher.")
        if high >= n_layers:
            raise _beyond(part.strip(), n_layers)
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def _beyond(shown: str, n_layers: int) -> UsageError:
    return UsageError(f"layers is {shown}; the model has layers 0 to {n_layers - 1}.")


def layers_shown(numbers: Sequence[object]) -> str:
    """The first few of `numbers`, for a message."""
    shown = [f"{number!r:.40}" for number in numbers[:8]] + ["…"] * (len(numbers) > 8)
    return ", ".join(shown) or "empty"
