"""What a receipt costs, against writing the unsteered texts once.

    python tests/benchmarks/receipt_cost.py [--prompts 32] [--tokens 40] [--rounds 3] [--cpu]

One `evaluate` at five strengths with all controls (random twins at equal KL, plain words), its perplexities and KL
included, against one `Session.generate` of the unsteered rows alone. They take turns in one process; the medians of
both and of the ratios are printed, and where the time went. `--cpu` counts the process's own processor time instead of
the clock's, for machines that others use at the same time; run it on one thread then (OMP_NUM_THREADS=1).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from neurosteer.artifacts.storage import load
from neurosteer.evaluation import CallableJudge, evaluate
from neurosteer.examples.files import neutral_prompts
from neurosteer.models.loading import load_model
from neurosteer.progress import Progress
from neurosteer.steering.session import Row, Session

VECTORS = Path(__file__).parent.parent.parent / "vectors"


def marker(marks: list[tuple[str, float]], clock: Callable[[], float]) -> Progress:
    """Progress that notes when each phase began."""
    return lambda message, fraction=None: marks.append((message, clock()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifact", type=Path, default=VECTORS / "sentiment")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    clock: Callable[[], float] = time.process_time if arguments.cpu else time.perf_counter
    lm, artifact = load_model(), load(arguments.artifact)
    session, prompts = Session(lm), neutral_prompts()[: arguments.prompts]
    judge = CallableJudge("nothing", lambda text: 0.5)
    plain = [Row(prompt) for prompt in prompts]
    session.generate(plain[:2], max_new_tokens=4)
    floors, totals, phases = [], [], {}
    for _ in range(arguments.rounds):
        started = clock()
        session.generate(plain, max_new_tokens=arguments.tokens, batch_rows=len(plain))
        floors.append(clock() - started)
        marks: list[tuple[str, float]] = [("start", clock())]
        evaluate(
            lm,
            artifact,
            judge,
            prompts=prompts,
            max_new_tokens=arguments.tokens,
            progress=marker(marks, clock),
        )
        marks.append(("end", clock()))
        totals.append(marks[-1][1] - marks[0][1])
        phases = {name: after - at for (name, at), (_, after) in itertools.pairwise(marks)}
        print(f"{floors[-1]:.2f} s, receipt {totals[-1]:.2f} s: {totals[-1] / floors[-1]:.2f} x", flush=True)
        for name, seconds in phases.items():
            print(f"  {seconds:7.2f} s  {name}", flush=True)
    ratios = [total / floor for total, floor in zip(totals, floors, strict=True)]
    kind = "processor time" if arguments.cpu else "seconds"
    print(
        f"{lm.dtype}, {torch.get_num_threads()} thread(s); {len(prompts)} prompts, {arguments.tokens} tokens, {kind}:"
    )
    print(f"unsteered rows once {statistics.median(floors):.2f}, receipt {statistics.median(totals):.2f}, ", end="")
    print(f"ratio {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()
