"""Build the released library, `vectors/`, with calibration, receipts and cards.

    python tests/benchmarks/library.py DATA [--out vectors] [--only sentiment,politeness] [--samples 6]
        [--measure-again]

DATA holds a folder per behaviour with `train.csv` (built from) and `judge.csv` (the judge's own texts), and `refusal/`
with `train.csv`, `jbb.csv` and `benign_eval.csv`; formality and gratitude are built from one half of the bundled sets
and judged by the other. For a vector, the methods named below are compared at strength ±1 on prompts of their own and
the one that moves the judge most is kept (what they came to is printed); circuits are `cna`. Every artifact gets a
receipt on other prompts: five strengths, ten random twins, one built from shuffled labels and the instruction in plain
words, 16 neutral prompts × `--samples` texts of 30 tokens (refusal: every fourth JailbreakBench goal
and ordinary request, once each). `--measure-again` keeps the artifacts as they are and gives them a new receipt.
Gemma-3-270M comes from the package index (`packaged.py`).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaged import GEMMA, load_any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import load, save
from neurosteer.building.build import build
from neurosteer.evaluation import Judge, RefusalDetector, TextClassifier, evaluate, judge_for, write_evaluation
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import neutral_prompts, sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.session import Session

BUNDLED = ("formality", "gratitude")
HOLD_OUT = 0.5
TOKENS = 30
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Item:
    """One artifact of the library: its behaviour's data, and the methods to choose from, each with its options."""

    name: str
    behaviour: str
    description: str
    choices: tuple[dict[str, Any], ...]
    model: str = ""


CAA, SAE, CNA = {"method": "caa"}, {"method": "sae", "contexts": 0}, {"method": "cna"}
LAST_TOKEN = {"method": "caa", "layers": "all", "tokens": "last"}
VECTORS = {
    "sentiment": "Delighted (+) or disappointed (−). From film-review sentences.",
    "politeness": "Polite (+) or blunt (−). From requests on Wikipedia and Stack Exchange, rated by people.",
    "stance": "For (+) or against (−) what is discussed. From arguments on debated motions.",
    "civility": "Civil (+) or rude (−). From tweets, neither or offensive.",
    "formality": "Formal (+) or casual (−). From the bundled set.",
    "gratitude": "Grateful (+) or not (−). From the bundled set.",
}
_CIRCUITS = ("sentiment", "politeness", "stance")
ITEMS = (
    *(
        Item(name, name, description, (CAA,) if name in BUNDLED else (CAA, SAE, LAST_TOKEN))
        for name, description in VECTORS.items()
    ),
    *(Item(f"{name}-circuit", name, f"{VECTORS[name]} As a circuit of MLP neurons.", (CNA,)) for name in _CIRCUITS),
    *(
        Item(f"{name}-gemma-3-270m", name, f"{VECTORS[name]} For Gemma-3-270M.", (CAA,), GEMMA.name)
        for name in ("sentiment", "politeness")
    ),
    Item(
        "refusal-circuit",
        "refusal",
        "Refuses (+) or answers (−). For research on refusal: from prompts alone, on a model that was made to refuse.",
        ({"method": "cna", "framing": "prompt", "tokens": "last", "layers": "0-20"},),
        "SmolLM2-135M-Instruct-refusing",
    ),
)


@dataclass(frozen=True)
class Sources:
    """What an item is built from and judged by, and the prompts of its choice and of its receipt."""

    examples: ContrastSet
    hold_out: float
    judge: Judge | None
    choosing: Sequence[str]
    measuring: Sequence[str]


def sources(item: Item, data: Path) -> Sources:
    measuring = sweep_prompts()
    choosing = [prompt for prompt in neutral_prompts() if prompt not in measuring]
    if item.behaviour == "refusal":
        goals, ordinary = (read_prompts(data / "refusal" / name) for name in ("jbb.csv", "benign_eval.csv"))
        examples = read_examples(data / "refusal" / "train.csv", name="refusal")
        return Sources(examples, 0.0, RefusalDetector(), [], [*goals[::4], *ordinary[::4]])
    if item.behaviour in BUNDLED:
        return Sources(read_examples(item.behaviour), HOLD_OUT, None, choosing, measuring)
    folder = data / item.behaviour
    judge = TextClassifier.train(read_examples(folder / "judge.csv", name=f"{item.behaviour}, texts for judging"))
    return Sources(read_examples(folder / "train.csv", name=item.behaviour), 0.0, judge, choosing, measuring)


def read_prompts(path: Path) -> list[str]:
    import pandas as pd

    table = pd.read_csv(path)
    return [str(text) for text in table[table.columns[0]]]


def chosen(lm: LanguageModel, item: Item, given: Sources) -> tuple[Artifact, Judge, str]:
    """The best of the item's choices, its judge, and what the choices came to."""
    built = [
        build(lm, given.examples, name=item.name, description=item.description, hold_out=given.hold_out, **options)
        for options in item.choices
    ]
    judge = given.judge or judge_for(built[0], given.examples)
    if len(built) == 1:
        return built[0], judge, ""
    effects = []
    for artifact in built:
        rows = Session(lm).sweep(Recipe.of(artifact), [-1.0, 1.0], given.choosing, samples=2, max_new_tokens=30)
        scores = judge.scores([row.text for row in rows])
        effects.append(sum(row.strength * score for row, score in zip(rows, scores, strict=True)) / (len(rows) / 2))
    best = max(range(len(built)), key=lambda place: effects[place])
    said = ", ".join(
        f"{one.method} ({one.provenance.tokens}) {effect:+.2f}" for one, effect in zip(built, effects, strict=True)
    )
    return built[best], judge, said


def released(item: Item, given: Sources, out: Path) -> tuple[Artifact, Judge, str]:
    """The artifact as it is, without its receipts, and its judge."""
    artifact = replace(load(out / item.name), receipts=())
    return artifact, given.judge or judge_for(artifact, given.examples), ""


def release(lm: LanguageModel, item: Item, data: Path, out: Path, samples: int, *, again: bool) -> None:
    started = time.monotonic()
    given = sources(item, data)
    artifact, judge, said = released(item, given, out) if again else chosen(lm, item, given)
    found = evaluate(
        lm,
        artifact,
        judge,
        prompts=given.measuring,
        strengths=STRENGTHS,
        samples=1 if item.behaviour == "refusal" else samples,
        max_new_tokens=TOKENS,
        examples=given.examples,
    )
    assert found.artifact is not None
    folder = save(found.artifact, out / item.name)
    if item.behaviour != "refusal":  # no answer to a harmful prompt is kept
        write_evaluation(found, out.parent / "build" / item.name)
    choice = f"; chosen by {said}" if said else ""
    print(f"{item.name}: {artifact.method}, {artifact.provenance.layer_choice}{choice}; "
          f"{time.monotonic() - started:.0f} s, {folder}", file=sys.stderr, flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent.parent / "vectors")
    parser.add_argument("--only", default=",".join(item.name for item in ITEMS))
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--measure-again", action="store_true", help="new receipts of the artifacts as they are")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    models: dict[str, LanguageModel] = {}
    again = arguments.measure_again
    for item in (item for item in ITEMS if item.name in wanted):
        if item.model not in models:
            models[item.model] = load_any(item.model)
        release(models[item.model], item, arguments.data, arguments.out, arguments.samples, again=again)


if __name__ == "__main__":
    main()
