"""Many callers on one model: every text against `Session` alone, in threads that come, wait, leave, stall and fail."""

import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    Tiny,
    ablating,
    build,
    clamping,
    hook_count,
    make_circuit,
    make_tiny,
    make_vector,
    own_hooks,
    texts,
    tiny_next,
)

from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.errors import MismatchError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering import shared as serving
from neurosteer.steering.batches import Batch
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session, Step, drained
from neurosteer.steering.shared import SharedSession

GREEDY = Sampling(greedy=True)
THREAD = "neurosteer-decoding"
Job = tuple[list[Row], dict[str, Any]]


def recipe_number(lm: LanguageModel, place: int) -> Recipe:
    """Each visitor's own."""
    model, strength = lm.reference, (1.0, -1.5, 0.7)[place % 3]
    kinds: list[Callable[[], Any]] = [
        lambda: make_vector((1, 2), seed=place, model=model),
        lambda: make_circuit(seed=place, operation="shift", calibration=Calibration(6.0), model=model),
        lambda: ablating((0, 2), seed=place, model=model),
        lambda: make_circuit([(0, place), (2, 5)], seed=place, calibration=Calibration(3.0), model=model),
        lambda: clamping((1,), seed=place, model=model),
    ]
    return Recipe.of((kinds[place % len(kinds)](), strength)) if place % 7 else UNSTEERED


