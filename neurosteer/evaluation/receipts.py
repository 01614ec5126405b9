"""Receipts of evaluations as plain JSON data.

    {"schema_version": 1, "kind": "evaluation",
     "model": {"name", "revision", "fingerprint", "dtype", "template_options"},
     "recipe": [{"name", "kind", "method", "operation", "strength", "multiplier", "amount_up", "amount_down",
                 "calibrated"}],
     "judge": {"name", "accuracy", "n_accuracy", "is_weak"},
     "settings": {"strengths", "n_prompts", "prompts_sha256", "samples", "max_new_tokens", "sampling": {...},
                  "n_random", "instructions": [for +, for −], "kl": {...}, "bootstrap": {...}, "sha256"},
     "rows": [{"kind", "strength", "n_random", "n_texts", "share", "share_low", "share_high", "mean", "mean_low",
               "mean_high", "change", "change_low", "change_high", "wrong_way", "kl_p95", "perplexity", "quality",
               "distinct_2", "tokens", "off_script"}],
     "table": {"title", "columns", "rows"}, "metrics": [{"type", "name", "value"}], "dataset": {"type", "name"}}

`kind` of a row is `steered`, `unsteered`, `random` (`n_random` twins, which prompts and samples take in turn) or
`instruction` (its strength +1 or −1 says which one; its perplexity is that after the bare prompt). Shares are from 0
to 1, the ends of 95% intervals stand beside them; `kl_p95` is in nats, `perplexity` a ratio to the unsteered texts'. A
figure that there is none of is null. Numbers are rounded, so that the last bits of a machine do not show. `table`,
`metrics` and `dataset` are what cards show.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.evaluation.controls import Kind, control_name
from neurosteer.evaluation.judges import Judge, accuracy_text
from neurosteer.evaluation.metrics import KL_PERCENTILE, LEVEL, N_RESAMPLES, Estimate, Figures
from neurosteer.evaluation.texts import Writing
from neurosteer.models.language_model import LanguageModel

SCHEMA_VERSION = 1
KIND = "evaluation"
_DIGITS = 4
_NAMES = {"unsteered": "no steering", "instruction": "the instruction in plain words"}
COLUMNS = (
    "",
    "Strength",
    "Shows the behaviour (95% interval)",
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
    """Figures of a group, and what they are of."""

    kind: Kind
    strength: float
    n_random: int
    figures: Figures


def receipt_of(
    lm: LanguageModel,
    recipe: Recipe,
    judge: Judge,
    writing: Writing,
    measured: Sequence[Measured],
    *,
    instructions: tuple[str, str],
    kl: dict[str, int],
) -> Receipt:
    """The receipt of an evaluation; `kl` says what KL was measured on."""
    reference = lm.reference
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "model": {
            "name": reference.name,
            "revision": reference.revision,
            "fingerprint": reference.fingerprint,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "template_options": dict(lm.template_options),
        },
        "recipe": [_use_data(use) for use in recipe.uses],
        "judge": {
            "name": judge.name,
            "accuracy": _rounded(judge.accuracy),
            "n_accuracy": judge.n_accuracy,
            "is_weak": judge.is_weak,
        },
        "settings": _settings(lm, writing, measured, instructions, kl),
        "rows": [_row_data(one) for one in measured],
    }
    data["table"] = _table(recipe, judge, writing, measured)
    data["metrics"] = _metrics(measured)
    data["dataset"] = {"type": "prompts", "name": f"{len(writing.prompts)} prompts, judged by {judge.name}"}
    return Receipt(data)


def receipt_text(receipt: Receipt) -> str:
    """The receipt as the content of `receipt.json`: the same figures give the same bytes."""
    return json.dumps(dict(receipt.data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _use_data(use: Use) -> dict[str, Any]:
    artifact, opposite = use.artifact, Recipe((use,)).scaled(-1.0).uses[0]
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "method": artifact.method,
        "operation": artifact.operation,
        "strength": use.strength,
        "multiplier": use.multiplier,
        "amount_up": use.amount,
        "amount_down": opposite.amount,
        "calibrated": artifact.calibration.measured,
    }


def _settings(
    lm: LanguageModel,
    writing: Writing,
    measured: Sequence[Measured],
    instructions: tuple[str, str],
    kl: dict[str, int],
) -> dict[str, Any]:
    prompts = json.dumps(writing.prompts, ensure_ascii=False).encode(errors="surrogatepass")
    sampling = writing.sampling
    return {
        "strengths": sorted({one.strength for one in measured if one.kind in ("steered", "unsteered")}),
        "n_prompts": len(writing.prompts),
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        "samples": writing.samples,
        "max_new_tokens": writing.max_new_tokens,
        "sampling": vars(sampling),
        "n_random": max(one.n_random for one in measured),
        "instructions": list(instructions),
        "kl": {**kl, "percentile": KL_PERCENTILE},
        "bootstrap": {"resamples": N_RESAMPLES, "of": "prompts", "level": LEVEL},
        "sha256": writing.sha256(lm),
    }


def _row_data(one: Measured) -> dict[str, Any]:
    found = one.figures
    return {
        "kind": one.kind,
        "strength": one.strength,
        "n_random": one.n_random,
        "n_texts": found.n_texts,
        **_estimate("share", found.share),
        **_estimate("mean", found.mean),
        **_estimate("change", found.change),
        **{
            key: _rounded(getattr(found, key))
            for key in ("wrong_way", "kl_p95", "perplexity", "quality", "distinct_2", "tokens", "off_script")
        },
    }


def _estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    ends = (None,) * 3 if found is None else (found.value, found.low, found.high)
    return {key: _rounded(end) for key, end in zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


# --- for cards -------------------------------------------------------------------------------------------------------


def _table(recipe: Recipe, judge: Judge, writing: Writing, measured: Sequence[Measured]) -> dict[str, Any]:
    """By strength, each figure with its controls beside it."""
    order = {"steered": 0, "unsteered": 0, "random": 1, "instruction": 2}
    shown = sorted(measured, key=lambda one: (one.strength, order[one.kind]))
    samples = f" × {writing.samples} samples" if writing.samples > 1 else ""
    texts = f"{len(writing.prompts)} prompts{samples}, at most {writing.max_new_tokens} tokens each"
    return {
        "title": f"Judge: {judge.name}; {accuracy_text(judge)}. Per figure {texts}.",
        "columns": list(COLUMNS),
        "rows": [[_label(one, recipe), f"{one.strength:+g}" if one.strength else "0", *_cells(one)] for one in shown],
    }


def _label(one: Measured, recipe: Recipe) -> str:
    if one.kind == "steered":
        return " + ".join(use.artifact.name for use in recipe.uses)
    return f"{control_name(recipe)} ({one.n_random})" if one.kind == "random" else _NAMES[one.kind]


def _cells(one: Measured) -> list[str]:
    row = _row_data(one)
    kl = _shown(row["kl_p95"], "{:.2f}", "–" if one.kind == "instruction" else "not finite")
    return [
        f"{row['share']:.1%} ({row['share_low']:.1%} to {row['share_high']:.1%})",
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
