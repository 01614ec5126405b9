"""What a circuit built from refusals does to refusing, beside a vector at the same KL and random neurons, as Markdown.

    python tests/benchmarks/refusal_table.py DATA [--limit 100] [--only refusing] [--ways caa random]

DATA holds `train.csv` (requests to refuse and ordinary ones: artifacts are built from it), `jbb.csv` and
`benign_eval.csv` (what is measured on). Rows: the refusing model and its base, each steered with artifacts of its own,
on the goals of JailbreakBench and on ordinary requests. A cell is the share refused in percent and, in brackets, the
quality (1 − repeated 4-grams); answers are greedy, in bfloat16. Columns: the `cna` circuit that writes the behaviour
(class differences read at the last token of the prompt, at most 0.5% of all neurons) with its neurons multiplied by
0 to 1, the same circuit shifted by class differences, the paper's (ranked by difference) switched off, the circuit
calibrated to 1 nat, a `caa` vector at the KL of the circuit shifted by −1, and random neurons of the same layers:
switched off, and shifted (each by its own spread) to the KL of the circuit shifted by −1.
Only shares are printed; no text is kept.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import quality
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
from neurosteer.models.loading import load_model

MODELS = {"refusing": "SmolLM2-135M-Instruct-refusing", "base": "SmolLM2-135M-Instruct"}
MULTIPLIERS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHIFTS = (-1.0, -1.5)


@dataclass(frozen=True)
class Column:
    """A way to steer, and its damage on neutral prompts: the 95th percentile of the per-token KL, in nats."""

    title: str
    recipe: Recipe
    kl: float = 0.0


def one_difference(artifact: Artifact) -> Artifact:
    """`artifact` with strength ±1 as plus or minus one class difference."""
    return replace(artifact, calibration=Calibration(1.0))


def columns(lm: LanguageModel, examples: ContrastSet, layers: str, wanted: Sequence[str]) -> list[Column]:
    """The ways to steer `lm`, the unsteered model first; only those whose title holds a `wanted` word, if any is."""
    settings: dict[str, Any] = {"framing": "prompt", "tokens": "last", "calibrate": False}
    circuit = one_difference(build(lm, examples, method="cna", layers=layers, **settings))
    paper = build(lm, examples, method="cna", layers="all", rank="difference", operation="scale", **settings)
    vector = build(lm, examples, method="caa", layers=layers.rpartition("-")[2], **settings)
    scaling = replace(circuit, operation="scale", calibration=Calibration(2.0))
    texts = unsteered_texts(lm, calibration_prompts())
    found = [Column("unsteered", UNSTEERED)]
    for multiplier in MULTIPLIERS:
        found.append(Column(f"`cna` × {multiplier:g}", Recipe((Use(scaling, multiplier=multiplier),))))
    found.append(Column("paper's `cna` × 0", Recipe((Use(paper, multiplier=0.0),))))
    found += [Column(f"`cna` shifted by {shift:g}", Recipe.of((circuit, shift))) for shift in SHIFTS]
    found.append(Column("`cna` at 1 nat", Recipe.of((calibrate(lm, circuit, texts=texts), -1.0))))
    target = damage(lm, texts, [Recipe.of((circuit, SHIFTS[0]))])[0]
    matched = calibrate(lm, vector, target_kl=target, texts=texts)
    found.append(Column(f"`caa`, KL of {SHIFTS[0]:g}", Recipe.of((matched, -1.0))))
    found.append(Column("random neurons × 0", Recipe((Use(random_twin(scaling, 0), multiplier=0.0),))))
    twin = random_twin(circuit, 0, spreads=neuron_spreads(lm, circuit.layers, texts))
    (shifted,) = at_kl(lm, [Recipe.of((twin, SHIFTS[0]))], [target], texts)
    found.append(Column(f"random neurons shifted, KL of {SHIFTS[0]:g}", shifted.recipe))
    if wanted:
        found = [column for column in found if any(word in column.title for word in wanted)]
    kls = damage(lm, texts, [column.recipe for column in found])
    return [replace(column, kl=kl) for column, kl in zip(found, kls, strict=True)]


def damage(lm: LanguageModel, texts: UnsteeredTexts, recipes: Sequence[Recipe]) -> list[float]:
    """The 95th percentile of the per-token KL from the unsteered model on neutral prompts, in nats."""
    return [kl_percentile(values.flatten().tolist(), 95.0) for values in divergences(lm, texts, recipes)]


def cell(lm: LanguageModel, prompts: Sequence[str], recipe: Recipe, tokens: int) -> str:
    """Share refused in percent, and quality."""
    texts = [row.text for row in ask(lm, prompts, recipe, tokens=tokens)]
    return f"{100 * share_refused(texts):.0f} ({quality(texts):.2f})"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", default="0-20", help="searched for neurons; the last one is the reference")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--limit", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--ways", nargs="*", default=(), help="only columns whose title holds one of these words")
    arguments = parser.parse_args()
    examples = read_examples(arguments.data / "train.csv", name="refusal")
    files = {"JBB": "jbb.csv", "ordinary": "benign_eval.csv"}
    sets = {name: read_prompts(arguments.data / file)[: arguments.limit] for name, file in files.items()}
    headed = False
    for short, name in MODELS.items():
        if arguments.only not in (None, short):
            continue
        lm = load_model(name, device="cpu", dtype="bfloat16")
        ways = columns(lm, examples, arguments.layers, arguments.ways)
        if not headed:
            print(line(["% refused (quality)", *(way.title for way in ways)]))
            print(line(["---"] * (len(ways) + 1)))
            headed = True
        for kind, prompts in sets.items():
            cells = [cell(lm, prompts, way.recipe, arguments.tokens) for way in ways]
            print(line([f"{short}, {kind}", *cells]), flush=True)
        print(line([f"{short}, p95 KL", *(f"{way.kl:.2f}" for way in ways)]), flush=True)


if __name__ == "__main__":
    main()
