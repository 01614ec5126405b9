"""The page as a whole, the visitors' artifacts, stopping, and loading the model."""

import copy
import gc
import inspect
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pytest
from gradio.context import LocalContext
from pages import (
    ENDPOINTS,
    HOSTILE,
    Never,
)
from tiny import Tiny

from neurosteer.artifacts.storage import unpack
from neurosteer.errors import Cancelled, ModelError, UsageError
from neurosteer.steering.decoding import Sampling
from neurosteer.ui import shelf as shelves
from neurosteer.ui import work
from neurosteer.ui.jobs import Jobs, guarded, problem
from neurosteer.ui.loading import ModelHolder, Models
from neurosteer.ui.page import PageHandlers, create_app
from neurosteer.ui.shelf import MOST_ARTIFACTS, MOST_BYTES, put, size_in_memory, zip_file
from neurosteer.ui.wiring import Form, bound

# --- the visitor's artifacts, and stopping ----------------------------------------------------------------------------


def test_a_name_that_is_taken_is_numbered_and_the_old_shelf_left_alone(mood: Any) -> None:
    first, label = put({}, mood)
    second, other = put(first, mood)
    assert (label, other) == ("mood", "mood (2)")
    assert list(first) == ["mood"] and list(second) == ["mood", "mood (2)"]


def test_artifacts_survive_what_the_page_does_to_its_state(mood: Any) -> None:
    copies: list[Any] = [copy.deepcopy(mood), pickle.loads(pickle.dumps(mood))]
    for again in copies:
        assert again.directions[1].equal(mood.directions[1])


def test_the_zip_on_offer_is_the_artifact_and_goes_with_it(mood: Any) -> None:
    mine = replace(mood)
    path = Path(zip_file(mine))
    assert path.name == "mood.zip" and zip_file(mine) == str(path)
    path.unlink()  # as when its visitor's connection broke off
    assert zip_file(mine) == str(path)
    unpacked: Any = unpack(path)
    assert unpacked.directions[1].equal(mood.directions[1])
    del mine
    gc.collect()
    assert not path.exists()


def test_only_a_visitors_own_work_is_stopped() -> None:
    jobs = Jobs()
    anna, ben = jobs.begin("anna", "steer"), jobs.begin("ben", "steer")
    jobs.cancel("anna", "steer")
    assert anna.is_set() and not ben.is_set()
    jobs.leave("ben")
    assert ben.is_set() and not jobs.current("ben", "steer").is_set()


def test_beginning_again_stops_what_was_running() -> None:
    jobs = Jobs()
    first = jobs.begin("anna", "build")
    assert jobs.current("anna", "build") is first
    second = jobs.begin("anna", "build")
    assert first.is_set() and not second.is_set()


def test_a_visitors_files_go_when_they_leave_unless_another_has_the_same(tmp_path: Path) -> None:
    jobs, own, shared = Jobs(), tmp_path / "own.csv", tmp_path / "shared.csv"
    for file in (own, shared):
        file.write_text("x")
    jobs.remove_later("anna", str(own), str(shared), None)
    jobs.remove_later("bert", str(shared))
    jobs.leave("anna")
    assert not own.exists() and shared.exists()
    jobs.leave("bert")
    jobs.leave("bert")
    assert not shared.exists()


def test_a_file_that_nobody_uploaded_stays_when_a_visitor_leaves_who_says_it_is_theirs(tmp_path: Path) -> None:
    page = create_app(holder=Never())
    jobs, released, upload = Jobs(), tmp_path / "sentiment.zip", tmp_path / "mine.zip"
    for file in (released, upload):
        file.write_text("x")
    page.upload_file_set.add(str(upload))
    known = LocalContext.blocks.set(page)
    try:
        jobs.remove_uploads_later("anna", str(released), str(upload), None)
    finally:
        LocalContext.blocks.reset(known)
    jobs.leave("anna")
    assert released.exists() and not upload.exists()


def test_a_shelf_takes_so_many_artifacts_and_says_what_to_take_off(mood: Any) -> None:
    shelf: Any = {}
    for _ in range(MOST_ARTIFACTS):
        shelf, _ = put(shelf, mood)
    with pytest.raises(UsageError, match=r"holds 16 artifacts and 32 MB .*take some off on the Library tab, like mood"):
        put(shelf, mood)
    shelf.pop("mood (2)")
    assert len(put(shelf, mood)[0]) == MOST_ARTIFACTS
    assert put(shelf, mood, "mood")[1] == "mood", "what stands in another's place takes no more room"


