"""Building in two single-threaded processes against one: seconds, and how far the artifacts differ; Markdown.

    python tests/benchmarks/processes_speed.py [EXAMPLES] [--texts 200] [--rounds 2] [--model NAME]

The embedded model, `caa` at all layers, read only (`--no-calibrate`) and calibrated. One and two processes take turns,
one thread each; counted are the seconds that `build` itself says it took, without loading the model.
"""

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from neurosteer.artifacts.storage import load
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.examples.reading import read_examples


def built(examples: Path, folder: Path, count: int, more: list[str]) -> float:
    """Seconds that building took in `count` processes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "neurosteer", "build", str(examples), "--layers", "all", "--json", *more]
    running = [
        subprocess.Popen(
            [*command, "--out", str(folder)],
            env=os.environ | several | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [one.communicate()[0] for one in running]
    if any(one.returncode for one in running):
        raise SystemExit("building failed")
    return float(json.loads(printed[0])["seconds"])


def difference(one: Path, other: Path) -> float:
    """The largest difference of two vectors' directions, as a share of their length."""
    first, second = load(one), load(other)
    assert isinstance(first, SteeringVector) and isinstance(second, SteeringVector)
    return max(
        float((first.directions[layer] - second.directions[layer]).norm() / first.directions[layer].norm())
        for layer in first.layers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("examples", nargs="?", default="formality")
    parser.add_argument("--texts", type=int, default=200, help="of each class at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    found = read_examples(arguments.examples)
    print("| `caa` at all layers | one process | two | speed-up | largest difference of a direction |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        examples = Path(temporary) / "examples.csv"
        sides = (("positive", found.positive), ("negative", found.negative))
        with examples.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows((text, label) for label, texts in sides for text in texts[: arguments.texts])
        for name, more in (("read", ["--no-calibrate"]), ("read and calibrated", [])):
            taken: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(arguments.rounds):
                for count, seconds in taken.items():
                    folder = Path(temporary) / f"{len(more)}-{count}"
                    seconds.append(built(examples, folder, count, [*more, "--model", arguments.model]))
            one, two = (statistics.median(seconds) for seconds in taken.values())
            off = difference(*(Path(temporary) / f"{len(more)}-{count}" for count in (1, 2)))
            print(f"| {name} | {one:.1f} s | {two:.1f} s | {one / two:.2f} × | {off:.1g} |", flush=True)


if __name__ == "__main__":
    main()
