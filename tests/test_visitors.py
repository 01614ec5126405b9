"""Visitors of one page over real HTTP: many at once, and some who leave before they have what they asked for."""

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.utils import get_upload_folder
from gradio_client import Client
from pages import Ready, serving, slow_steps
from tiny import Tiny, make_circuit, make_vector, tiny

from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import pack
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.ui.page import create_app, launch

VISITORS = 16


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Ready(Session(tiny("llama").lm))) as address:
        yield address


def free_within(seconds: float, steps: list[float], left: float) -> bool:
    """Whether nothing has been written since `seconds` after `left`; waits until nothing is for a second."""
    while time.monotonic() - steps[-1] < 1.0:
        if time.monotonic() - left > seconds + 1.0:
            return False
        time.sleep(0.05)
    return steps[-1] - left < seconds


def as_text(artifact: Any) -> str:
    return base64.b64encode(pack(artifact)).decode()


def test_sixteen_visitors_over_http_get_the_texts_they_would_get_alone(
    url: str, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a recipe and a prompt of their own, greedy, in float32; and they are written together."""
    uses = [
        (make_vector((n % 3,), seed=n) if n % 2 else make_circuit(seed=n), (0.5 + 0.2 * n) * (-1) ** n)
        for n in range(VISITORS)
    ]
    prompts = [f"the cat sings over mountain {n} " * (1 + n % 3) for n in range(VISITORS)]
    steps = slow_steps(monkeypatch, 0.02)
    begun = threading.Barrier(VISITORS, timeout=120)

    def visit(number: int) -> str:
        artifact, strength = uses[number]
        client = Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})
        given = [f"{as_text(artifact)}:{strength}"]
        begun.wait()
        found = client.predict(prompts[number], given, greedy=True, max_new_tokens=24, api_name="/steer")
        return found["steered"]["text"]

    with ThreadPoolExecutor(VISITORS) as visitors:
        texts = list(visitors.map(visit, range(VISITORS)))
    n_steps = len(steps)
    rows = [Row(prompt, Recipe.of(use)) for prompt, use in zip(prompts, uses, strict=True)]
    options: dict[str, Any] = {"max_new_tokens": 24, "sampling": Sampling(greedy=True)}
    assert texts == [Session(llama.lm).generate([row], **options)[0].text for row in rows]
    assert len(set(texts)) > VISITORS // 2
    assert n_steps < VISITORS * 24 / 2


def test_a_connection_that_is_cut_frees_its_place_within_five_seconds(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program without our client would ask: the request, then its events until the wire is cut."""
    steps = slow_steps(monkeypatch, 0.1)
    ask = {"data": ["the cat", [as_text(make_vector())], False, "", 200, 0, True, 0.8, 0.95, False]}
    call = httpx.post(f"{url}gradio_api/call/steer", json=ask).json()["event_id"]
    with httpx.stream("GET", f"{url}gradio_api/call/steer/{call}", timeout=30):
        until(lambda: len(steps) > 3)
    assert free_within(5.0, steps, time.monotonic())


def ask(url: str, page: Any, handler: str, session: str, query: str = "") -> None:
    """Send an event of a session's own page, all of whose inputs are as they are at first."""
    (number,) = [number for number, fn in page.fns.items() if fn.name == handler]
    inputs = [None if isinstance(one, gr.State) else getattr(one, "value", None) for one in page.fns[number].inputs]
    given = {"data": inputs, "fn_index": number, "session_hash": session}
    assert httpx.post(f"{url}gradio_api/queue/join{query}", json=given, timeout=30).status_code == 200


def told(url: str, session: str) -> str:
    """What a session is told until its event is over."""
    with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash={session}", timeout=30) as answer:
        for line in answer.iter_lines():
            if "process_completed" in line:
                return line
    raise AssertionError("it was not completed")


def test_a_link_to_a_hub_that_does_not_answer_keeps_no_visitor_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), threading.Event()

    def pull(name: str, **_: Any) -> Any:
        asked.set()
        answers.wait(60)
        return make_vector(name="slow")

    monkeypatch.setattr("neurosteer.hub.pull", pull)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = create_app(holder=Ready(Session(tiny("llama").lm)))
    address = launch(page, port=port, prevent_thread_lock=True, quiet=True)[1]
    try:
        began = time.monotonic()
        ask(address, page, "arrive", "anna", "?use=anna/slow:1")
        assert "This link wants to fetch anna/slow" in told(address, "anna") and not asked.is_set()
        ask(address, page, "fetch_linked", "anna")
        assert asked.wait(20)
        ask(address, page, "arrive", "bert", "?use=bert/slow:1")
        assert "bert/slow" in told(address, "bert")
        assert time.monotonic() - began < 20
        answers.set()
        assert "anna/slow" in told(address, "anna")
    finally:
        answers.set()
        page.close(verbose=False)


@pytest.mark.browser
def test_a_closed_tab_frees_its_place_within_five_seconds_and_its_files_are_gone(
    browser: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = slow_steps(monkeypatch, 0.1)
    (tmp_path / "closing.zip").write_bytes(pack(make_vector(name="closing")))
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    page.locator("#model-status").get_by_text("Model: ready").wait_for()
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(tmp_path / "closing.zip")
    page.locator("#mix-note").get_by_text("closing is added").wait_for()
    assert len(files()) == 2  # what was uploaded, and what can be downloaded
    page.locator("#run").click()
    page.wait_for_function("document.querySelector('#steered textarea').value.length > 3")
    page.close()
    left = time.monotonic()
    assert free_within(5.0, steps, left) and len(steps) < 75  # of 80
    until(lambda: not files())
    context.close()


def files() -> list[Path]:
    return list(Path(get_upload_folder()).rglob("closing.zip"))


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
