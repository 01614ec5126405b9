"""The last texts in colour: by where their words lie on the artifact, or by how much steering changes them."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from neurosteer.ui.show import html as render

if TYPE_CHECKING:
    from neurosteer.measuring.token_scores import TokenScore
    from neurosteer.models.language_model import LanguageModel
    from neurosteer.steering.session import Row

PROJECTION, KL = "projection", "kl"
KINDS = [("no", ""), ("by what is steered with", PROJECTION), ("by how much steering changes them", KL)]

_FULL_KL = 2.0  # nats: from here on the colour is at its strongest
_HELP = {
    PROJECTION: "Blue words lie on the + side of {name} as the unsteered model reads them, orange ones on the − side, "
    "against the middle of both texts.",
    KL: "The stronger the colour, the more the recipe changes what is written at that word (KL divergence between the "
    "steered and the unsteered choice, in nats; full colour from 2 on).",
}


def coloured(lm: "LanguageModel", kind: str, rows: "Sequence[Row]") -> str:
    """Both texts of a finished run as HTML. `rows` are the left and the right one; the right one's recipe counts."""
    from neurosteer.measuring.token_scores import projections, token_divergences

    recipe = rows[-1].recipe
    name = recipe.uses[0].artifact.name
    if kind == KL:
        texts = [token_divergences(lm, recipe, row.prompt, row.text) for row in rows]
        shares = [[min(1.0, score.score / _FULL_KL) for score in text] for text in texts]
    else:
        texts = [projections(lm, recipe.uses[0].artifact, row.prompt, row.text) for row in rows]
        shares = _centred(texts)
    shown = "".join(
        f"<div><h4>{title}</h4><p class='ns-coloured' dir='auto'>{_spans(text, of_text)}</p></div>"
        for title, text, of_text in zip(("Left", "Right"), texts, shares, strict=True)
    )
    help_line = f"<p class='ns-faint'>{escape(_HELP[kind].format(name=name))}</p>"
    return f"<div class='ns-card'>{help_line}<div class='ns-samples'>{shown}</div></div>"


def _centred(texts: "Sequence[Sequence[TokenScore]]") -> list[list[float]]:
    """In −1…1: less the middle of all scores, over the 95th percentile of what is left."""
    flat = sorted(score.score for text in texts for score in text)
    if not flat:
        return [[] for _ in texts]
    middle = flat[len(flat) // 2]
    off = sorted(abs(score - middle) for score in flat)
    scale = off[min(len(off) - 1, int(0.95 * len(off)))] or 1.0
    return [[max(-1.0, min(1.0, (score.score - middle) / scale)) for score in text] for text in texts]


def _spans(text: "Sequence[TokenScore]", shares: Sequence[float]) -> str:
    return "".join(
        f"<span class='ns-token ns-{'up' if share >= 0 else 'down'}' style='--share:{abs(share):.0%}' "
        f"title='{render.signed(round(score.score, 2))}'>{escape(score.text)}</span>"
        for score, share in zip(text, shares, strict=True)
    )
