"""The methods beside each other: effect at equal damage, on behaviours the judge knows from other texts.

    python tests/benchmarks/method_table.py DATA [--behaviours sentiment,politeness,stance,civility] [--samples 8]

DATA holds a folder per behaviour with `train.csv` (built from), `judge.csv` (the judge's own texts) and `dev.csv` (the
judge's accuracy). What is printed is Markdown: per behaviour and method the share of continuations that the judge calls
positive at strength + and −, each at the largest dose whose damage is allowed (see `equal_damage.py`), and what lies
between them. Rows beside the methods: a vector under random rotations, each at its own largest dose, and the
instruction in plain words.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from equal_damage import MEASURE_SEED, Bench, Moved
from measuring import Judge

from neurosteer.artifacts.recipes import UNSTEERED
from neurosteer.artifacts.twins import random_twin
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.loading import load_model

METHODS = ("sae", "caa", "pca", "probe", "cna")
WORDS = {
    "sentiment": ("Write in a very positive, delighted tone.", "Write in a very negative, disappointed tone."),
    "politeness": ("Be very polite and courteous.", "Be blunt and impolite."),
    "stance": ("Argue in favour of what is discussed.", "Argue against what is discussed."),
    "civility": ("Write in a friendly, civil way.", "Write in a crude, insulting way."),
}


def print_heading(what: str) -> None:
    columns = ("Behaviour", what, "% positive at + / −", "Between", "Dose + / −", "Perplexity ×", "4-gram quality")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")


def line(behaviour: str, method: str, up: Moved, down: Moved) -> str:
    doses = f"{up.amount:g} / {down.amount:g}"
    damage = f"{up.damage.perplexity:.2f} / {down.damage.perplexity:.2f}"
    grams = f"{up.damage.quality:.3f} / {down.damage.quality:.3f}"
    return (
        f"| {behaviour} | {method} | {up.share:.1f} / {down.share:.1f} | {up.share - down.share:+.1f} | {doses} "
        f"| {damage} | {grams} |"
    )


def in_words(bench: Bench, behaviour: str, judge: Judge) -> tuple[Moved, Moved]:
    moved = []
    for words in WORDS[behaviour]:
        rows = bench.write([UNSTEERED], MEASURE_SEED, ask=lambda prompt, words=words: f"{words} {prompt}")[0]
        moved.append(Moved(0.0, judge.share_positive([row.text for row in rows]), bench.damage(rows, MEASURE_SEED)))
    return moved[0], moved[1]


def measure(bench: Bench, behaviour: str, folder: Path, methods: Sequence[str], n_random: int) -> None:
    examples, judge = read_examples(folder / "train.csv"), Judge(read_examples(folder / "judge.csv"))
    right = judge.accuracy(read_examples(folder / "dev.csv"))
    plain = judge.share_positive([row.text for row in bench.plain[MEASURE_SEED]])
    print(f"| {behaviour} | unsteered (judge {right:.1f}% right) | {plain:.1f} | | | 1.00 | |", flush=True)
    built = {}
    for method in methods:
        built[method] = build(bench.lm, examples, method=method, calibrate=False)
        print(line(behaviour, method, *bench.move(built[method], judge)), flush=True)
    like = next(artifact for artifact in built.values() if isinstance(artifact, SteeringVector))
    for seed in range(n_random):
        print(line(behaviour, f"random direction {seed}", *bench.move(random_twin(like, seed), judge)), flush=True)
    print(line(behaviour, "instruction in plain words", *in_words(bench, behaviour, judge)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--behaviours", default=",".join(WORDS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--random", type=int, default=3)
    parser.add_argument("--search", type=int, default=4, help="samples per prompt while the dose is looked for")
    parser.add_argument("--samples", type=int, default=8, help="samples per prompt for the figures")
    parser.add_argument("--tokens", type=int, default=30)
    arguments = parser.parse_args()
    started, prompts = time.monotonic(), sweep_prompts()
    bench = Bench(load_model(), prompts, tokens=arguments.tokens, search=arguments.search, measure=arguments.samples)
    print(f"{len(prompts) * arguments.samples} continuations of {arguments.tokens} tokens per figure.\n")
    print_heading("Method")
    for behaviour in arguments.behaviours.split(","):
        measure(bench, behaviour, arguments.data / behaviour, arguments.methods.split(","), arguments.random)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
