"""Does strength 1 mean the same everywhere? KL of the released artifacts before and after calibration.

    python tests/benchmarks/calibration_table.py [--vectors vectors]

For every artifact the 95th percentile of the per-token KL from the unsteered model, in nats, at strength −1 and +1: at
the default amounts (before) and at the calibrated ones (after), on the 40 neutral prompts, none of which calibration
uses. What is printed is Markdown, with how many artifacts lie within 0.6 to 1.6 nats at both signs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from packaged import load_any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import layers_text
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import load
from neurosteer.artifacts.strength import default_calibration
from neurosteer.examples.files import neutral_prompts
from neurosteer.measuring.calibration import N_TOKENS, PERCENTILE
from neurosteer.measuring.divergence import UnsteeredTexts, divergences, kl_percentile, unsteered_texts
from neurosteer.models.language_model import LanguageModel

LOW, HIGH = 0.6, 1.6


def four_figures(lm: LanguageModel, texts: UnsteeredTexts, artifact: Artifact) -> list[float]:
    """p95 KL at −1 and +1 before, then after."""
    plain = replace(artifact, calibration=default_calibration(artifact.operation))
    recipes = [Recipe.of((which, strength)) for which in (plain, artifact) for strength in (-1.0, 1.0)]
    return [kl_percentile(found.flatten().tolist(), PERCENTILE) for found in divergences(lm, texts, recipes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", type=Path, default=Path(__file__).parent.parent.parent / "vectors")
    arguments = parser.parse_args()
    artifacts = [load(config.parent) for config in sorted(arguments.vectors.glob("*/config.json"))]
    print("| artifact | model | method | layers | before: −1 / +1 | after: −1 / +1 |\n|---|---|---|---|---|---|")
    within = {"before": 0, "after": 0}
    measured = 0
    for name in sorted({artifact.model.name for artifact in artifacts}):
        lm = load_any(name.removeprefix("HuggingFaceTB/"))
        texts = unsteered_texts(lm, neutral_prompts(), N_TOKENS)
        for artifact in (one for one in artifacts if one.model.name == name):
            found = four_figures(lm, texts, artifact)
            pairs = {"before": found[:2], "after": found[2:]}
            measured += 1
            for when, pair in pairs.items():
                within[when] += all(LOW <= value <= HIGH for value in pair)
            shown = " | ".join(f"{pair[0]:.2f} / {pair[1]:.2f}" for pair in pairs.values())
            short = name.rpartition("/")[2]
            print(f"| {artifact.name} | {short} | {artifact.method} | {layers_text(artifact)} | {shown} |", flush=True)
    before, after = within.values()
    print(f"\nWithin {LOW} to {HIGH} nats at both signs: {before} of {measured} before, {after} after.")


if __name__ == "__main__":
    main()
