"""What a recipe is compared with, always in the same table: no steering (twice, to show what chance does), twins that
were built from nothing at the same KL, and the instruction in plain words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.building.described import asked_to

Kind = Literal["steered", "unsteered", "again", "random", "permuted", "instruction"]
TwinKind = Literal["random", "permuted"]

INSTRUCTIONS = {
    "sentiment": ("Write in a very positive, delighted tone.", "Write in a very negative, disappointed tone."),
    "politeness": ("Be very polite and courteous.", "Be blunt and impolite."),
    "formality": ("Write in a very formal style.", "Write in a very casual, informal style."),
    "stance": ("Argue in favour of what is discussed.", "Argue against what is discussed."),
    "civility": ("Write in a friendly, civil way.", "Write in a crude, insulting way."),
    "gratitude": ("Express a lot of gratitude.", "Be ungrateful and complain."),
    "refusal": ("Refuse politely to answer.", "Answer helpfully and do not refuse."),
}
"""What asks for a behaviour, and for its opposite, in plain words; by a word in an artifact's name."""


@dataclass(frozen=True)
class Group:
    """Texts of all prompts and samples that are counted together.

    `recipes` is one, or one for each twin: then prompts and samples take them in turn. `instruction` stands before the
    prompts of an instructed group, whose `strength` is +1 or −1. `again` says that other random numbers are drawn than
    for the other groups.
    """

    kind: Kind
    strength: float
    recipes: tuple[Recipe, ...] = (UNSTEERED,)
    instruction: str = ""

    @property
    def again(self) -> bool:
        return self.kind == "again"

    @property
    def has_twins(self) -> bool:
        return self.kind in ("random", "permuted")

    def turn(self, prompt: int, sample: int) -> int:
        """Which of `recipes` a sample of that prompt (by its place) is written under."""
        return (prompt + sample) % len(self.recipes)

    def ask(self, prompt: str) -> str:
        """What the model is given."""
        return asked_to(self.instruction, prompt) if self.instruction else prompt


def groups(
    recipe: Recipe,
    strengths: Sequence[float],
    instructions: tuple[str, str],
    twins: Mapping[tuple[TwinKind, float], tuple[Recipe, ...]],
) -> list[Group]:
    """The unsteered groups first, then the recipe at every strength but 0, then `twins` by what they are and the
    strength they are compared at, then the instruction."""
    up, down = instructions
    return [
        Group("unsteered", 0.0),
        Group("again", 0.0),
        *(Group("steered", strength, (recipe.scaled(strength),)) for strength in moved(strengths)),
        *(Group(kind, strength, recipes) for (kind, strength), recipes in twins.items()),
        Group("instruction", 1.0, instruction=up),
        Group("instruction", -1.0, instruction=down),
    ]


def moved(strengths: Sequence[float]) -> list[float]:
    """Different strengths in ascending order, without 0."""
    return sorted({float(strength) for strength in strengths} - {0.0})


def n_groups(strengths: Sequence[float]) -> int:
    """How many groups there are with random twins, and no others."""
    return 2 + len(moved(strengths)) + len(control_strengths(strengths)) + 2


def control_strengths(strengths: Sequence[float]) -> list[float]:
    """At which of `strengths` twins are tried: −1 and +1, or where they are missing the weakest of that sign.

    Not at all of them, for what it would cost; beyond these, the nearest is what there is to compare with.
    """
    chosen = []
    for sign in (-1.0, 1.0):
        there = [strength for strength in moved(strengths) if strength * sign > 0]
        if there:
            chosen.append(sign if sign in there else min(there, key=abs))
    return chosen


def default_instructions(recipe: Recipe) -> tuple[str, str]:
    """What asks in plain words for what `recipe` does at strength +1, and at −1: for one of the catalogued behaviours
    by its name in that of the first artifact, else 'Write in a NAME way.' and its opposite."""
    first = recipe.uses[0]
    name = first.artifact.name.lower()
    behaviour = next((word for word in INSTRUCTIONS if word in name), None)
    plain = " ".join(first.artifact.name.replace("-", " ").replace("_", " ").split())
    up, down = (
        INSTRUCTIONS[behaviour]
        if behaviour is not None
        else (f"Write in a {plain} way.", f"Write in a way that is the opposite of {plain}.")
    )
    opposite = first.strength < 0 or (first.multiplier is not None and first.multiplier < 1)
    return (down, up) if opposite else (up, down)


def control_name(recipe: Recipe) -> str:
    """What the random twins of `recipe` are, in words."""
    circuits = [isinstance(use.artifact, NeuronCircuit) for use in recipe.uses]
    if all(circuits):
        return "random neurons"
    return "random directions and neurons" if any(circuits) else "random directions"
