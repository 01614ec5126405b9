"""Effect at equal damage: which rank and operation of `cna`, and which framing, steers best.

    python tests/benchmarks/equal_kl.py DATA [--kl 1.0] [--samples 4] [--only caa]

DATA as for `sentiment_effect.py`. Each variant's amount (dose, multiplier, differences) is solved, for each sign by
itself, so that the 95th percentile of the per-token KL from the unsteered model is `--kl` nats; then the share of
continuations that the judge calls positive is printed. A variant that cannot reach the KL keeps its largest amount.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import Continuation, Judge, kl_p95, quality, unsteered_continuation

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.building.build import build
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.steering.session import Row, Session, sweep_rows

CNA: dict[str, Any] = {"method": "cna", "framing": "answer", "tokens": "mean"}
VARIANTS: dict[str, dict[str, Any]] = {
    "caa, answer": {"method": "caa", "framing": "answer"},
    "caa, raw": {"method": "caa", "framing": "raw"},
    "caa, layers 8-24": {"method": "caa", "layers": "8-24"},
    "probe": {"method": "probe"},
    "pca": {"method": "pca"},
    "cna write shift": {**CNA, "rank": "write", "operation": "shift"},
    "cna write scale": {**CNA, "rank": "write", "operation": "scale"},
    "cna dprime shift": {**CNA, "rank": "dprime", "operation": "shift"},
    "cna dprime scale": {**CNA, "rank": "dprime", "operation": "scale"},
    "cna difference shift": {**CNA, "rank": "difference", "operation": "shift"},
    "cna difference scale": {**CNA, "rank": "difference", "operation": "scale"},
    "cna paper (last token)": {"method": "cna", "rank": "difference", "operation": "scale"},
}
BOUNDS = {"add": (0.01, 1.5), "shift": (0.2, 60.0), "scale": (1.02, 12.0)}


def solve(lm: LanguageModel, texts: Continuation, artifact: Artifact, sign: float, target: float) -> float:
    """The amount at which p95 KL is `target`, by bisection of its logarithm."""
    low, high = BOUNDS[artifact.operation]
    for _ in range(9):
        middle = math.sqrt(low * high)
        trial = replace(artifact, calibration=Calibration(middle))
        if kl_p95(lm, texts, Recipe.of((trial, sign))) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    examples, judge = read_examples(arguments.data / "train.csv"), Judge(read_examples(arguments.data / "judge.csv"))
    print(f"judge: {judge.accuracy(read_examples(arguments.data / 'dev.csv')):.1f}% right on unseen texts")
    lm = load_model()
    session, texts = Session(lm), unsteered_continuation(lm, sweep_prompts())

    def written(rows: list[Row]) -> str:
        found = [row.text for row in session.generate(rows, max_new_tokens=arguments.tokens)]
        return f"{judge.share_positive(found):5.1f}% ({quality(found):.3f})"

    rows = [Row(prompt, sample=sample) for prompt in sweep_prompts() for sample in range(arguments.samples)]
    print(f"{'unsteered':24s} {written(rows)}; {len(rows)} continuations of {arguments.tokens} tokens per figure")
    print(f"{'at p95 KL ' + str(arguments.kl):24s} % positive (4-gram quality) and amount at -1, then at +1")
    for name, options in VARIANTS.items():
        if arguments.only not in name:
            continue
        artifact = build(lm, examples, calibrate=False, **options)
        parts = []
        for sign in (-1.0, 1.0):
            amount = solve(lm, texts, artifact, sign, arguments.kl)
            recipe = Recipe.of(replace(artifact, calibration=Calibration(amount)))
            parts.append(
                f"{written(sweep_rows(recipe, [sign], sweep_prompts(), samples=arguments.samples))} {amount:6.2f}"
            )
        print(f"{name:24s} {'   '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
