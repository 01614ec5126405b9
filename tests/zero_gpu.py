"""ZeroGPU without a GPU: the real `spaces` package, a scheduler for it, and processes that compute on their CPU.

From `begin` on, a process is like a Space's: `spaces` has patched torch, decorated functions run in processes forked
from this one and used again, all that goes there or comes back is pickled, and what is "on the GPU" cannot be read
here. Only its last step is another: a forked process finds those tensors on its CPU.

As a program, `zero_gpu.py FOLDER` tries a model out in such a process and prints what happened as JSON;
`zero_gpu.py --serve LOANS ARGUMENTS` is `app.py` on such a Space; the file LOANS tells how many GPUs are out.
"""

import base64
import gc
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from tiny import ablating, clamping, hook_count, make_circuit, make_vector

from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.storage import pack
from neurosteer.building.build import build
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.reference import ModelReference
from neurosteer.steering.batches import Batch
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, drained
from neurosteer.ui.loading import ModelHolder
from neurosteer.ui.show import colours

WRITING: dict[str, Any] = {"max_new_tokens": 12, "sampling": Sampling(seed=7)}
EXAMPLES = ContrastSet(
    tuple(f"happy the cat sings over mountain {number}" for number in range(24)),
    tuple(f"sad the cat sings over mountain {number}" for number in range(24)),
)


class Scheduler(ThreadingHTTPServer):
    """Lends one GPU to whoever asks. `asked` are the seconds of every request, `lent` the loans that are out."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[int] = []
        self.lent = 0
        self.begun = 0
        self.refusal: dict[str, Any] | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answers(BaseHTTPRequestHandler):
    server: Scheduler  # type: ignore[assignment]

    def do_POST(self) -> None:
        asked, answer, status = urlparse(self.path), {}, 200
        if asked.path == "/startup-report":
            self.server.begun += 1
        elif asked.path == "/schedule" and self.server.refusal is not None:
            answer, status = self.server.refusal, 429
        elif asked.path == "/schedule":
            self.server.asked.append(int(parse_qs(asked.query)["durationSeconds"][0]))
            self.server.lent += 1
            token = f"loan-{len(self.server.asked)}"
            answer = {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": token}
        elif asked.path == "/release":
            self.server.lent -= 1
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def begin() -> Scheduler:
    """Make this process a ZeroGPU Space's."""
    scheduler = Scheduler()
    os.environ["SPACES_ZERO_GPU"] = "true"
    os.environ["SPACES_ZERO_DEVICE_API_URL"] = f"http://127.0.0.1:{scheduler.server_address[1]}"
    _pretend_cuda()
    import spaces.zero.torch as theirs
    from spaces.zero.torch import patching

    def init(nvidia_uuid: str) -> None:
        from neurosteer.ui import gpu

        gpu._GPU = "cpu"  # in the forked process alone

    def move(callback: object = None) -> None:
        for placed, original in patching.cuda_aliases.items():
            assert original is not None
            placed.data = original

    theirs.init, theirs.move, theirs.pack = init, move, lambda: 0
    return scheduler


def _pretend_cuda() -> None:
    """What `spaces` looks for while it is imported, where torch was built without CUDA."""
    if torch.version.cuda is None:
        torch.version.cuda = "12.8"
        torch._C._cuda_init = lambda: None  # type: ignore[attr-defined]
        torch.cuda._is_in_bad_fork = bool  # type: ignore[assignment]


# --- trying it out ---------------------------------------------------------------------------------------------------


_steps = 0


def slow_steps(seconds: float) -> None:
    """From now on a step of decoding takes its time, and is counted in the process that does it."""
    step = Batch.step

    def slowly(self: Batch) -> Any:
        global _steps
        _steps += 1
        time.sleep(seconds)
        return step(self)

    Batch.step = slowly


def look(lm: LanguageModel) -> tuple[int, int, int]:
    """Which process this is, how many hooks are on the model, and how many steps were done here."""
    return os.getpid(), hook_count(lm.model), _steps


_loaded_in: list[int] = []


def note_loads() -> None:
    """From now on every load of a model is noted, by the process that it happens in."""
    from neurosteer.ui import gpu  # not before `begin`

    load = gpu.load_model

    def noted(*given: Any, **options: Any) -> LanguageModel:
        _loaded_in.append(os.getpid())
        return load(*given, **options)

    gpu.load_model = noted