def jobs(lm: LanguageModel, n: int, *, seed: int = 1, most: int = 24) -> list[Job]:
    """Requests that differ in everything."""
    rng, prompts = random.Random(seed), texts(n, seed=seed, longest=14)
    found = []
    for place in range(n):
        rows = [Row(prompts[place], recipe_number(lm, place)), Row(prompts[place]), Row(prompts[-place], sample=1)]
        sampling = Sampling(
            greedy=rng.random() < 0.5,
            temperature=rng.choice([0.6, 1.2]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            seed=place,
        )
        options = {
            "max_new_tokens": rng.randint(1, most),
            "sampling": sampling,
            "positions": rng.choice(["all", "prompt", "generated"]),
            "raw": rng.random() < 0.5,
        }
        found.append((rows[: rng.randint(1, 3)], options))
    return found


def drain(stream: Iterator[Step]) -> tuple[list[Step], list[Row]]:
    steps = []
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as finished:
            return steps, finished.value


def joined(steps: Sequence[Step], rows: int) -> list[str]:
    found = [""] * rows
    for step in steps:
        for offset, piece in enumerate(step.pieces):
            found[step.first + offset] += piece
    return found


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test, once there is nothing to do, and with it all it held."""
    monkeypatch.setattr(serving, "_IDLE_S", 0.02)
    yield
    until(lambda: not decoding_threads(), 5.0)


@contextmanager
def slowed(this: Tiny, seconds: float) -> Iterator[list[int]]:
    """Every pass through the model takes a while; yields how many rows each had."""
    sizes: list[int] = []

    def wait(_module: Any, inputs: Any) -> None:
        sizes.append(inputs[0].shape[0])
        time.sleep(seconds)

    with own_hooks([(this.blocks[0], wait)], before=True):
        yield sizes


# --- the same texts --------------------------------------------------------------------------------------------------


def test_visitors_who_come_at_different_times_get_the_texts_that_they_get_alone(each: Tiny) -> None:
    """Prompts, recipes, positions, sampling, seeds and lengths differ, and so do the times of coming and ending."""
    wanted_jobs = jobs(each.lm, 12)
    session = Session(each.lm)
    wanted = [session.generate(rows, **options) for rows, options in wanted_jobs]
    shared, rng = SharedSession(session, max_rows=16), random.Random(2)
    waits = [rng.random() * 0.1 for _ in wanted_jobs]

    def visit(place: int) -> tuple[list[Step], list[Row]]:
        time.sleep(waits[place])
        rows, options = wanted_jobs[place]
        return drain(shared.stream(rows, **options))

    with slowed(each, 0.004) as sizes, ThreadPoolExecutor(12) as visitors:
        found = list(visitors.map(visit, range(12)))
    assert [rows for _, rows in found] == wanted
    for (steps, rows), (asked, _) in zip(found, wanted_jobs, strict=True):
        assert joined(steps, len(asked)) == [row.text for row in rows]
    alone = sum(max(row.tokens for row in rows) for rows in wanted)
    assert max(sizes) > 6 and len(sizes) < alone * 0.75, "they did not decode together, so this test shows nothing"
    assert max(sizes) <= 16


def test_a_newcomer_does_not_wait_for_those_under_way_to_end(llama: Tiny) -> None:
    shared = SharedSession(Session(llama.lm), patience_s=60.0)
    with slowed(llama, 0.003):
        long = shared.stream("the cat", sampling=GREEDY, max_new_tokens=200)
        next(long)
        short = shared.generate("we", sampling=GREEDY, max_new_tokens=5)
        steps, rows = drain(long)
    assert short == Session(llama.lm).generate("we", sampling=GREEDY, max_new_tokens=5)
    assert rows == Session(llama.lm).generate("the cat", sampling=GREEDY, max_new_tokens=200)
    assert len(steps) > 100, "the first visitor was ready before the second came, so this test shows nothing"


def test_those_under_way_go_on_while_long_prompts_are_read(each: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With somebody who leaves while a prompt is read together with others'."""
    monkeypatch.setattr(serving, "_PROMPT_COLUMNS", {"cpu": 16})
    monkeypatch.setattr(serving, "_PROMPT_PADDING", 10_000)
    options: dict[str, Any] = {"sampling": GREEDY, "raw": True}
    long = [Row(" ".join(texts(10, seed=seed, longest=4)), recipe_number(each.lm, seed)) for seed in (1, 2)]
    session, widths, cancel = Session(each.lm), [], threading.Event()
    wanted = [session.generate([row], max_new_tokens=5, **options) for row in long]
    shared = SharedSession(session, patience_s=60.0)
    note = (each.model.get_input_embeddings(), lambda _, inputs: widths.append(tuple(inputs[0].shape)))
    with slowed(each, 0.003), own_hooks([note], before=True), ThreadPoolExecutor(3) as visitors:
        running: Any = shared.stream("we", max_new_tokens=150, **options)
        next(running)
        three = [long[0], Row("they"), long[1]]
        leaving = visitors.submit(shared.generate, three, max_new_tokens=5, cancel=cancel, **options)
        until(lambda: any(rows == 3 for rows, _ in widths))
        cancel.set()
        found = list(visitors.map(lambda row: shared.generate([row], max_new_tokens=5, **options), long))
        assert {row.tokens for row in leaving.result()} == {0}
        assert drain(running)[1] == session.generate("we", max_new_tokens=150, **options)
    assert found == wanted
    parts = [place for place, (_, width) in enumerate(widths) if width > 1]
    assert len(parts) >= 6 and all(rows * width <= 16 for rows, width in (widths[place] for place in parts))
    assert all(here + 1 < there for here, there in pairwise(parts)), "nobody went on between two parts"


def test_rows_of_a_model_whose_states_cannot_be_moved_take_turns() -> None:
    this = tiny_next()
    session, asked = Session(this.lm), jobs(this.lm, 5, most=10)
    wanted = [session.generate(rows, **options) for rows, options in asked]
    shared = SharedSession(session)
    with slowed(this, 0.003) as sizes, ThreadPoolExecutor(5) as visitors:
        found = list(visitors.map(lambda job: shared.generate(job[0], **job[1]), asked))
    assert found == wanted
    assert set(sizes) <= {1, 2, 3}


def test_one_long_prompt_does_not_make_short_ones_carry_its_padding(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_MOST_PADDING", 80)
    asked = [Row("a" + " the cat" * 60), *(Row(prompt) for prompt in ("we", "they", "you", "it", "a"))]
    wanted = [Session(llama.lm).generate([row], sampling=GREEDY, max_new_tokens=12, raw=True) for row in asked]
    shared = SharedSession(Session(llama.lm))
    with slowed(llama, 0.003) as sizes, ThreadPoolExecutor(6) as visitors:
        found = visitors.map(lambda row: shared.generate([row], sampling=GREEDY, max_new_tokens=12, raw=True), asked)
        assert list(found) == wanted
    assert max(sizes) == 5  # the long one in turns with the others


def test_a_sweep_of_more_rows_than_places_takes_several_turns(llama: Tiny) -> None:
    vector = make_vector(seed=1, model=llama.lm.reference)
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": 6}
    wanted = Session(llama.lm).sweep(vector, [-1.0, 0.0, 1.0], ["we", "the dog"], **options)
    told: list[tuple[str, float | None]] = []
    with slowed(llama, 0.001) as sizes:
        found = SharedSession(Session(llama.lm), max_rows=8).sweep(
            vector,
            [-1.0, 0.0, 1.0],
            ["we", "the dog"],
            **options,
            progress=lambda text, share=None: told.append((text, share)),
        )
    assert found == wanted and max(sizes) == 4
    assert told == [(f"Wrote {n} of 12 texts", n / 12) for n in (4, 8, 12)]


def test_the_smallest_session_has_one_place(llama: Tiny) -> None:
    rows = [Row("we"), Row("they")]
    shared = SharedSession(Session(llama.lm), max_rows=1)
    assert shared.generate(rows, max_new_tokens=4) == Session(llama.lm).generate(rows, max_new_tokens=4)
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(UsageError, match="max_rows"):
            SharedSession(Session(llama.lm), max_rows=wrong)  # type: ignore[arg-type]


def test_building_and_steering_at_the_same_time_give_what_each_gives_alone(each: Tiny) -> None:
    examples = ContrastSet(tuple(texts(60, seed=4)), tuple(texts(60, seed=5)))

    def made() -> torch.Tensor:
        artifact: Any = build(each.lm, examples, method="caa", layers="all", framing="raw")
        return torch.stack([artifact.directions[layer] for layer in sorted(artifact.directions)])

    direction, asked = made(), jobs(each.lm, 8)
    wanted = [Session(each.lm).generate(rows, **options) for rows, options in asked]
    shared, stop, found = SharedSession(Session(each.lm)), threading.Event(), []

    def keep_building() -> None:
        while not stop.is_set():
            found.append(made())

    builder = threading.Thread(target=keep_building)
    builder.start()
    try:
        with ThreadPoolExecutor(8) as visitors:
            for _ in range(3):
                assert list(visitors.map(lambda job: shared.generate(job[0], **job[1]), asked)) == wanted
    finally:
        stop.set()
        builder.join()
    assert len(found) > 1 and all(torch.equal(one, direction) for one in found)


def test_all_decoding_is_done_in_one_thread(llama: Tiny) -> None:
    seen: set[int] = set()
    shared = SharedSession(Session(llama.lm))
    note = (llama.blocks[0], lambda *_: seen.add(threading.get_ident()))
    with own_hooks([note], before=True), ThreadPoolExecutor(6) as visitors:
        list(visitors.map(lambda prompt: shared.generate(prompt, max_new_tokens=8), texts(6, seed=1)))
    assert len(seen) == 1 and threading.get_ident() not in seen


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_who_waits_is_told_how_many_come_before_and_gets_a_place_in_order(llama: Tiny) -> None:
    shared = SharedSession(Session(llama.lm), max_rows=2, patience_s=60.0)
    lengths, order = (40, 90, 6, 6, 6), []
    streams: list[Any] = [
        shared.stream([Row("the cat", sample=place)], max_new_tokens=n, sampling=GREEDY)
        for place, n in enumerate(lengths)
    ]

    def go_on(place: int, first: Step) -> tuple[list[Step], list[Row]]:
        steps = [first]
        while True:
            try:
                steps.append(next(streams[place]))
            except StopIteration as finished:
                return steps, finished.value
            if steps[-1].waiting is None and place not in order:
                order.append(place)

    with slowed(llama, 0.01), ThreadPoolExecutor(5) as visitors:
        first = [next(stream) for stream in streams]  # they come one after another
        found = list(visitors.map(go_on, range(5), first))
    waited = [[step.waiting for step in steps if step.waiting is not None] for steps, _ in found]
    assert waited == [[], [], [0], [1, 0], [2, 1, 0]]
    assert order[2:] == [2, 3, 4]
    for (steps, rows), n in zip(found, lengths, strict=True):
        assert all(step.pieces == ("",) for step in steps if step.waiting is not None)
        assert joined(steps, 1) == [rows[0].text] and rows[0].tokens == n


def test_a_visitor_who_gives_up_waiting_lets_the_others_move_up(llama: Tiny) -> None:
    shared = SharedSession(Session(llama.lm), max_rows=1, patience_s=60.0)
    with slowed(llama, 0.005):
        first: Any = shared.stream("the cat", max_new_tokens=60, sampling=GREEDY)
        next(first)
        cancel = threading.Event()
        leaving: Any = shared.stream("we", max_new_tokens=5, cancel=cancel)
        closing: Any = shared.stream("you", max_new_tokens=5)
        last: Any = shared.stream("they", max_new_tokens=5, sampling=GREEDY)
        assert [next(stream).waiting for stream in (leaving, closing, last)] == [0, 1, 2]
        cancel.set()
        assert drain(leaving)[1][0].finish == "cancelled"
        assert next(last).waiting == 1
        closing.close()
        assert next(last).waiting == 0
        steps, _ = drain(first)
        assert len(steps) > 30, "the first was ready too soon, so this test shows nothing"
        assert drain(last)[1] == Session(llama.lm).generate("they", max_new_tokens=5, sampling=GREEDY)


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cancel", "close", "forget"])
def test_whoever_leaves_frees_the_rows_within_a_step(each: Tiny, way: str) -> None:
    shared, cancel = SharedSession(Session(each.lm), patience_s=60.0), threading.Event()
    asked = [Row("the cat", recipe_number(each.lm, 1)), Row("the cat")]
    with slowed(each, 0.004) as sizes:
        staying: Any = shared.stream("we", max_new_tokens=60, sampling=GREEDY)
        next(staying)
        leaving: list[Any] = [shared.stream(asked, max_new_tokens=150, sampling=GREEDY, cancel=cancel)]
        for _ in range(4):
            next(leaving[0])
        until(lambda: 3 in sizes)
        before = len(sizes)
        if way == "cancel":
            cancel.set()
        elif way == "close":
            leaving[0].close()
        else:
            leaving.clear()
        rows = drain(staying)[1]
    assert set(sizes[before + 2 :]) == {1} and len(sizes) > before + 12
    assert rows == Session(each.lm).generate("we", max_new_tokens=60, sampling=GREEDY)
    if way == "cancel":
        _, cut = drain(leaving[0])
        whole = Session(each.lm).generate(asked, max_new_tokens=150, sampling=GREEDY)
        assert [row.finish for row in cut] == ["cancelled"] * 2
        assert all(one.text.startswith(row.text.rstrip("�")) for row, one in zip(cut, whole, strict=True))
        assert all(4 <= row.tokens < 150 for row in cut)


def test_whoever_stops_asking_makes_room_and_goes_on_later_with_the_same_text(each: Tiny) -> None:
    shared = SharedSession(Session(each.lm), max_rows=2, patience_s=0.05)
    asked = [Row("the cat", recipe_number(each.lm, 1)), Row("they sing", recipe_number(each.lm, 2))]
    wanted = Session(each.lm).generate(asked, max_new_tokens=120, positions="prompt")
    with slowed(each, 0.002) as sizes:
        pausing: Any = shared.stream([asked[0]], max_new_tokens=120, positions="prompt")
        steps = [next(pausing) for _ in range(3)]
        until(lambda: not decoding_threads())  # it has left: nothing is under way any more
        held = sum(sizes)
        assert held < 120
        assert shared.generate([asked[1]], max_new_tokens=120, positions="prompt") == [wanted[1]]
        more, rows = drain(pausing)
    assert rows == [wanted[0]]
    assert joined([*steps, *more], 1) == [wanted[0].text]


def test_an_abandoned_stream_holds_neither_rows_nor_memory(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[weakref.ref[Batch]] = []
    original = Batch.__init__

    def remember(self: Batch, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        batches.append(weakref.ref(self))

    monkeypatch.setattr(Batch, "__init__", remember)
    shared = SharedSession(Session(llama.lm), patience_s=0.05)
    with slowed(llama, 0.002) as sizes:
        abandoned = [shared.stream("we", max_new_tokens=200, sampling=GREEDY) for _ in range(3)]
        for stream in abandoned:
            next(stream)
        until(lambda: not decoding_threads())
        steps = len(sizes)
    gc.collect()
    assert batches and not any(reference() is not None for reference in batches)
    assert steps < 120
    del abandoned


def test_the_work_begins_before_it_is_asked_for_and_ends_where_nobody_asks(llama: Tiny) -> None:
    runs: list[Any] = []
    with own_hooks([(llama.blocks[0], lambda *_: runs.append(time.sleep(0.01)))], before=True):
        stream = SharedSession(Session(llama.lm), patience_s=0.1).stream("we", max_new_tokens=100)
        until(lambda: bool(runs))
        until(lambda: not decoding_threads())
        assert len(runs) < 50
    alone = Session(llama.lm).generate("we", max_new_tokens=100)
    assert [row.text for row in drained(stream)] == [row.text for row in alone]  # it goes on when somebody does


def test_a_request_cancelled_before_it_begins_runs_nothing(llama: Tiny) -> None:
    cancel = threading.Event()
    cancel.set()
    with own_hooks([(llama.blocks[0], lambda *_: pytest.fail("the model was run"))], before=True):
        rows = SharedSession(Session(llama.lm)).generate([Row("we"), Row("they")], cancel=cancel)
    assert [(row.finish, row.tokens) for row in rows] == [("cancelled", 0)] * 2


# --- failing ---------------------------------------------------------------------------------------------------------


def test_an_error_caused_by_one_request_reaches_that_one_alone(each: Tiny) -> None:
    """Here by a token that is in no other text, whichever batch it is in."""
    session = Session(each.lm)
    good = [Row("we", recipe_number(each.lm, 1)), Row("bread and cheese"), Row("they", recipe_number(each.lm, 2))]
    seen: set[int] = set()
    embedding = each.model.get_input_embeddings()
    with own_hooks([(embedding, lambda _, inputs: seen.update(inputs[0].flatten().tolist()))], before=True):
        wanted = [session.generate([row], max_new_tokens=20, sampling=GREEDY) for row in good]
    letters = {letter: each.lm.tokenizer(letter)["input_ids"][-1] for letter in "QZXJ#%@~=^"}
    letter, bad = next((letter, token) for letter, token in letters.items() if token not in seen)

    def fail(_module: Any, inputs: Any) -> None:
        if bool((inputs[0] == bad).any()):
            raise MemoryError("out of memory")

    shared, asked = SharedSession(session), [*good, Row(letter)]
    with slowed(each, 0.004), own_hooks([(embedding, fail)], before=True), ThreadPoolExecutor(4) as visitors:
        futures = [visitors.submit(shared.generate, [row], max_new_tokens=20, sampling=GREEDY) for row in asked]
        assert [future.result() for future in futures[:3]] == wanted
        with pytest.raises(MemoryError, match="out of memory"):
            futures[3].result()
    assert shared.generate([good[0]], max_new_tokens=20, sampling=GREEDY) == wanted[0]


@pytest.mark.parametrize("most", [1, 2])
def test_where_a_joint_batch_is_too_large_all_go_on_in_batches_of_their_own(each: Tiny, most: int) -> None:
    """As when a GPU has memory for a few rows only. Streams of random numbers go on where they were, too."""
    asked = [Row(prompt, recipe_number(each.lm, place)) for place, prompt in enumerate(["we", "they", "the dog sings"])]
    wanted = [Session(each.lm).generate([row], max_new_tokens=15) for row in asked]
    sizes: list[int] = []

    def fail(_module: Any, _inputs: Any, output: Any) -> None:
        size = (output[0] if isinstance(output, tuple) else output).shape[0]
        sizes.append(size)
        if size > most:
            raise torch.OutOfMemoryError("no memory left")

    shared = SharedSession(Session(each.lm))
    with slowed(each, 0.003), own_hooks([(each.blocks[2], fail)]), ThreadPoolExecutor(3) as visitors:
        found = list(visitors.map(lambda row: drain(shared.stream([row], max_new_tokens=15)), asked))
    assert [rows for _, rows in found] == wanted
    assert [joined(steps, 1)[0] for steps, _ in found] == [rows[0].text for rows in wanted]
    assert max(sizes) > most, "no step failed, so this test shows nothing"


def test_what_cannot_be_written_is_refused_in_the_callers_thread_and_disturbs_nobody(llama: Tiny) -> None:
    shared = SharedSession(Session(llama.lm), patience_s=60.0)
    other = make_tiny("llama", hidden_size=64)
    stranger = make_vector((1,), directions={1: torch.ones(64)}, norms={1: 1.0}, model=other.lm.reference)
    running: Any = shared.stream("the cat", max_new_tokens=30, sampling=GREEDY)
    with slowed(llama, 0.002):
        next(running)
        with pytest.raises(MismatchError):
            shared.generate("we", Recipe.of(stranger))
        with pytest.raises(UsageError, match="shorten the prompt"):
            shared.generate("we " * 300)
        with pytest.raises(UsageError, match="positions"):
            shared.generate("we", positions="first")
        with pytest.raises(UsageError, match="empty"):
            shared.generate([Row("")])
        _, rows = drain(running)
    assert rows == Session(llama.lm).generate("the cat", max_new_tokens=30, sampling=GREEDY)


def test_a_fault_of_the_decoder_itself_reaches_everybody_and_the_next_request_works(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedSession(Session(llama.lm))
    with monkeypatch.context() as broken, slowed(llama, 0.002):
        stream: Any = shared.stream("we", max_new_tokens=100, sampling=GREEDY)
        next(stream)
        broken.setattr(serving._Decoder, "_read_prompts", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drain(stream)
    assert shared.generate("we", max_new_tokens=4) == Session(llama.lm).generate("we", max_new_tokens=4)


# --- housekeeping ----------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_visit(llama: Tiny) -> None:
    shared = SharedSession(Session(llama.lm))
    shared.generate("we", recipe_number(llama.lm, 1), max_new_tokens=4)
    until(lambda: not decoding_threads())
    assert hook_count(llama.model) == 0
    gone = weakref.ref(shared)
    del shared
    gc.collect()
    assert gone() is None


def test_the_stream_of_one_visitor_may_be_read_in_several_threads(llama: Tiny) -> None:
    """Web servers ask for each item of an iterator in whatever thread is free."""
    stream: Any = SharedSession(Session(llama.lm)).stream("we", max_new_tokens=12, sampling=GREEDY)
    pieces = []
    with ThreadPoolExecutor(3) as readers:
        while (step := readers.submit(next, stream, None).result()) is not None:
            pieces.append(step.pieces[0])
    assert "".join(pieces) == Session(llama.lm).generate("we", max_new_tokens=12, sampling=GREEDY)[0].text


ABANDONING = """
import sys, time
sys.path.insert(0, {folder!r})
from tiny import tiny
from neurosteer.steering.shared import SharedSession
from neurosteer.steering.session import Session

this = tiny("llama")
this.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.1))
stream = SharedSession(Session(this.lm)).stream("we", max_new_tokens=200)
next(stream)
print(time.time(), flush=True)
"""


def test_a_program_that_ends_while_a_text_is_written_ends_soon_and_quietly() -> None:
    code = ABANDONING.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    took = time.time() - float(done.stdout)
    assert done.returncode == 0 and not done.stderr
    assert took < 10, "it wrote on for nobody"  # the whole text would take 20 s


@pytest.mark.embedded
def test_visitors_of_the_embedded_model_get_the_texts_that_they_get_alone(embedded_lm: LanguageModel) -> None:
    shape = embedded_lm.shape
    rows = []
    for place, prompt in enumerate(["Describe a street at noon.", "Hello!", "Write about bread.", "Who are you?"]):
        direction = torch.randn(shape.d_model, generator=torch.Generator().manual_seed(place))
        vector = make_vector(directions={15: direction}, norms={15: 60.0}, model=embedded_lm.reference)
        rows.append(Row(prompt, Recipe.of((vector, 0.7 * place))))
    session = Session(embedded_lm)
    wanted = [session.generate([row], sampling=GREEDY, max_new_tokens=10)[0] for row in rows]
    shared = SharedSession(session)
    with ThreadPoolExecutor(4) as visitors:
        found = list(visitors.map(lambda row: shared.generate([row], sampling=GREEDY, max_new_tokens=10)[0], rows))
    assert found == wanted and len({row.text for row in found}) == 4


def test_those_read_together_with_a_failing_request_decode_together_again(llama: Tiny) -> None:
    """One poisoned request among several must cost the others little, or anybody could slow down everybody."""
    session, n, length = Session(llama.lm), 6, 30
    poisoned = make_vector((1,), seed=3, model=llama.lm.reference)
    asked = [Row(text) for text in ("we", "they", "bread", "the cat", "the dog", "please")]
    options: dict[str, Any] = {"max_new_tokens": length, "sampling": GREEDY}
    wanted = [session.generate([row], **options) for row in asked]
    shared, began = SharedSession(session, patience_s=60.0), threading.Barrier(n + 1)
    real = Batch.step

    def step(batch: Batch) -> Any:
        if any(use.artifact.name == poisoned.name for one in batch.writings for use in one.recipe.uses):
            raise ZeroDivisionError("poisoned")
        return real(batch)

    def visit(row: Row) -> list[Row]:
        began.wait()
        return shared.generate([row], **options)

    with pytest.MonkeyPatch.context() as patched, slowed(llama, 0.004) as sizes, ThreadPoolExecutor(n + 1) as visitors:
        patched.setattr(Batch, "step", step)
        bad = visitors.submit(visit, Row("never", Recipe.of(poisoned)))
        assert list(visitors.map(visit, asked)) == wanted
        with pytest.raises(ZeroDivisionError):
            bad.result()
    # Alone throughout, the six would take 180 steps of one row each; each is alone for a step or two at most.
    assert len(sizes) < length + 4 * n, sizes
    assert sizes.count(n) > length // 2, "they did not decode together again"


def test_a_request_whose_logits_are_no_numbers_fails_alone_and_sets_nobody_apart(llama: Tiny) -> None:
    session = Session(llama.lm)
    asked = [Row("we"), Row("they"), Row("bread", Recipe.of(make_vector((1,), model=llama.lm.reference)))]
    options: dict[str, Any] = {"max_new_tokens": 12, "sampling": Sampling(seed=5)}
    wanted = [session.generate([row], **options) for row in asked]
    shared, real = SharedSession(session, patience_s=60.0), Batch._next_scores

    def spoiled(batch: Batch) -> torch.Tensor:
        scores = real(batch)
        for place, one in enumerate(batch.writings):
            if one.recipe.uses and len(one.text.ids) == 5:
                scores[place] = float("nan")
        return scores

    with pytest.MonkeyPatch.context() as patched, slowed(llama, 0.004), ThreadPoolExecutor(3) as visitors:
        patched.setattr(Batch, "_next_scores", spoiled)
        patched.setattr(serving._RowsAsked, "set_apart", lambda self: pytest.fail("nobody is to be set apart"))
        futures = [visitors.submit(shared.generate, [row], **options) for row in asked]
        assert [future.result() for future in futures[:2]] == wanted[:2]
        with pytest.raises(UsageError, match="After 5 tokens"):
            futures[2].result()


def test_a_strength_that_cannot_be_held_is_refused_in_the_callers_thread(llama: Tiny) -> None:
    recipe = Recipe.of((make_vector((1,), model=llama.lm.reference), 1e300))
    with pytest.raises(UsageError, match="can hold"):
        SharedSession(Session(llama.lm)).stream([Row("we", recipe)])
    assert not decoding_threads()