def test_released_artifacts_take_no_room_on_a_shelf(mood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    released = {f"released-{number}": replace(mood) for number in range(MOST_ARTIFACTS)}
    monkeypatch.setattr("neurosteer.ui.shelf.released", lambda: released)
    assert put(released, mood)[1] == "mood"


@pytest.mark.slow
def test_what_little_bytes_of_an_upload_become_in_memory_counts(mood: Any) -> None:
    nested = replace(mood, parameters={"x": [[] for _ in range(700_000)]})  # 2 MB of JSON
    tracemalloc.start()
    kept = copy.deepcopy(nested)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept is not None and taken > MOST_BYTES
    assert size_in_memory(nested) == pytest.approx(taken, rel=0.2)
    with pytest.raises(UsageError, match="does not fit on the shelf"):
        put({}, nested)
    assert mood.directions[1].nbytes < size_in_memory(mood) < 100_000


def test_a_zip_is_offered_whole_or_not_at_all(mood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(mood)

    opened = os.fdopen

    class Full:
        def __init__(self, *given: Any) -> None:
            self.file = opened(*given)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:300])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(shelves.os, "fdopen", Full)
        zip_file(mine)
    path = Path(zip_file(mine))
    assert unpack(path).name == "mood" and [file.name for file in path.parent.iterdir()] == ["mood.zip"]


def test_visitors_who_fetch_the_same_zip_at_once_all_get_it_whole(mood: Any) -> None:
    mine, begun = replace(mood), threading.Barrier(8, timeout=30)

    def fetch(_: int) -> bytes:
        begun.wait()
        return Path(zip_file(mine)).read_bytes()

    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(fetch, range(8)))
    assert all(unpack(data).name == "mood" for data in found)


def test_a_fault_of_ours_is_one_plain_sentence_and_its_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert problem(UsageError("strength is 'x'; give a number.")) == "strength is 'x'; give a number."
    with caplog.at_level(logging.ERROR):
        said = problem(KeyError("secret"))
    assert "secret" not in said and "\n" not in said and "is kept" in said
    assert "secret" in caplog.text


def test_a_popup_error_is_escaped() -> None:
    def fail() -> None:
        raise UsageError(HOSTILE)

    with pytest.raises(gr.Error) as raised:
        guarded(fail)()
    assert "<script" not in raised.value.message


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_holder_loads_in_the_background_and_tells_how_far_it_is(llama: Tiny) -> None:
    go_on, heard = threading.Event(), []

    def load(name: str | None, progress: Any) -> Any:
        progress(f"Downloading {name}", 0.45)
        go_on.wait(30)
        return llama.lm

    def hear(message: str, fraction: float | None = None) -> None:
        heard.append((message, fraction))
        if fraction is not None:
            go_on.set()

    holder = ModelHolder("tiny", load)
    holder.start()
    assert holder.wait(hear).lm is llama.lm
    assert ("Waiting for the model: downloading tiny", 0.45) in heard
    assert holder.status.ready and holder.status.text.endswith("on CPU, float32")


def test_a_load_that_failed_is_told_and_can_be_repeated(llama: Tiny) -> None:
    problems: list[Exception] = [ModelError("no connection; try again."), RuntimeError("secret")]

    def load(name: str | None, progress: Any) -> Any:
        if problems:
            raise problems.pop(0)
        return llama.lm

    holder = ModelHolder("tiny", load)
    page = PageHandlers(Models.of(holder), Jobs())
    with pytest.raises(ModelError, match=r"no connection; try again\..*'Load the model again'"):
        holder.wait()
    line, timer, retry = page.status()
    assert "not loaded: no connection" in line and timer.active is False and retry["visible"]
    holder.start()
    with pytest.raises(ModelError, match="could not be loaded"):
        holder.wait()
    assert "secret" not in holder.status.text
    page.retry()
    assert holder.wait().lm is llama.lm
    line, timer, retry = page.status()
    assert "ready" in line and timer.active is False and not retry["visible"]


def test_waiting_for_the_model_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        Never().wait(cancel=cancel)


