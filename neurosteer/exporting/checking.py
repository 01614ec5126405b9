"""Whether what was written steers as the recipe does: a greedy text and the logits of every token of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.errors import ArtifactError
from neurosteer.examples.files import calibration_prompts
from neurosteer.models.hooks import Hook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.forcing import ForcedText, forced_logits
from neurosteer.steering.session import Row, Session

MAX_DIFFERENCE = 1e-4
"""How far logits in float32 may lie apart; of large logits (above 10) a hundred-thousandth of the largest."""

_NEW_TOKENS = 16


@dataclass(frozen=True)
class Agreement:
    """The largest `difference` of a logit between the recipe and what was written, over the tokens of greedy texts;
    `effect` is the largest one between the recipe and the plain model, for comparison."""

    difference: float
    effect: float


def check_agrees(lm: LanguageModel, recipe: Recipe, copy: LanguageModel, hooks: Sequence[Hook], what: str) -> Agreement:
    """Hold `copy`, which has the recipe in it or gets it by `hooks`, against `lm` steered by `recipe`.

    Raises `ArtifactError` naming `what` was written where it writes another text or has other logits.
    """
    texts = _greedy_texts(lm, recipe)
    ours, plain = _logits(lm, recipe, texts), _logits(lm, UNSTEERED, texts)
    with hooked(hooks):
        same_texts = _greedy_texts(copy, UNSTEERED) == texts
        theirs = _logits(copy, UNSTEERED, texts)
    difference = float((ours - theirs).abs().max())
    found = Agreement(difference, float((ours - plain).abs().max()))
    most = max(MAX_DIFFERENCE, 0.1 * MAX_DIFFERENCE * float(ours.abs().max()))
    if not difference <= most or not same_texts:  # also where it is no number
        texts_are = "the same" if same_texts else "another"
        raise ArtifactError(
            f"The {what} that was written does not steer as the recipe does and was removed: read again, its logits "
            f"differ by up to {difference:.3g} (at most {most:.2g} is due to rounding) and it writes {texts_are} text; "
            "steer with NeuroSteer itself, and report this."
        )
    return found


def _greedy_texts(lm: LanguageModel, recipe: Recipe) -> list[ForcedText]:
    prompts = calibration_prompts()
    rows = [Row(prompt, recipe) for prompt in (prompts[0], prompts[-1])]
    written = Session(lm).generate(rows, max_new_tokens=_NEW_TOKENS, sampling=Sampling(greedy=True))
    texts = [[*lm.prompt_ids(row.prompt), *row.ids] for row in written]
    return [ForcedText(ids, 1, len(ids)) for ids in texts]


def _logits(lm: LanguageModel, recipe: Recipe, texts: Sequence[ForcedText]) -> Tensor:
    """`[n, vocabulary]`, row by row of the texts."""
    parts = list(forced_logits(lm, texts, [recipe] * len(texts), what="The check"))
    rows, steps = torch.cat([part.rows for part in parts]), torch.cat([part.steps for part in parts])
    order = sorted(range(len(rows)), key=lambda place: (int(rows[place]), int(steps[place])))
    return torch.cat([part.logits.cpu() for part in parts])[order]
