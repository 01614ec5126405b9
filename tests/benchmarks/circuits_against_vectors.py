"""How much of a vector's effect a circuit of at most 0.5% of the neurons keeps at the same KL, by rank and operation.

    python tests/benchmarks/circuits_against_vectors.py DATA [--behaviours sentiment,politeness,stance,civility]
        [--variants write/shift,write/scale,…] [--samples 6] [--tokens 30] [--kl 1.0]

DATA holds a folder per behaviour with `train.csv` (built from), `judge.csv` (the judge's own texts) and `dev.csv` (the
judge's accuracy). Effect: percentage points of continuations judged positive between strength −1 and +1, each sign
solved by itself to `--kl` nats. Prints Markdown, a row as soon as it is measured.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

from at_one_nat import AtOneNat, Moved
from measuring import Judge

from neurosteer.artifacts import NeuronCircuit
from neurosteer.building import build
from neurosteer.examples import ContrastSet, read_examples, sweep_prompts
from neurosteer.models import LanguageModel, load_model

BEHAVIOURS = ("sentiment", "politeness", "stance", "civility")
VARIANTS = tuple(
    f"{rank}/{operation}" for rank, operation in product(("write", "dprime", "difference"), ("shift", "scale"))
)
LARGEST_SHARE = 0.005
HEADING = (
    "| behaviour | | % judged positive at −1 / 0 / +1 | effect | of the vector's | 4-gram quality at −1 / +1 "
    "| p95 KL at −1 / +1, nats |\n|---|---|---|---|---|---|---|"
)


def circuit_of(lm: LanguageModel, examples: ContrastSet, variant: str) -> NeuronCircuit:
    """As read by default for steering: means over the tokens of answers, whatever the rank."""
    rank, operation = variant.split("/")
    options: dict[str, Any] = {"rank": rank, "operation": operation, "tokens": "mean"}
    if lm.chat:
        options["framing"] = "answer"
    found = build(lm, examples, method="cna", calibrate=False, **options)
    assert isinstance(found, NeuronCircuit)
    assert len(found.neurons) <= LARGEST_SHARE * lm.shape.n_layers * lm.shape.d_mlp
    return found


def line(bench: AtOneNat, behaviour: str, name: str, moved: Moved, vector: Moved) -> str:
    kept = f"{100 * moved.between / vector.between:.0f}%" if vector.between else "–"
    cells = bench.cells(moved)
    return f"| {behaviour} | {name} | {cells[0]} | {cells[1]} | {kept} | {' | '.join(cells[2:])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--behaviours", default=",".join(BEHAVIOURS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--kl", type=float, default=1.0)
    arguments = parser.parse_args()
    started, lm = time.monotonic(), load_model()
    print(HEADING)
    for behaviour in arguments.behaviours.split(","):
        folder = arguments.data / behaviour
        examples, judge = read_examples(folder / "train.csv"), Judge(read_examples(folder / "judge.csv"))
        right = judge.accuracy(read_examples(folder / "dev.csv"))
        bench = AtOneNat(
            lm, sweep_prompts(), judge, samples=arguments.samples, tokens=arguments.tokens, target_kl=arguments.kl
        )
        vector = bench.move(build(lm, examples, method="caa", layers="all", calibrate=False))
        print(line(bench, behaviour, f"`caa`, all layers (judge {right:.0f}% right)", vector, vector), flush=True)
        for variant in arguments.variants.split(","):
            circuit = circuit_of(lm, examples, variant)
            name = f"`cna` {variant.replace('/', ', ')}, {len(circuit.neurons)} neurons"
            print(line(bench, behaviour, name, bench.move(circuit), vector), flush=True)
    print(f"\n{len(sweep_prompts()) * arguments.samples} continuations per figure, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
