"""The page on ZeroGPU, with the real `spaces` package in other processes (`zero_gpu.py`); and off it, unchanged."""

import base64
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import zero_gpu
from gradio_client import Client
from tiny import Tiny, ablating, clamping, make_circuit, make_vector
from zero_gpu import EXAMPLES, WRITING

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.combining import orthogonalised
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import artifact_data, unpack
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.errors import NeuroSteerError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.steering.session import Row, Session
from neurosteer.steering.shared import SharedSession
from neurosteer.ui import gpu, gpu_time
from neurosteer.ui.jobs import problem
from neurosteer.ui.loading import ModelHolder
from neurosteer.ui.show import colours

pytest.importorskip("spaces")
HELPER = Path(zero_gpu.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


# --- off ZeroGPU -----------------------------------------------------------------------------------------------------


def test_off_zero_gpu_nothing_is_wrapped(llama: Tiny) -> None:
    assert inspect.isgeneratorfunction(gpu._work) and not hasattr(gpu._work, "zerogpu")
    assert not hasattr(gpu._work, "__wrapped__")
    holder = ModelHolder("tiny", lambda name, progress: llama.lm)
    session = holder.wait()
    assert type(session) is gpu.LocalSession and session.lm is llama.lm


def test_in_this_process_a_model_writes_builds_and_colours_as_the_library_does(llama: Tiny) -> None:
    session = gpu.session_of(llama.lm, "tiny")
    row = Row("the cat", Recipe.of((make_vector(model=llama.lm.reference), 2.0)))
    stream = session.stream([row], **WRITING)
    while True:
        try:
            next(stream)
        except StopIteration as finished:
            (written,) = finished.value
            break
    assert written == Session(llama.lm).generate([row], **WRITING)[0]
    assert session.run(colours.coloured, "kl", [written, written]) == colours.coloured(
        llama.lm, "kl", [written, written]
    )
    assert same(session.run(build, EXAMPLES, layers=1), build(llama.lm, EXAMPLES, layers=1))


# --- what crosses ----------------------------------------------------------------------------------------------------


def same(one: Artifact, other: Artifact) -> bool:
    first, second = (json.loads(json.dumps(artifact_data(artifact))) for artifact in (one, other))
    for data in (first, second):
        data["provenance"].pop("created")
    if isinstance(one, NeuronCircuit) and isinstance(other, NeuronCircuit):
        names = ("neuron_layers", "neurons", "scores", "differences")
        return first == second and all(getattr(one, name).equal(getattr(other, name)) for name in names)
    assert isinstance(one, SteeringVector) and isinstance(other, SteeringVector)
    vectors = zip(one.directions.items(), other.directions.items(), strict=True)
    encoders = zip(one.encoders.values(), other.encoders.values(), strict=True)
    return (
        first == second
        and all(layer == there and direction.equal(found) for (layer, direction), (there, found) in vectors)
        and all(encoder.weights.equal(found.weights) for encoder, found in encoders)
    )


def overlapping() -> Artifact:
    pair = Recipe.of((make_vector(seed=1), 1.0), (make_vector(seed=2), 1.0))
    return orthogonalised(pair).uses[1].artifact


@pytest.mark.parametrize(
    "artifact",
    [
        make_vector(),
        make_circuit(),
        make_circuit(operation="shift"),
        ablating([1, 2], seed=3),
        clamping([2], seed=4, centred=True),
        overlapping(),
        make_vector() + 0.5 * make_vector(seed=1),
    ],
    ids=lambda artifact: f"{artifact.kind}-{artifact.operation}",
)
def test_an_artifact_crosses_whole_and_without_shared_memory(artifact: Artifact) -> None:
    rows = [Row("the cat", Recipe.of((artifact, 2.0)), sample) for sample in range(3)]
    crossed = pickle.loads(ForkingPickler.dumps(rows))
    assert [row.sample for row in crossed] == [0, 1, 2]
    assert len({id(row.recipe.uses[0].artifact) for row in crossed}) == 1
    assert same(crossed[0].recipe.uses[0].artifact, artifact)
    tensors = [value for value in vars(artifact).values() if hasattr(value, "is_shared")]
    tensors += getattr(artifact, "directions", {}).values()
    assert tensors and not any(tensor.is_shared() for tensor in tensors)


# --- on ZeroGPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(model_folder: Path) -> dict[str, Any]:
    """What was tried on a ZeroGPU Space, and what happened."""
    command = [sys.executable, str(HELPER), str(model_folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, ran.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.fixture(scope="module")
def lm(model_folder: Path) -> LanguageModel:
    return load_model(model_folder, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def texts(lm: LanguageModel) -> list[str]:
    """What the library writes in one process."""
    return [row.text for row in Session(lm).generate(zero_gpu.rows(), **WRITING)]


def test_the_model_is_placed_before_the_page_is_served_and_known_without_reading_it(
    found: dict[str, Any], lm: LanguageModel
) -> None:
    assert found["start"] == {
        "status": "tiny-llama on ZeroGPU, bfloat16",
        "kind": "ZeroGpuSession",
        "device": "cuda:0",
        "dtype": "torch.bfloat16",
        "fingerprint": lm.fingerprint,
    }


def test_texts_are_those_of_one_process_and_stream(found: dict[str, Any], texts: list[str]) -> None:
    assert found["texts"]["texts"] == texts
    assert found["texts"]["joined"] == texts[:2] and found["texts"]["steps"] >= 12
    assert len(set(texts)) == len(texts)


def test_building_tells_how_far_it_is_and_makes_the_same_artifact(found: dict[str, Any], lm: LanguageModel) -> None:
    told: list[str] = []
    artifact = build(lm, EXAMPLES, progress=lambda message, fraction=None: told.append(message))
    assert same(unpack(base64.b64decode(found["build"]["artifact"])), artifact)
    assert found["build"]["told"] == told


def test_colours_are_those_of_one_process(found: dict[str, Any], lm: LanguageModel) -> None:
    written = [replace(row, text="over the river") for row in zero_gpu.rows(4)[2:]]
    assert found["colours"] == {kind: colours.coloured(lm, kind, written) for kind in ("kl", "projection")}


def test_all_work_is_done_in_one_process_that_is_used_again_with_nothing_left_on_its_model(
    found: dict[str, Any],
) -> None:
    tried = found["one_process"]
    ((process, hooks),) = {tuple(look[:2]) for look in tried["there"]}
    assert process != tried["here"] and hooks == 0 and tried["lent"] == 0


def test_leaving_half_way_ends_the_work_at_once_and_leaves_nothing_behind(
    found: dict[str, Any], texts: list[str]
) -> None:
    tried, process = found["left_half_way"], found["one_process"]["there"][0][0]
    assert tried["seconds"] < 1 and 3 <= tried["steps"] < 100 and tried["lent"] == 0
    assert tried["look"][:2] == [process, 0]
    assert tried["texts"] == texts


def test_stop_ends_the_work_there_and_keeps_what_was_written(found: dict[str, Any], lm: LanguageModel) -> None:
    tried, process = found["stopped"], found["one_process"]["there"][0][0]
    assert tried["finish"] == ["cancelled"] * 2 and tried["text"] == tried["seen"]
    for row, text, tokens in zip(zero_gpu.rows(2), tried["text"], tried["tokens"], strict=True):
        assert text == Session(lm).generate([row], max_new_tokens=tokens)[0].text != ""
    assert max(tried["tokens"]) <= tried["steps"] < 100
    assert tried["look"][:2] == [process, 0]
    assert (tried["before"], tried["asked"]) == ("cancelled", 0)  # stopped before it began: no GPU was asked for


def test_a_build_can_be_cancelled(found: dict[str, Any]) -> None:
    tried, process = found["build_cancelled"], found["one_process"]["there"][0][0]
    assert tried["error"] == ["Cancelled", "This was cancelled; nothing was changed."]
    assert tried["look"][:2] == [process, 0] and tried["lent"] == 0


def test_a_mistake_arrives_as_its_one_line(found: dict[str, Any]) -> None:
    assert found["build"]["mistake"] == ["UsageError", "layers is 99; the model has layers 0 to 3."]


def test_a_mistake_that_can_be_seen_here_costs_no_gpu_time(found: dict[str, Any]) -> None:
    tried = found["mistakes_cost_nothing"]
    assert [kind for kind, _ in tried["errors"]] == ["UsageError", "MismatchError", "UsageError"]
    assert "prompt is empty" in tried["errors"][0][1] and "9 layers" in tried["errors"][1][1]
    assert tried["asked"] == 0


def test_a_fault_of_ours_stays_one_line_that_tells_nothing(found: dict[str, Any]) -> None:
    tried = found["faults"]
    assert tried["error"] == ["RuntimeError", "KeyError"] and tried["look"][1] == 0 and tried["lent"] == 0
    assert "went wrong on our side" in problem(RuntimeError("KeyError"))


def test_a_used_up_quota_is_said_in_one_line(found: dict[str, Any]) -> None:
    kind, message = found["refused"]["error"]
    assert kind == "NeuroSteerError" and message.startswith("There is no GPU for this at the moment: ")
    assert "GPU limit" in message and "\n" not in message


def test_what_spaces_says_of_a_quota_reaches_the_visitor() -> None:
    said = gr.Error(
        "You have exceeded your free ZeroGPU quota (17s requested vs. 3s left).", title="ZeroGPU quota exceeded"
    )
    explained = gpu._explained(said)
    assert isinstance(explained, NeuroSteerError) and "(17s requested vs. 3s left)" in str(explained)


def test_a_gpu_that_is_taken_back_is_said_in_one_line_and_the_next_one_works(found: dict[str, Any]) -> None:
    tried = found["gpu_taken_back"]
    assert tried["error"][0] == "NeuroSteerError" and "GPU was taken back" in tried["error"][1]
    assert tried["fresh process"]


def test_more_work_asks_for_more_seconds(found: dict[str, Any]) -> None:
    (little, much), (few, many) = found["seconds"]["writing"], found["seconds"]["building"]
    assert 10 <= little < much < 30 and 10 <= few < many < 120
    examples = replace(EXAMPLES, positive=tuple(f"{n} {'long ' * 400}" for n in range(2_000)))
    assert gpu._seconds(gpu._call, None, build, (examples,), {}, ()) == 120  # what can be had
    small, large = (
        gpu._seconds(gpu._call, name, colours.coloured, ("kl", ()), {}, ())
        for name in ("SmolLM2-135M-Instruct", "Llama-3.1-8B-Instruct")
    )
    assert small < large  # which takes longer to move to the GPU


def test_two_visitors_at_once_get_their_own_texts(found: dict[str, Any], texts: list[str]) -> None:
    assert found["two_at_once"] == {"texts": [texts, texts], "lent": 0}


def test_a_model_that_is_loaded_later_costs_no_gpu_time_to_load_and_its_process_goes_with_it(
    found: dict[str, Any], texts: list[str]
) -> None:
    assert found["another_model_later"] == {"texts": texts, "loads": 0, "ended": True, "first": texts}


def test_calibrating_and_comparing_layers_asks_for_more_seconds_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(examples: ContrastSet, **options: Any) -> float:
        return gpu_time.calling_s(build, (examples,), options, ())

    longer = replace(EXAMPLES, positive=tuple(f"{text} {'long ' * 400}" for text in EXAMPLES.positive))
    plain, given, auto = (
        seconds(EXAMPLES, **options) for options in ({"calibrate": False}, {"layers": "2"}, {"layers": "auto"})
    )
    assert plain + 3 < given and given + 3 < auto  # the rounds of calibrating, and several candidates' besides
    assert seconds(longer, calibrate=False) > plain and seconds(longer) > auto
    monkeypatch.setattr(gpu_time, "calibration_prompts", lambda: ("a prompt of some words",) * 600)
    many = seconds(EXAMPLES, layers="2")
    monkeypatch.setattr(gpu_time, "calibration_prompts", lambda: ("a prompt of some words",) * 1200)
    assert seconds(EXAMPLES, layers="2") == pytest.approx(2 * many, rel=0.1)
    assert gpu._seconds(gpu._call, "Llama-3.1-8B-Instruct", build, (EXAMPLES,), {}, ()) <= 120


# --- app.py as a ZeroGPU Space ---------------------------------------------------------------------------------------


class Space:
    """`app.py` on a ZeroGPU Space, whose loans of GPUs can be watched."""

    def __init__(self, folder: Path, port: int, log: Path) -> None:
        self.url, self._log, self._loans = f"http://127.0.0.1:{port}", log, log.with_name("loans.json")
        command = [sys.executable, str(HELPER), "--serve", str(self._loans)]
        command += ["--model", str(folder), "--port", str(port)]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
            )

    def until(self, condition: Any, seconds: float) -> list[int]:
        """Wait until `[starts reported, loans asked for, loans out]` is as wanted."""
        end = time.monotonic() + seconds
        while not condition(*(loans := self.loans())):
            assert time.monotonic() < end and self.process.poll() is None, (loans, self._log.read_text()[-2000:])
            time.sleep(0.05)
        return loans

    def loans(self) -> list[int]:
        return json.loads(self._loans.read_text()) if self._loans.exists() else [0, 0, 0]


@contextmanager
def space(folder: Path, log: Path) -> Iterator[Space]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = Space(folder, port, log)
    try:
        running.until(lambda begun, asked, lent: begun == 1, 90)
        while not _listens(port):
            assert running.process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        yield running
    finally:
        os.killpg(running.process.pid, signal.SIGKILL)  # and the workers that it forked
        running.process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_every_kind_of_session_is_asked_in_the_same_words() -> None:
    asked = {"max_new_tokens", "sampling", "positions", "raw", "cancel"}
    for kind in (Session, SharedSession, gpu.ZeroGpuSession):
        assert asked <= set(inspect.signature(kind.stream).parameters), kind


def test_app_py_is_a_zero_gpu_space_as_it_is(model_folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    with space(model_folder, tmp_path / "log.txt") as running:
        client = Client(running.url, verbose=False, analytics_enabled=False)
        offered = client.predict(api_name="/list")
        assert offered["models"][0] == {"name": "tiny-llama", "default": True} and running.loans()[1] == 0
        built = client.predict(list(EXAMPLES.positive), list(EXAMPLES.negative), name="mood", api_name="/build")
        asked = {"use": [f"{built['artifact']}:2"], "compare": True, "greedy": True, "max_new_tokens": 10}
        found = client.predict("the cat", **asked, api_name="/steer")
        recipe = Recipe.of((unpack(base64.b64decode(built["artifact"])), 2.0))
        rows = [Row("the cat", recipe), Row("the cat")]
        wanted = Session(lm).generate(rows, max_new_tokens=10, sampling=replace(WRITING["sampling"], greedy=True))
        assert [found[side]["text"] for side in ("steered", "unsteered")] == [row.text for row in wanted]
        with pytest.raises(Exception, match=r"layers is 77; the model has layers 0 to 3\.$"):
            client.predict(list(EXAMPLES.positive), list(EXAMPLES.negative), layers="77", api_name="/build")
        assert running.until(lambda begun, asked, lent: lent == 0, 5)[1] == 3

        program = subprocess.Popen([sys.executable, "-c", _LONG, running.url, built["artifact"]])
        try:
            running.until(lambda begun, asked, lent: lent == 1, 60)
        finally:
            program.kill()
            program.wait()
        running.until(lambda begun, asked, lent: lent == 0, 3.5)  # 200 tokens would take 4 s at least
        again = client.predict("the cat", **asked, api_name="/steer")
        assert again["steered"]["text"] == wanted[0].text


_LONG = """
import sys, time
from gradio_client import Client
client = Client(sys.argv[1], verbose=False, analytics_enabled=False)
client.submit("the cat", [sys.argv[2]], max_new_tokens=200, api_name="/steer")
time.sleep(60)
"""
