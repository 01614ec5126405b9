"""What the options of `sae` are worth: effect at equal damage of one change at a time from the defaults.

    python tests/benchmarks/sae_options.py DATA [--behaviours sentiment,politeness] [--only top_k]

DATA and figures as for `method_table.py`. `unit_norm` is not compared: a vector's length does not enter its dose.
"""

import argparse
from pathlib import Path
from typing import Any

from equal_damage import Bench
from measuring import Judge
from method_table import line, print_heading

from neurosteer.building.build import build
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.loading import load_model

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "top_k 8": {"top_k": 8},
    "top_k 16": {"top_k": 16},
    "top_k 256": {"top_k": 256},
    "top_k 1024": {"top_k": 1024},
    "rank dprime": {"rank": "dprime"},
    "rank probe": {"rank": "probe"},
    "weight target": {"weight": "target"},
    "sides positive": {"sides": "positive"},
    "min_output_score 0.001": {"min_output_score": 0.001},
    "min_output_score 0.001, top_k 16": {"min_output_score": 0.001, "top_k": 16},
    "layer 9": {"layers": 9},
    "layer 14": {"layers": 14},
    "layer 19": {"layers": 19},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--behaviours", default="sentiment,politeness")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=30)
    arguments = parser.parse_args()
    bench = Bench(load_model(), sweep_prompts(), tokens=arguments.tokens, search=4, measure=arguments.samples)
    print_heading("Options")
    for behaviour in arguments.behaviours.split(","):
        folder = arguments.data / behaviour
        examples, judge = read_examples(folder / "train.csv"), Judge(read_examples(folder / "judge.csv"))
        for name, options in VARIANTS.items():
            if arguments.only in name:
                artifact = build(bench.lm, examples, method="sae", calibrate=False, **options)
                print(line(behaviour, name, *bench.move(artifact, judge)), flush=True)


if __name__ == "__main__":
    main()
