"""What a vector and a circuit built from reviews do to what the model writes, beside their controls.

    python tests/benchmarks/sentiment_effect.py DATA [--samples 4] [--tokens 30] [--only cna]

DATA is a folder with `train.csv` (artifacts are built from it), `judge.csv` (a judge is trained on it) and `dev.csv`
(the judge's accuracy is measured on it): disjoint texts labelled positive or negative. Artifacts are built and sweeps
written by the command line (`neurosteer build`, `neurosteer sweep --strengths -1,0,1` over the 16 default prompts); the
judge then says how many continuations are positive. Controls: a random direction and random neurons of the same layers,
both at the KL that the artifact comes to, and the instruction in plain words. Artifacts are at the default amounts,
uncalibrated.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring import Judge, kl_p95, quality, twin_at_same_kl, unsteered_continuation

from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import load, save
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model

ARTIFACTS = {
    "caa": ["--method", "caa"],
    "cna": ["--method", "cna"],
    "cna-paper": ["--method", "cna", "--rank", "difference", "--operation", "scale"],
}
INSTRUCTIONS = {"-1": "Write with displeasure. ", "0": "", "1": "Write with delight. "}
STRENGTHS = ("-1", "0", "1")


def command(*arguments: str) -> dict[str, object]:
    """Run the command line with `--json` and return what it prints."""
    run = subprocess.run(
        [sys.executable, "-m", "neurosteer.cli", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout)


def sweep(folder: Path, out: Path, samples: int, tokens: int) -> dict[str, list[str]]:
    """Texts by strength, written by the command line."""
    size = ["--samples", str(samples), "--max-new-tokens", str(tokens)]
    command("sweep", "--use", str(folder), "--strengths", ",".join(STRENGTHS), *size, "--out", str(out))
    with (out / "generations.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: [row["text"] for row in rows if float(row["strength"]) == float(key)] for key in STRENGTHS}


def instructed(folder: Path, work: Path, samples: int, tokens: int) -> dict[str, list[str]]:
    """The unsteered model, told in plain words."""
    texts = {}
    for key, instruction in INSTRUCTIONS.items():
        prompts = work / f"prompts{key}.txt"
        prompts.write_text("\n".join(instruction + prompt for prompt in sweep_prompts()), encoding="utf-8")
        size = ["--samples", str(samples), "--max-new-tokens", str(tokens), "--prompts", str(prompts)]
        written = command("sweep", "--use", str(folder), "--strengths", "0", *size)
        texts[key] = [row["text"] for row in written["rows"]]  # type: ignore[index,union-attr]
    return texts


def show(name: str, texts: dict[str, list[str]], judge: Judge, divergences: Sequence[float] | None) -> None:
    shares = "  ".join(f"{judge.share_positive(texts[key]):5.1f}" for key in STRENGTHS)
    qualities = "  ".join(f"{quality(texts[key]):.3f}" for key in STRENGTHS)
    kl = " / ".join(f"{value:.2f}" for value in divergences) if divergences else "-"
    print(f"{name:26s} {shares}    {qualities}    {kl}", flush=True)


def divergences_of(lm: LanguageModel, folder: Path) -> list[float]:
    continuation = unsteered_continuation(lm, sweep_prompts())
    return [kl_p95(lm, continuation, Recipe.of((load(folder), strength))) for strength in (-1.0, 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--only", choices=ARTIFACTS, help="this artifact and its random control alone")
    arguments = parser.parse_args()
    size = (arguments.samples, arguments.tokens)
    judge = Judge(read_examples(arguments.data / "judge.csv"))
    accuracy = judge.accuracy(read_examples(arguments.data / "dev.csv"))
    n = len(sweep_prompts()) * arguments.samples
    print(f"judge: {accuracy:.1f}% right on unseen texts; {n} continuations of {arguments.tokens} tokens per figure")
    print(f"{'':26s} % positive at -1/0/+1   4-gram quality at -1/0/+1  p95 KL in nats at -1/+1")
    lm = load_model()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name, options in ARTIFACTS.items():
            if arguments.only not in (None, name):
                continue
            folder = work / name
            command("build", str(arguments.data / "train.csv"), *options, "--no-calibrate", "--out", str(folder))
            show(name, sweep(folder, work / f"{name}-sweep", *size), judge, divergences_of(lm, folder))
            if name == "cna-paper":
                continue
            control = save(twin_at_same_kl(lm, load(folder), sweep_prompts()), work / f"random-{name}")
            show(
                f"  random, like {name}",
                sweep(control, work / f"{name}-random", *size),
                judge,
                divergences_of(lm, control),
            )
        if arguments.only is None:
            show("  instruction in words", instructed(work / "caa", work, *size), judge, None)


if __name__ == "__main__":
    main()