@pytest.mark.slow
def test_the_page_is_made_without_importing_torch() -> None:
    code = (
        "import sys, neurosteer.ui.page as page\n"
        "class Never(page.ModelHolder):\n"
        "    def start(self): pass\n"
        "page.create_app(holder=Never())\n"
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr


# --- the page ---------------------------------------------------------------------------------------------------------


def test_no_handler_of_the_page_is_an_open_endpoint() -> None:
    page = create_app(holder=Never())
    opened = [str(fn.api_name) for fn in page.fns.values() if fn.fn is not None and fn.api_visibility != "private"]
    assert opened == ENDPOINTS


def test_handlers_get_objects_and_change_components_by_name() -> None:
    class Two(NamedTuple):
        first: str
        second: float

    heard: list[Any] = []

    def handle(request: gr.Request, progress: gr.Progress, one: int, two: Two) -> dict[str, Any]:
        heard.append((request, one, two))
        return {"there": one} if one else {}

    def stream(two: Two) -> Iterator[Two]:
        yield two
        yield two._replace(first="later")

    with gr.Blocks():
        alone, first, second, there = gr.Number(), gr.Textbox(), gr.Number(), gr.HTML()
        form = Form(Two, {"second": second, "first": first})
        run, inputs, _ = bound(handle, [alone, form], {"there": there, "other": first})
        grow, _, outputs = bound(stream, [form], {"first": first, "second": second})
    assert inputs == [alone, second, first] and outputs == [first, second]
    names = [parameter.name for parameter in inspect.signature(run).parameters.values()]
    default = inspect.signature(run).parameters["progress"].default
    assert names == ["request", "progress", "values"] and isinstance(default, gr.Progress)
    assert run("who", None, 7, 0.5, "a") == {there: 7} and heard == [("who", 7, Two("a", 0.5))]
    assert run("who", None, 0, 0.5, "a") == gr.skip()
    assert list(grow(0.5, "a")) == [{first: "a", second: 0.5}, {first: "later", second: 0.5}]
    wrong, *_ = bound(lambda: {"no such": 1}, [], {"there": there})
    with pytest.raises(KeyError):
        wrong()


def test_what_does_not_answer_is_given_up_and_never_piles_up() -> None:
    gone, refused = threading.Event(), []
    for _ in range(3 * work.HUB):
        with pytest.raises(UsageError, match=r"Fetching x (took over 0\.01 s|has to wait)") as raised:
            work.within(0.01, "Fetching x", lambda: gone.wait(30))
        refused.append("has to wait" in str(raised.value))
    assert refused.count(False) == 2 * work.HUB
    gone.set()
    while any(thread.name == "neurosteer-hub" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert work.within(5, "Fetching x", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        work.within(5, "Fetching x", lambda: 1 // 0)


def test_no_visitor_waits_for_another_who_does_the_same() -> None:
    """Gradio lets one event of a kind run at a time where nothing is said."""
    page = create_app(holder=Never())
    queued = [fn for fn in page.fns.values() if fn.fn is not None and fn.queue and fn.name != "leave"]
    assert len(queued) > 50
    assert [fn.name for fn in queued if fn.concurrency_limit in ("default", 1)] == []


def test_the_settings_begin_where_the_library_does() -> None:
    page = create_app(holder=Never())
    labelled = {getattr(block, "label", None): getattr(block, "value", None) for block in page.blocks.values()}
    defaults = Sampling()
    assert (labelled["Temperature"], labelled["Top-p"]) == (defaults.temperature, defaults.top_p)
    assert (labelled["Seed"], labelled["Greedy"]) == (defaults.seed, defaults.greedy)


def test_what_is_hidden_hands_over_text_too() -> None:
    """The browser fills in an empty box only once it is shown."""
    page = create_app(holder=Never())
    hidden = [block for block in page.blocks.values() if isinstance(block, gr.Textbox) and not block.visible]
    assert len(hidden) >= 3 and all(block.value == "" for block in hidden)


def test_every_input_has_a_label() -> None:
    page = create_app(holder=Never())
    kinds = (gr.Textbox, gr.Slider, gr.Radio, gr.Dropdown, gr.Number, gr.Checkbox, gr.File)
    inputs = [block for block in page.blocks.values() if isinstance(block, kinds)]
    assert inputs and all(block.label for block in inputs)
