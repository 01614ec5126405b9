"""Recipes for a first click: a released artifact at a strength, in words that need no explanation."""

from typing import NamedTuple


class Preset(NamedTuple):
    label: str
    artifact: str
    strength: float


PRESETS = (
    Preset("Delighted", "sentiment", 1.0),
    Preset("Disappointed", "sentiment", -1.0),
    Preset("Formal", "formality", 1.0),
    Preset("Casual", "formality", -1.0),
    Preset("Grateful", "gratitude", 1.0),
)
