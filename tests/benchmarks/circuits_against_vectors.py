"""How much of a vector's effect a circuit of at most 0.5% of the neurons keeps at the same KL, by rank and operation.

    python tests/benchmarks/circuits_against_vectors.py DATA [--behaviours sentiment,politeness,stance,civility]
        [--variants write/shift,write/scale,…] [--samples 6] [--tokens 30] [--kl 1.0]

DATA holds a folder per behaviour with `train.csv` (built from), `judge.csv` (the judge's own texts) and `dev.csv` (the
judge's accuracy); a behaviour without one is a bundled set, half of it built from, a quarter for each of the others.
Effect: percentage points of continuations judged positive between strength −1 and +1, each sign solved by itself to
`--kl` nats. Prints Markdown, a row as soon as it is measured.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

from at_one_nat import AtOneNat, Moved
from measuring import Judge

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.building.build import build
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model

BEHAVIOURS = ("sentiment", "politeness", "stance", "civility")
VARIANTS = (
    "default",
    *(f"{rank}/{operation}" for rank, operation in product(("write", "dprime", "difference"), ("shift", "scale"))),
)
LARGEST_SHARE = 0.005
HEADING = (
    "| behaviour | | % judged positive at −1 / 0 / +1 | effect | of the vector's | 4-gram quality at −1 / +1 "
    "| p95 KL at −1 / +1, nats |\n|---|---|---|---|---|---|---|"
)


def three_sets(data: Path, behaviour: str) -> tuple[ContrastSet, ContrastSet, ContrastSet]:
    """What is built from, what the judge is trained on, and what its accuracy is measured on."""
    folder = data / behaviour
    if folder.is_dir():
        train, judged, unseen = (read_examples(folder / f"{name}.csv") for name in ("train", "judge", "dev"))
        return train, judged, unseen
    train, rest = read_examples(behaviour).parts(0.5, seed=HOLD_OUT_SEED)
    return train, *rest.parts(0.5, seed=HOLD_OUT_SEED)


def circuit_of(lm: LanguageModel, examples: ContrastSet, variant: str) -> NeuronCircuit:
    """As read by default for steering: means over the tokens of answers, whatever the rank. `default` is write, shift
    with the layers that `build` chooses by their effect, the others take those that separate best."""
    options: dict[str, Any] = {}
    if variant != "default":
        rank, operation = variant.split("/")
        options = {"rank": rank, "operation": operation, "tokens": "mean", "calibrate": False}
        options |= {"framing": "answer"} if lm.chat else {}
    found = build(lm, examples, method="cna", **options)
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
        examples, judged, unseen = three_sets(arguments.data, behaviour)
        judge = Judge(judged)
        right = judge.accuracy(unseen)
        bench = AtOneNat(
            lm, sweep_prompts(), judge, samples=arguments.samples, tokens=arguments.tokens, target_kl=arguments.kl
        )
        vector = bench.move(build(lm, examples, method="caa", layers="all", calibrate=False))
        print(line(bench, behaviour, f"`caa`, all layers (judge {right:.0f}% right)", vector, vector), flush=True)
        for variant in arguments.variants.split(","):
            circuit = circuit_of(lm, examples, variant)
            highest = int(circuit.neuron_layers.max())
            name = f"`cna` {variant.replace('/', ', ')}, {len(circuit.neurons)} neurons up to layer {highest}"
            print(line(bench, behaviour, name, bench.move(circuit), vector), flush=True)
    print(f"\n{len(sweep_prompts()) * arguments.samples} continuations per figure, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
