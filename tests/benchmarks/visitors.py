"""Sixteen visitors at once on one model, each with a recipe of their own.

    python tests/benchmarks/visitors.py [--visitors 16] [--tokens 40] [--rounds 3] [--dtype float32]
    python tests/benchmarks/visitors.py --requests 500

Recipes mix vectors and circuits built from the bundled sets; decoding is greedy. Each round writes all texts one after
another with `Session` and at once with `SharedSession`, in turns in one process: whether every text is the same, tokens
per second, the time to a visitor's first token, and what one visitor alone pays for the shared session.
`--requests` compares the process's memory after a tenth and after all of that many short requests.

All work is done in threads that end, as on the page: the maths library slows down as soon as its threads, in all living
threads that have used it, outnumber the cores.
"""

import argparse
import gc
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.building.build import build
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.steering.shared import SharedSession

SETS = ("sentiment", "formality", "gratitude")
GREEDY = Sampling(greedy=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Visit:
    """What one visitor got: the text, the seconds until its first token, and until its end."""

    text: str
    tokens: int
    first: float
    whole: float


def in_own_thread(work: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def build_all(lm: LanguageModel) -> list[Artifact]:
    """A vector and a circuit of each bundled set."""
    found: list[Artifact] = []
    for name in SETS:
        examples = read_examples(name)
        found.append(build(lm, examples, method="caa", layers="all", framing="raw", calibrate=False))
        found.append(build(lm, examples, method="cna", layers="2-16", framing="raw", calibrate=False))
    return found


def recipes(artifacts: list[Artifact], n: int) -> list[Recipe]:
    """All different: one artifact or two, at strengths of either sign; the first is none at all."""
    found = [Recipe()]
    for place in range(1, n):
        strength = (0.4 + 0.1 * place) * (-1) ** place
        uses = [(artifacts[place % len(artifacts)], strength)]
        if place % 3 == 0:
            uses.append((artifacts[(place + 1) % len(artifacts)], -strength / 2))
        found.append(Recipe.of(*uses))
    return found


def visit(session: Session | SharedSession, row: Row, tokens: int) -> Visit:
    started, first = time.perf_counter(), None
    stream: Iterator[Any] = session.stream([row], max_new_tokens=tokens, sampling=GREEDY)
    while True:
        try:
            step = next(stream)
        except StopIteration as finished:
            whole = time.perf_counter() - started
            written: Row = finished.value[0]
            return Visit(written.text, written.tokens, first or whole, whole)
        if first is None and step.waiting is None:
            first = time.perf_counter() - started


def one_after_another(session: Session | SharedSession, rows: list[Row], tokens: int) -> tuple[list[Visit], float]:
    started = time.perf_counter()
    visits = in_own_thread(lambda: [visit(session, row, tokens) for row in rows])
    return visits, time.perf_counter() - started


def at_once(shared: SharedSession, rows: list[Row], tokens: int) -> tuple[list[Visit], float]:
    together, started = threading.Barrier(len(rows)), time.perf_counter()

    def come(row: Row) -> Visit:
        together.wait()
        return visit(shared, row, tokens)

    with ThreadPoolExecutor(len(rows)) as visitors:
        return list(visitors.map(come, rows)), time.perf_counter() - started


def idle() -> None:
    """Until the decoding thread has ended, so that its share of the maths library's threads is gone."""
    while any(thread.name == "neurosteer-decoding" for thread in threading.enumerate()):
        time.sleep(0.05)


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} (from {min(values):.2f} to {max(values):.2f})"


def compare(session: Session, rows: list[Row], tokens: int, rounds: int) -> None:
    shared, ratios, costs = SharedSession(session), [], []
    one_after_another(session, rows[:1], tokens)
    for number in range(rounds):
        alone, alone_s = one_after_another(session, rows, tokens)
        together, together_s = at_once(shared, rows, tokens)
        idle()
        lone, lone_s = one_after_another(shared, rows, tokens)
        idle()
        same = sum(one.text == other.text for one, other in zip(alone, together, strict=True))
        same_lone = sum(one.text == other.text for one, other in zip(alone, lone, strict=True))
        written = sum(one.tokens for one in alone)
        ratios.append(alone_s / together_s)
        costs.append(lone_s / alone_s)
        print(f"round {number + 1}: {same} of {len(rows)} texts are those made alone ({same_lone} one by one, shared)")
        print(f"  one after another {written / alone_s:6.1f} tokens/s, at once {written / together_s:6.1f} tokens/s")
        for name, visits in (("alone", alone), ("at once", together)):
            print(f"  seconds to the first token, {name}: {middle([one.first for one in visits])}")
    print(f"throughput at once against one after another: {middle(ratios)} x")
    print(f"one visitor through the shared session against Session: {middle(costs)} x")


def resident_mib() -> float:
    """The process's resident memory; Linux only."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("This system does not tell the resident memory of a process.")


def memory(session: Session, rows: list[Row], requests: int) -> None:
    """Half of the visitors leave before the end, by closing the stream or by asking no more."""
    shared, found = SharedSession(session, patience_s=0.2), []
    abandoned: deque[object] = deque(maxlen=16)

    def come(number: int) -> None:
        stream = shared.stream([rows[number % len(rows)]], max_new_tokens=2 + number % 5, sampling=GREEDY)
        for place, _ in enumerate(stream):
            if number % 2 and place == number % 3:
                abandoned.append(stream if number % 4 == 1 else None)
                return

    for first in range(0, requests, requests // 10):
        with ThreadPoolExecutor(8) as visitors:
            list(visitors.map(come, range(first, first + requests // 10)))
        found.append(resident_mib())
        print(f"after {first + requests // 10:4d} requests: {found[-1]:.0f} MiB", flush=True)
    print(f"growth from the first tenth to the end: {found[-1] - found[0]:+.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--visitors", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=0)
    arguments = parser.parse_args()
    lm = in_own_thread(lambda: load_model(dtype=arguments.dtype))
    artifacts = in_own_thread(lambda: build_all(lm))
    prompts = sweep_prompts()
    rows = [
        Row(prompts[place % len(prompts)], recipe)
        for place, recipe in enumerate(recipes(artifacts, arguments.visitors))
    ]
    print(f"{arguments.visitors} visitors, {lm.dtype}, {torch.get_num_threads()} threads, greedy", flush=True)
    if arguments.requests:
        memory(Session(lm), rows, arguments.requests)
    else:
        compare(Session(lm), rows, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
