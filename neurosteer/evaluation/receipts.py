"""Receipts of evaluations as plain JSON data.

    {"schema_version": 2, "kind": "evaluation",
     "model": {"name", "revision", "fingerprint", "dtype", "template_options"},
     "recipe": [{"name", "kind", "method", "operation", "strength", "multiplier", "amount_up", "amount_down",
                 "calibrated"}],
     "judge": {"name", "accuracy", "sensitivity", "specificity", "n_accuracy", "is_weak"},
     "settings": {"strengths", "n_prompts", "prompts_sha256", "samples", "max_new_tokens", "sampling": {...},
                  "n_random", "permuted": {"n", "why_not"}, "instructions": [for +, for −], "kl": {...},
                  "intervals": {...}, "repetition", "sha256"},
     "rows": [{"kind", "strength", "n_random", "n_texts", "share", "share_low", "share_high", "corrected",
               "corrected_low", "corrected_high", "mean", "mean_low", "mean_high", "change", "change_low",
               "change_high", "wrong_way", "kl_p95", "perplexity", "quality", "distinct_2", "tokens", "off_script",
               "twins": [{"factor", "kl", "reached"}]}],
     "differences": [{"of", "strength", "from", "from_strength", "share", "share_low", "share_high",
                      "twin_mean", "twin_sd", "z", "is_clear"}],
     "table": {"title", "columns", "rows", "notes"}, "metrics": [{"type", "name", "value"}],
     "dataset": {"type", "name"}}

`kind` of a row is `steered`, `unsteered`, `again` (no steering, with other random numbers: what chance does), `random`
or `permuted` (`n_random` twins, which prompts and samples take in turn; of each, by what `factor` its strength is that
of the artifact, and the KL it was brought to) or `instruction` (its strength +1 or −1 says which one; its perplexity is
that after the bare prompt). Shares are from 0 to 1, the ends of 95% intervals stand beside them; `kl_p95` is in nats,
`perplexity` a ratio to the unsteered texts'; repetition is counted on tokens. A difference is between shares over the
same prompts and samples: of the texts steered at a strength from those steered the other way, or from twins'.
A figure that there is none of is null. Numbers are rounded, so that the last bits of a machine do not show. `table`,
`metrics` and `dataset` are what cards show.

Receipts of schema 1 have no `again`, `permuted`, `corrected`, `twins`, `differences` and `notes`; their random twins
had the artifact's dose, whatever KL that came to, and repetition was counted on words.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.evaluation.controls import Kind, control_name
from neurosteer.evaluation.intervals import LEVEL, N_RESAMPLES, Estimate
from neurosteer.evaluation.judges import Judge, accuracy_text
from neurosteer.evaluation.metrics import Difference, Figures
from neurosteer.evaluation.texts import TextPlan
from neurosteer.measuring.equal_kl import AtKL
from neurosteer.models.language_model import LanguageModel

SCHEMA_VERSION = 2
KIND = "evaluation"
_DIGITS = 4
_NAMES = {
    "unsteered": "no steering",
    "again": "no steering, written again",
    "instruction": "the instruction in plain words",
}
_ORDER = {"steered": 0, "unsteered": 0, "again": 1, "random": 2, "permuted": 3, "instruction": 4}
COLUMNS = (
    "",
    "Strength",
    "Shows the behaviour (95% interval)",
    "Corrected for the judge",
    "Mean score",
    "Wrong-way prompts",
    "KL p95, nats",
    "Perplexity ×",
    "4-gram quality",
    "Distinct-2",
    "Tokens",
    "Empty or off-script",
)


@dataclass(frozen=True)
class Measured:
    """Figures of a group, and what they are of; of twins, how each came to the artifact's KL."""

    kind: Kind
    strength: float
    figures: Figures
    twins: tuple[AtKL, ...] = ()


@dataclass(frozen=True)
class Compared:
    """The difference of the steered texts at `strength` from those of kind `other` at `from_strength`."""

    strength: float
    other: Kind
    from_strength: float
    found: Difference