def loads(lm: LanguageModel) -> int:
    """How many models were loaded in this process."""
    return _loaded_in.count(os.getpid())


def ends(process: int) -> bool:
    """Whether a process is over within some seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def fail(lm: LanguageModel) -> None:
    raise KeyError("hf_secret")


def rows(count: int = 99) -> list[Row]:
    """Rows with artifacts of every kind."""
    vector, circuit = make_vector(), make_circuit(operation="shift")
    recipes = [
        Recipe(),
        Recipe.of((vector, 2.0)),
        Recipe.of((circuit, 1.5), (vector, -1.0)),
        Recipe((Use(make_circuit(seed=2), multiplier=0.0),)),
        Recipe.of(ablating([1], seed=3), clamping([2], seed=4)),
    ]
    return [Row("the cat", recipe, sample) for recipe in recipes for sample in range(2)][:count]


class Trial:
    """What happens on a ZeroGPU Space with the model in `folder`, in the order of the methods; all as JSON."""

    def __init__(self, folder: str, scheduler: Scheduler) -> None:
        self.scheduler, self.folder = scheduler, folder
        slow_steps(0.003)
        note_loads()
        self.holder = ModelHolder(folder)
        self.holder.start()
        self.status = self.holder.status
        self.session: Any = self.holder.wait()
        self.device = str(self.session.lm.device)  # as the main thread sees it; others cannot tell

    def texts(self) -> list[str]:
        return [row.text for row in drained(self.session.stream(rows(), **WRITING))]

    def look(self) -> tuple[int, int, int]:
        return self.session.run(look)

    def error(self, work: Any) -> list[str]:
        try:
            work()
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    # --- what is tried ---

    def tries_start(self) -> dict[str, Any]:
        lm = self.session.lm
        return {
            "status": self.status.text,
            "kind": type(self.session).__name__,
            "device": self.device,
            "dtype": str(lm.dtype),
            "fingerprint": lm.reference.fingerprint,
        }

    def tries_texts(self) -> dict[str, Any]:
        steps = list(self.session.stream(rows(2), **WRITING))
        joined = ["".join(step.pieces[row] for step in steps) for row in range(2)]
        return {"texts": self.texts(), "steps": len(steps), "joined": joined}

    def tries_build(self) -> dict[str, Any]:
        told: list[str] = []
        artifact = self.session.run(
            build, EXAMPLES, progress=lambda message, fraction=None: told.append(message), layers="auto"
        )
        mistake = self.error(lambda: self.session.run(build, EXAMPLES, layers=99))
        return {"artifact": base64.b64encode(pack(artifact)).decode(), "told": told, "mistake": mistake}

    def tries_colours(self) -> dict[str, Any]:
        written = [replace(row, text="over the river") for row in rows(4)[2:]]
        return {kind: self.session.run(colours.coloured, kind, written) for kind in ("kl", "projection")}

    def tries_one_process(self) -> dict[str, Any]:
        return {"here": os.getpid(), "there": [self.look() for _ in range(3)], "lent": self.scheduler.lent}

    def tries_left_half_way(self) -> dict[str, Any]:
        steps = self.look()[2]
        stream = self.session.stream(rows(), max_new_tokens=200)
        for _ in range(3):
            next(stream)
        began = time.monotonic()
        stream.close()
        return {
            "seconds": time.monotonic() - began,
            "look": self.look(),
            "steps": self.look()[2] - steps,
            "lent": self.scheduler.lent,
            "texts": self.texts(),
        }

    def tries_stopped(self) -> dict[str, Any]:
        steps, cancel, found = self.look()[2], threading.Event(), {}
        seen = ["", ""]

        def stream() -> Iterator[Any]:
            written = yield from self.session.stream(rows(2), max_new_tokens=200, cancel=cancel)
            found.update({name: [getattr(row, name) for row in written] for name in ("text", "tokens", "finish")})

        for step in stream():
            seen = [text + piece for text, piece in zip(seen, step.pieces, strict=True)]
            if len(seen[0]) > 5:
                cancel.set()
        found |= {"seen": seen, "look": self.look(), "steps": self.look()[2] - steps}
        asked = len(self.scheduler.asked)
        before = drained(self.session.stream(rows(1), cancel=cancel))
        return {**found, "before": before[0].finish, "asked": len(self.scheduler.asked) - asked}

    def tries_build_cancelled(self) -> dict[str, Any]:
        cancel = threading.Event()
        error = self.error(lambda: self.session.run(build, EXAMPLES, progress=lambda *_: cancel.set(), cancel=cancel))
        return {"error": error, "look": self.look(), "lent": self.scheduler.lent}

    def tries_faults(self) -> dict[str, Any]:
        error = self.error(lambda: self.session.run(fail))
        return {"error": error, "look": self.look(), "lent": self.scheduler.lent}

    def tries_mistakes_cost_nothing(self) -> dict[str, Any]:
        before = len(self.scheduler.asked)
        foreign = make_vector(model=ModelReference("other", None, 9, 32, 64, "0" * 16))
        errors = [
            self.error(lambda: next(self.session.stream([Row("")]))),
            self.error(lambda: next(self.session.stream([Row("a", Recipe.of(foreign))]))),
            self.error(lambda: next(self.session.stream([Row("a")], max_new_tokens=100_000))),
        ]
        return {"errors": errors, "asked": len(self.scheduler.asked) - before}

    def tries_refused(self) -> dict[str, Any]:
        self.scheduler.refusal = {"left": 3, "wait": 3600}
        error = self.error(lambda: next(self.session.stream(rows(1))))
        self.scheduler.refusal = None
        return {"error": error}

    def tries_seconds(self) -> dict[str, Any]:
        def asked(work: Any) -> int:
            before = len(self.scheduler.asked)
            work()
            return self.scheduler.asked[before]

        texts = [f"{word} {number} " * 100 for word in ("good", "bad") for number in range(200)]
        large = ContrastSet(tuple(texts[:200]), tuple(texts[200:]))
        small = ContrastSet(tuple(texts[:20]), tuple(texts[200:220]))
        cancel = threading.Event()

        def begun(examples: ContrastSet) -> None:
            cancel.clear()
            self.error(lambda: self.session.run(build, examples, progress=lambda *_: cancel.set(), cancel=cancel))

        return {
            "writing": [asked(lambda n=n: next(self.session.stream(rows(2), max_new_tokens=n))) for n in (8, 128)],
            "building": [asked(lambda e=e: begun(e)) for e in (small, large)],
        }

    def tries_two_at_once(self) -> dict[str, Any]:
        with ThreadPoolExecutor(2) as executor:
            both = [executor.submit(self.texts) for _ in range(2)]
            return {"texts": [one.result() for one in both], "lent": self.scheduler.lent}

    def tries_another_model_later(self) -> dict[str, Any]:
        other = ModelHolder(self.folder + "/.")  # another name, so another model; loaded in a thread
        other.start()
        first, self.session = self.session, other.wait()
        found = {"texts": self.texts(), "loads": self.session.run(loads)}
        process, self.session, other = self.look()[0], first, None
        gc.collect()
        return {**found, "ended": ends(process), "first": self.texts()}

    def tries_gpu_taken_back(self) -> dict[str, Any]:
        process = self.look()[0]
        stream = self.session.stream(rows(), max_new_tokens=200)
        next(stream)
        os.kill(process, 9)
        error = self.error(lambda: list(stream))
        return {"error": error, "fresh process": self.look()[0] != process}


def _try_out(folder: str) -> dict[str, Any]:
    scheduler = begin()
    trial = Trial(folder, scheduler)
    found: dict[str, Any] = {}

    def run() -> None:  # not in the main thread, like any handler
        for name, method in vars(Trial).items():
            if name.startswith("tries_"):
                found[name.removeprefix("tries_")] = method(trial)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def _serve(loans: str, arguments: list[str]) -> None:
    scheduler = begin()
    slow_steps(0.02)
    sys.argv = ["app.py", *arguments]
    threading.Thread(target=_report, args=(scheduler, Path(loans)), daemon=True).start()
    runpy.run_path(str(Path(__file__).parent.parent / "app.py"), run_name="__main__")


def _report(scheduler: Scheduler, out: Path) -> None:
    """Whenever it changes: how often the page has begun, how many loans were asked for, and how many are out.

    In a file of its own, replaced as a whole: what is printed mixes with what other threads and processes print.
    """
    last: list[int] = []
    while True:
        now = [scheduler.begun, len(scheduler.asked), scheduler.lent]
        if now != last:
            fresh = out.with_suffix(".new")
            fresh.write_text(json.dumps(now))
            fresh.replace(out)
            last = now
        time.sleep(0.02)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2], sys.argv[3:])
    else:
        answer = _try_out(sys.argv[1])
        print("\nFOUND", json.dumps(answer), flush=True)
