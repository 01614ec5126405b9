"""What a circuit built from refusals does to refusing, beside a vector at the same KL and random neurons, as Markdown.

    python tests/benchmarks/refusal_table.py DATA [--limit 100] [--models refusing base] [--ways caa random]

DATA holds `train.csv` (requests to refuse and ordinary ones: artifacts are built from it), `jbb.csv` and
`benign_eval.csv` (what is measured on: the goals of JailbreakBench, ordinary requests). A cell is the share refused in
percent and, in brackets, the quality (1 − repeated 4-grams); answers are greedy, in bfloat16. Rows, for each model with
artifacts of its own: the `cna` circuit that writes the behaviour (class differences read at the last token of the
prompt, at most 0.5% of all neurons) with its neurons multiplied by 0 to 1, the same circuit shifted by class
differences, the paper's (ranked by difference) switched off, the circuit calibrated to 1 nat, a `caa` vector at the KL
of the circuit shifted by −1, and random neurons of the same layers: switched off, and shifted (each by its own spread)
to the KL of the circuit shifted by −1.
Only shares are printed; no text is kept.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import quality
from packaged import load_any
from refusals import ask, read_prompts, share_refused

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import UNSTEERED, Recipe, Use
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.twins import random_twin
from neurosteer.building.build import build
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import calibration_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.measuring.calibration import calibrate
from neurosteer.measuring.divergence import UnsteeredTexts, divergences, kl_percentile, unsteered_texts
from neurosteer.measuring.equal_kl import at_kl
from neurosteer.measuring.spreads import neuron_spreads
from neurosteer.models.language_model import LanguageModel

MODELS = {"refusing": "SmolLM2-135M-Instruct-refusing", "base": "SmolLM2-135M-Instruct", "qwen": "qwen"}
MULTIPLIERS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHIFTS = (-1.0, -1.5)


@dataclass(frozen=True)
class Way:
    """A way to steer, and its damage on neutral prompts: the 95th percentile of the per-token KL, in nats."""

    title: str
    recipe: Recipe
    kl: float = 0.0


def one_difference(artifact: Artifact) -> Artifact:
    """`artifact` with strength ±1 as plus or minus one class difference."""
    return replace(artifact, calibration=Calibration(1.0))


def ways(lm: LanguageModel, examples: ContrastSet, layers: str, wanted: Sequence[str]) -> list[Way]:
    """The ways to steer `lm`, the unsteered model first; only those whose title holds a `wanted` word, if any is."""
    settings: dict[str, Any] = {"framing": "prompt", "tokens": "last", "calibrate": False}
    circuit = one_difference(build(lm, examples, method="cna", layers=layers, **settings))
    paper = build(lm, examples, method="cna", layers="all", rank="difference", operation="scale", **settings)
    vector = build(lm, examples, method="caa", layers=layers.rpartition("-")[2], **settings)
    scaling = replace(circuit, operation="scale", calibration=Calibration(2.0))
    texts = unsteered_texts(lm, calibration_prompts())
    found = [Way("unsteered", UNSTEERED)]
    for multiplier in MULTIPLIERS:
        found.append(Way(f"`cna` × {multiplier:g}", Recipe((Use(scaling, multiplier=multiplier),))))
    found.append(Way("paper's `cna` × 0", Recipe((Use(paper, multiplier=0.0),))))
    found += [Way(f"`cna` shifted by {shift:g}", Recipe.of((circuit, shift))) for shift in SHIFTS]
    found.append(Way("`cna` at 1 nat", Recipe.of((calibrate(lm, circuit, texts=texts), -1.0))))
    target = damage(lm, texts, [Recipe.of((circuit, SHIFTS[0]))])[0]
    matched = calibrate(lm, vector, target_kl=target, texts=texts)
    found.append(Way(f"`caa`, KL of {SHIFTS[0]:g}", Recipe.of((matched, -1.0))))
    found.append(Way("random neurons × 0", Recipe((Use(random_twin(scaling, 0), multiplier=0.0),))))
    twin = random_twin(circuit, 0, spreads=neuron_spreads(lm, circuit.layers, texts))
    (shifted,) = at_kl(lm, [Recipe.of((twin, SHIFTS[0]))], [target], texts)
    found.append(Way(f"random neurons shifted, KL of {SHIFTS[0]:g}", shifted.recipe))
    if wanted:
        found = [way for way in found if any(word in way.title for word in wanted)]
    kls = damage(lm, texts, [way.recipe for way in found])
    return [replace(way, kl=kl) for way, kl in zip(found, kls, strict=True)]


def damage(lm: LanguageModel, texts: UnsteeredTexts, recipes: Sequence[Recipe]) -> list[float]:
    """The 95th percentile of the per-token KL from the unsteered model on neutral prompts, in nats."""
    return [kl_percentile(values.flatten().tolist(), 95.0) for values in divergences(lm, texts, recipes)]


def cell(lm: LanguageModel, prompts: Sequence[str], recipe: Recipe, tokens: int) -> str:
    """Share refused in percent, and quality."""
    texts = [row.text for row in ask(lm, prompts, recipe, tokens=tokens)]
    return f"{100 * share_refused(texts):.0f} ({quality(texts):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", help="searched for neurons, the vector is at the last (the first two thirds)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--limit", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["refusing", "base"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="*", default=(), help="only rows whose title holds one of these words")
    arguments = parser.parse_args()
    examples = read_examples(arguments.data / "train.csv", name="refusal")
    sets = [read_prompts(arguments.data / file)[: arguments.limit] for file in ("jbb.csv", "benign_eval.csv")]
    print("| model | | JailbreakBench: % refused (quality) | ordinary: % refused (quality) | p95 KL, nats |")
    print("|---|---|---|---|---|")
    for short in arguments.models:
        lm = load_any(MODELS[short], device=arguments.device, dtype="bfloat16")
        for way in ways(lm, examples, arguments.layers or f"0-{2 * lm.n_layers // 3}", arguments.ways):
            cells = [cell(lm, prompts, way.recipe, arguments.tokens) for prompts in sets]
            print(f"| {short} | {way.title} | {' | '.join(cells)} | {way.kl:.2f} |", flush=True)


if __name__ == "__main__":
    main()