def receipt_of(
    lm: LanguageModel,
    recipe: Recipe,
    judge: Judge,
    plan: TextPlan,
    measured: Sequence[Measured],
    compared: Sequence[Compared],
    *,
    settings: Mapping[str, Any],
) -> Receipt:
    """The receipt of an evaluation; `settings` are what the plan does not hold."""
    reference = lm.reference
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "model": {
            **{key: getattr(reference, key) for key in ("name", "revision", "fingerprint")},
            "dtype": str(lm.dtype).removeprefix("torch."),
            "template_options": dict(lm.template_options),
        },
        "recipe": [_use_data(use) for use in recipe.uses],
        "judge": {
            "name": judge.name,
            **{key: _rounded(getattr(judge, key, None)) for key in ("accuracy", "sensitivity", "specificity")},
            "n_accuracy": judge.n_accuracy,
            "is_weak": judge.is_weak,
        },
        "settings": _settings(lm, plan, measured, settings),
        "rows": [_row_data(one) for one in measured],
        "differences": [_difference_data(one) for one in compared],
    }
    data["table"] = _table(recipe, judge, plan, measured)
    data["table"]["notes"] = [_note(one, recipe) for one in compared] + _missed(measured, recipe)
    data["metrics"] = _metrics(measured)
    data["dataset"] = {"type": "prompts", "name": f"{len(plan.prompts)} prompts, judged by {judge.name}"}
    return Receipt(data)


