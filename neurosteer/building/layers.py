"""Layers as people write them."""

from collections.abc import Iterable

from neurosteer.errors import UsageError

LayerChoice = str | int | Iterable[int]


def parse_layers(layers: LayerChoice, n_layers: int) -> tuple[int, ...] | None:
    """Layer numbers in ascending order, or None for `auto`. Raises `UsageError` naming the allowed forms."""
    if isinstance(layers, str):
        text = layers.strip().lower()
        if text == "auto":
            return None
        if text == "all":
            return tuple(range(n_layers))
        layers = _parse_layer_text(text)
    numbers = (layers,) if isinstance(layers, int) else tuple(layers) if isinstance(layers, Iterable) else (layers,)
    if not numbers or not all(type(number) is int and 0 <= number < n_layers for number in numbers):
        raise UsageError(f"layers is {layers_shown(numbers)}; the model has layers 0 to {n_layers - 1}.")
    return tuple(sorted(set(numbers)))


def _parse_layer_text(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise UsageError(
                f"layers is {text[:60]!r}; use auto, all, a number (14), a range (10-18) or a list (3,7,9)."
            )
        if dash and not int(first) <= int(last) < int(first) + 10_000:
            raise UsageError(f"layers is {text[:60]!r}; a range runs from the lower layer to the higher.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def layers_shown(numbers: tuple[object, ...]) -> str:
    return (
        ", ".join(f"{number!r:.40}" for number in numbers[:8]) + (", …" if numbers[8:] else "") if numbers else "empty"
    )
