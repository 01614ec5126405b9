"""Effect at equal damage: how far a behaviour can be moved before the text suffers.

For each direction (strength + and −) the largest dose of a fixed grid is taken whose continuations keep their
perplexity under the unsteered model within 1.5 × of the unsteered continuations' and their 4-gram quality at 0.95 or
more. What the judge then says is measured on fresh samples at that dose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from measuring import Judge, quality

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

GRIDS = {
    "add": (0.05, 0.075, 0.11, 0.16, 0.24, 0.35, 0.5, 0.75, 1.1),
    "shift": (1.0, 1.5, 2.2, 3.3, 5.0, 7.5, 11.0, 16.0, 24.0),
    "scale": (1.1, 1.2, 1.35, 1.6, 2.0, 2.7, 3.8, 5.5, 8.0),
}
MAX_PERPLEXITY_RATIO, MIN_QUALITY = 1.5, 0.95
SEARCH_SEED, MEASURE_SEED = 0, 1


@dataclass(frozen=True)
class Damage:
    """`perplexity` is relative to the unsteered continuations'."""

    perplexity: float
    quality: float

    @property
    def allowed(self) -> bool:
        return self.perplexity <= MAX_PERPLEXITY_RATIO and self.quality >= MIN_QUALITY


@dataclass(frozen=True)
class Moved:
    """One direction at its largest allowed dose (0 where no dose of the grid is allowed)."""

    amount: float
    share: float
    damage: Damage


class Bench:
    """One model and set of prompts: continuations, what they cost, and their unsteered reference."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[str], *, tokens: int, search: int, measure: int) -> None:
        self.lm, self.session, self.prompts, self.tokens = lm, Session(lm), prompts, tokens
        self.search, self.measure = search, measure
        self.plain = {seed: self.write([UNSTEERED], seed)[0] for seed in (SEARCH_SEED, MEASURE_SEED)}
        self.reference = {seed: self.log_perplexity(rows) for seed, rows in self.plain.items()}

    def write(
        self, recipes: Sequence[Recipe], seed: int, ask: Callable[[str], str] = lambda prompt: prompt
    ) -> list[list[Row]]:
        """The prompts' continuations under each recipe; `ask` may put an instruction into the prompt."""
        samples = self.search if seed == SEARCH_SEED else self.measure
        cells = [(prompt, sample) for prompt in self.prompts for sample in range(samples)]
        rows = [Row(ask(prompt), recipe, sample) for recipe in recipes for prompt, sample in cells]
        written = self.session.generate(rows, max_new_tokens=self.tokens, sampling=Sampling(seed=seed), batch_rows=256)
        groups = [written[first : first + len(cells)] for first in range(0, len(written), len(cells))]
        return [
            [replace(row, prompt=prompt) for row, (prompt, _) in zip(group, cells, strict=True)] for group in groups
        ]

    def damage(self, rows: Sequence[Row], seed: int) -> Damage:
        ratio = float(torch.tensor(self.log_perplexity(rows) - self.reference[seed]).exp())
        return Damage(ratio, quality([row.text for row in rows]))

    def log_perplexity(self, rows: Sequence[Row]) -> float:
        """Mean negative log-likelihood (nats) of the continuations' tokens under the unsteered model."""
        total, count = 0.0, 0
        prompts = {prompt: self.lm.prompt_ids(prompt) for prompt in self.prompts}
        pairs = [(prompts[str(row.prompt)], self.lm.token_ids(row.text)) for row in rows if row.text]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        for first in range(0, len(pairs), 16):
            batch = pairs[first : first + 16]
            width = max(len(prompt) + len(text) for prompt, text in batch)
            ids = torch.full((len(batch), width), self.lm.pad_id)
            wanted = torch.zeros((len(batch), width), dtype=torch.bool)
            for row, (prompt, text) in enumerate(batch):
                ids[row, : len(prompt) + len(text)] = torch.tensor(prompt + text)
                wanted[row, len(prompt) : len(prompt) + len(text)] = True
            shortest = min(len(prompt) for prompt, _ in batch)
            with torch.inference_mode():  # padded on the right, where a causal model does not look
                hidden = self.lm.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, shortest - 1 : -1]
                scores = self.lm.model.get_output_embeddings()(hidden[wanted[:, shortest:]]).float()
            targets = ids[:, shortest:][wanted[:, shortest:]]
            total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
            count += len(targets)
        return total / max(1, count)

    def move(self, artifact: Artifact, judge: Judge) -> tuple[Moved, Moved]:
        """The artifact at strength + and at strength −, each at its largest allowed dose."""
        grid = GRIDS[artifact.operation]
        places = self._largest(artifact, grid)
        recipes = [self._at(artifact, grid, place, sign) for sign, place in places.items()]
        moved = []
        for place, rows in zip(places.values(), self.write(recipes, MEASURE_SEED), strict=True):
            share = judge.share_positive([row.text for row in rows])
            moved.append(Moved(grid[place] if place >= 0 else 0.0, share, self.damage(rows, MEASURE_SEED)))
        return moved[0], moved[1]

    def _largest(self, artifact: Artifact, grid: Sequence[float]) -> dict[int, int]:
        """Places in the grid by sign, −1 where none is allowed; by bisection, both signs in one batch."""
        allowed, refused = {1: -1, -1: -1}, {1: len(grid), -1: len(grid)}
        while True:
            todo = {sign: (allowed[sign] + refused[sign]) // 2 for sign in allowed if refused[sign] - allowed[sign] > 1}
            if not todo:
                return allowed
            written = self.write([self._at(artifact, grid, place, sign) for sign, place in todo.items()], SEARCH_SEED)
            for (sign, place), rows in zip(todo.items(), written, strict=True):
                bound = allowed if self.damage(rows, SEARCH_SEED).allowed else refused
                bound[sign] = place

    def _at(self, artifact: Artifact, grid: Sequence[float], place: int, sign: int) -> Recipe:
        if place < 0:
            return UNSTEERED
        return Recipe.of((replace(artifact, calibration=Calibration(grid[place])), float(sign)))