def receipt_text(receipt: Receipt) -> str:
    """The receipt as the content of `receipt.json`: the same figures give the same bytes."""
    return json.dumps(dict(receipt.data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _use_data(use: Use) -> dict[str, Any]:
    artifact, opposite = use.artifact, Recipe((use,)).scaled(-1.0).uses[0]
    return {
        **{key: getattr(artifact, key) for key in ("name", "kind", "method", "operation")},
        "strength": use.strength,
        "multiplier": use.multiplier,
        "amount_up": use.amount,
        "amount_down": opposite.amount,
        "calibrated": artifact.calibration.measured,
    }


def _settings(
    lm: LanguageModel, plan: TextPlan, measured: Sequence[Measured], given: Mapping[str, Any]
) -> dict[str, Any]:
    prompts = json.dumps(plan.prompts, ensure_ascii=False).encode(errors="surrogatepass")
    return {
        "strengths": sorted({one.strength for one in measured if one.kind in ("steered", "unsteered")}),
        "n_prompts": len(plan.prompts),
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        "samples": plan.samples,
        "max_new_tokens": plan.max_new_tokens,
        "sampling": vars(plan.sampling),
        "n_random": max((len(one.twins) for one in measured if one.kind == "random"), default=0),
        **given,
        "intervals": {
            "level": LEVEL,
            "shares": "Wilson, with the design effect of prompts and twins",
            "differences": "paired bootstrap of prompts and twins",
            "resamples": N_RESAMPLES,
        },
        "repetition": "tokens",
        "sha256": plan.sha256(lm),
    }


def _row_data(one: Measured) -> dict[str, Any]:
    found = one.figures
    twins = [{"factor": twin.factor, "kl": _significant(twin.kl), "reached": twin.reached} for twin in one.twins]
    return {
        "kind": one.kind,
        "strength": one.strength,
        "n_random": len(one.twins),
        "n_texts": found.n_texts,
        **_estimate("share", found.share),
        **_estimate("corrected", found.corrected),
        **_estimate("mean", found.mean),
        **_estimate("change", found.change),
        **{
            key: _rounded(getattr(found, key))
            for key in ("wrong_way", "kl_p95", "perplexity", "quality", "distinct_2", "tokens", "off_script")
        },
        **({"twins": twins} if twins else {}),
    }


def _difference_data(one: Compared) -> dict[str, Any]:
    found = one.found
    return {
        "of": "steered",
        "strength": one.strength,
        "from": one.other,
        "from_strength": one.from_strength,
        **_estimate("share", found.share),
        **{key: _rounded(getattr(found, key)) for key in ("twin_mean", "twin_sd", "z")},
        "is_clear": found.is_clear(one.strength),
    }


def _estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    ends = (None,) * 3 if found is None else (found.value, found.low, found.high)
    return {key: _rounded(end) for key, end in zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, _DIGITS)


def _significant(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


# --- for cards -------------------------------------------------------------------------------------------------------


def _table(recipe: Recipe, judge: Judge, plan: TextPlan, measured: Sequence[Measured]) -> dict[str, Any]:
    """By strength, each figure with its controls beside it."""
    shown = sorted(measured, key=lambda one: (one.strength, _ORDER[one.kind]))
    samples = f" × {plan.samples} samples" if plan.samples > 1 else ""
    texts = f"{len(plan.prompts)} prompts{samples}, at most {plan.max_new_tokens} tokens each"
    return {
        "title": f"Judge: {judge.name}; {accuracy_text(judge)}. Per figure {texts}.",
        "columns": list(COLUMNS),
        "rows": [[_label(one, recipe), f"{one.strength:+g}" if one.strength else "0", *_cells(one)] for one in shown],
    }


def _label(one: Measured, recipe: Recipe) -> str:
    if one.kind == "steered":
        return " + ".join(use.artifact.name for use in recipe.uses)
    return f"{_twins(one.kind, recipe)} ({len(one.twins)})" if one.twins else _NAMES[one.kind]


def _twins(kind: Kind, recipe: Recipe) -> str:
    return control_name(recipe) if kind == "random" else "built from shuffled labels"


def _note(one: Compared, recipe: Recipe) -> str:
    """A difference as a sentence."""
    share = one.found.share
    points = f"{100 * share.value:+.0f} points (95% interval {100 * share.low:+.0f} to {100 * share.high:+.0f})"
    clear = "clear" if one.found.is_clear(one.strength) else "not clear"
    if one.other == "steered":
        return f"From strength {one.from_strength:+g} to {one.strength:+g} the share moves by {points}: {clear}."
    z = (
        ""
        if one.found.z is None
        else f"; its effect lies {one.found.z:.1f} standard deviations beyond those of the twins"
    )
    return f"At strength {one.strength:+g}, {points} from {_twins(one.other, recipe)} at the same KL: {clear}{z}."


def _missed(measured: Sequence[Measured], recipe: Recipe) -> list[str]:
    """Which twins are not at the artifact's KL."""
    found = []
    for one in measured:
        missed = [twin for twin in one.twins if not twin.reached]
        if missed:
            came = f"{min(twin.kl for twin in missed):.2g} to {max(twin.kl for twin in missed):.2g} nats"
            what = f"{len(missed)} of {len(one.twins)} {_twins(one.kind, recipe)}"
            found.append(f"At strength {one.strength:+g}, {what} could not be brought to the artifact’s KL: {came}.")
    return found


def _cells(one: Measured) -> list[str]:
    row = _row_data(one)
    kl = _shown(row["kl_p95"], "{:.2f}", "–" if one.kind == "instruction" else "not finite")
    return [
        f"{row['share']:.1%} ({row['share_low']:.1%} to {row['share_high']:.1%})",
        _shown(row["corrected"], "{:.1%}"),
        f"{row['mean']:.2f}",
        _shown(row["wrong_way"], "{:.1%}"),
        kl,
        _shown(row["perplexity"], "{:.2f}"),
        f"{row['quality']:.3f}",
        f"{row['distinct_2']:.2f}",
        f"{row['tokens']:.1f}",
        f"{row['off_script']:.1%}",
    ]


def _shown(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None else form.format(value)


def _metrics(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """What the Hub lists of a model, at strengths −1, 0 and +1 (or what there is beside 0)."""
    own = [one for one in measured if one.kind in ("steered", "unsteered")]
    near = [one for one in own if one.strength in (-1.0, 0.0, 1.0)] or own
    found = []
    for one in near:
        row, at = _row_data(one), f"at strength {one.strength:+g}" if one.strength else "unsteered"
        found.append({"type": "share", "name": f"Share that shows the behaviour, {at}", "value": row["share"]})
        for key, name in (("kl_p95", "95th percentile of KL, nats"), ("perplexity", "Perplexity ratio")):
            if one.strength and row[key] is not None:
                found.append({"type": key, "name": f"{name}, {at}", "value": row[key]})
    return found
