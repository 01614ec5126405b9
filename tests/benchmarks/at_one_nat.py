"""Effect at equal KL: artifacts solved by the library's own calibration, and what a judge says of their texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from measuring import Judge, quality

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.measuring.calibration import calibrate
from neurosteer.measuring.divergence import unsteered_texts
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.session import Session

HEADING = (
    "| | % judged positive at −1 / 0 / +1 | between | 4-gram quality at −1 / +1 | p95 KL at −1 / +1, nats |\n"
    "|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Moved:
    """What an artifact does at strength −1 and at +1: shares in percent, 4-gram quality, p95 KL in nats."""

    shares: tuple[float, float]
    qualities: tuple[float, float]
    kls: tuple[float | None, float | None]

    @property
    def between(self) -> float:
        """Percentage points from −1 to +1."""
        return self.shares[1] - self.shares[0]


class AtOneNat:
    """Measures artifacts on the same prompts, samples and judge, each sign solved by itself to the same p95 KL.

    The KL is solved on the prompts that the texts are written for, so that all are compared at the same damage.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[str],
        judge: Judge,
        *,
        samples: int,
        tokens: int,
        target_kl: float = 1.0,
    ) -> None:
        self.lm, self.prompts, self.judge, self.target_kl = lm, tuple(prompts), judge, target_kl
        self.samples, self.tokens = samples, tokens
        self.texts = unsteered_texts(lm, self.prompts)
        self.unsteered = judge.share_positive(self._written(UNSTEERED, [0.0])[0])

    def _written(self, recipe: Recipe, strengths: Sequence[float]) -> list[list[str]]:
        """The texts of each strength; all decode together."""
        rows = Session(self.lm).sweep(
            recipe,
            strengths,
            self.prompts,
            samples=self.samples,
            max_new_tokens=self.tokens,
            batch_rows=len(strengths) * len(self.prompts) * self.samples,
        )
        return [[row.text for row in rows if row.strength == strength] for strength in strengths]

    def move(self, artifact: Artifact) -> Moved:
        """Whatever calibration the artifact has is found anew."""
        solved = calibrate(self.lm, artifact, target_kl=self.target_kl, texts=self.texts)
        down, up = self._written(Recipe.of(solved), [-1.0, 1.0])
        found = solved.calibration
        return Moved(
            (self.judge.share_positive(down), self.judge.share_positive(up)),
            (quality(down), quality(up)),
            (found.kl_down, found.kl),
        )

    def cells(self, moved: Moved) -> list[str]:
        """The figures of a row, as under `HEADING`."""
        return [
            f"{moved.shares[0]:.0f} / {self.unsteered:.0f} / {moved.shares[1]:.0f}",
            f"{moved.between:+.0f}",
            f"{moved.qualities[0]:.3f} / {moved.qualities[1]:.3f}",
            " / ".join("–" if kl is None else f"{kl:.2f}" for kl in moved.kls),
        ]
