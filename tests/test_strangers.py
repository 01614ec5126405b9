"""What strangers may cost and see: attacks on the real page, over HTTP. `neurosteer/ui/THREATS.md` names each line of
defence."""

import asyncio
import base64
import inspect
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import psutil
import pytest
from fastapi import HTTPException
from gradio.events import api
from hub_server import FakeHub
from pages import Ready, serving
from starlette.datastructures import Headers
from tiny import Tiny, make_vector

from neurosteer.artifacts import recipes
from neurosteer.artifacts.storage import pack
from neurosteer.errors import ModelError, UsageError
from neurosteer.steering.session import Session
from neurosteer.ui import guard, limits, loading, turns
from neurosteer.ui.api.circuits import CircuitEndpoints
from neurosteer.ui.api.endpoints import Endpoints, recipe_of
from neurosteer.ui.api.evaluate import EvaluateEndpoint
from neurosteer.ui.api.evaluate import _strength as strength_of
from neurosteer.ui.jobs import Jobs
from neurosteer.ui.links import parse_link
from neurosteer.ui.loading import ModelHolder, Models
from neurosteer.ui.mixer import use_of
from neurosteer.ui.page import launch
from neurosteer.ui.tabs.build import BuildHandlers

EVIL, VICTIM = "127.0.0.2", "127.0.0.1"
VECTOR = base64.b64encode(pack(make_vector())).decode()
STRANGERS = {"NEUROSTEER_ALLOWED_HOSTS": "page.example"}


@pytest.fixture
def open_to_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STRANGERS.items():
        monkeypatch.setenv(name, value)


# --- who is a stranger -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "host", "trust", "strangers"),
    [
        ({}, None, None, False),
        ({}, "127.0.0.1", None, False),
        ({}, "localhost", None, False),
        ({}, "[::1]", None, False),
        ({}, "0.0.0.0", None, True),
        ({}, "192.168.1.5", None, True),
        ({}, "0.0.0.0", True, False),
        ({"GRADIO_SERVER_NAME": "0.0.0.0"}, None, None, True),
        ({"GRADIO_SERVER_NAME": "0.0.0.0"}, "127.0.0.1", None, False),
        ({"GRADIO_SERVER_NAME": "0.0.0.0", "NEUROSTEER_TRUST_VISITORS": "1"}, None, None, False),
        ({"NEUROSTEER_TRUST_VISITORS": "1"}, "0.0.0.0", False, True),
        ({"NEUROSTEER_ALLOWED_HOSTS": "localhost"}, None, None, False),
        ({"NEUROSTEER_ALLOWED_HOSTS": "page.lab.example"}, None, None, True),
        ({"SPACE_ID": "us/page"}, None, None, True),
        ({"SPACE_ID": "us/page", "NEUROSTEER_TRUST_VISITORS": "1"}, None, True, True),
    ],
)
def test_strangers_are_all_visitors_of_a_page_that_reaches_beyond_this_machine(
    environment: dict[str, str], host: str | None, trust: bool | None, strangers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_served", limits._Served())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    limits.serve_at(host, trust)
    assert limits.strangers() == strangers
    assert limits.visitors_token(None) is (False if strangers else None)
    assert (limits.places() is not None) == strangers


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:7860", True), ("127.0.0.1:1", True), ("[::1]:7860", True), ("LOCALHOST", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example:7860", False),
        ("192.168.1.5:7860", False), ("", False), ("a b", False),
    ],
)  # fmt: skip
def test_a_page_of_this_machine_answers_to_the_machines_own_names_alone(
    host: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_served", limits._Served())
    headers = Headers({"host": host})
    if known:
        guard.check_host(headers)
    else:
        with pytest.raises(guard.Refused, match="NEUROSTEER_ALLOWED_HOSTS"):
            guard.check_host(headers)


def test_beyond_this_machine_a_page_answers_to_addresses_and_the_names_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "_served", limits._Served("0.0.0.0"))
    monkeypatch.setenv("NEUROSTEER_ALLOWED_HOSTS", "page.lab.example, *.hall.example")
    for name in ("192.168.1.5", "page.lab.example", "a.hall.example", "localhost", socket.gethostname().lower()):
        assert limits.answers_to(name)
    for name in ("evil.example", "hall.example", "page.lab.example.evil.example"):
        assert not limits.answers_to(name)


@pytest.mark.parametrize(
    ("sent", "own"),
    [
        ({}, False),  # a program
        ({"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:7860"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "https://us-page.hf.space"}, True),  # a proxy changed the host
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "http://127.0.0.1:7860"}, True),
        ({"origin": "https://page.example"}, True),  # which NEUROSTEER_ALLOWED_HOSTS names
        ({"sec-fetch-site": "cross-site"}, None),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"}, None),
        ({"origin": "https://evil.example"}, None),
        ({"origin": "http://127.0.0.1:3000"}, None),
        ({"origin": "http://localhost:7860"}, None),
        ({"origin": "null"}, None),
    ],
)
def test_another_web_page_changes_nothing_and_programs_are_not_taken_for_the_page(
    sent: dict[str, str], own: bool | None, open_to_strangers: None
) -> None:
    headers = Headers({"host": "127.0.0.1:7860", **sent})
    if own is not None:
        assert guard.check_origin("POST", headers) is own
        return
    with pytest.raises(guard.Refused, match="another web page"):
        guard.check_origin("POST", headers)
    assert guard.check_origin("GET", headers) is False  # a link that leads here


@pytest.mark.parametrize(
    ("header", "address"),
    [
        ("203.0.114.7", "203.0.114.7"),
        ("8.8.8.8, 203.0.114.7", "203.0.114.7"),  # what stands before is the caller's invention
        ("8.8.8.8, 203.0.114.7, 10.0.3.4", "203.0.114.7"),
        ("nonsense, 10.0.0.1", None),
        ("", None),
    ],
)
def test_behind_the_proxy_of_a_space_a_client_cannot_invent_its_address(header: str, address: str | None) -> None:
    assert guard._forwarded(Headers({"x-forwarded-for": header})) == address


def test_one_network_of_ipv6_is_one_client() -> None:
    assert guard.network_of("2001:db8:1:2:3::4") == guard.network_of("2001:db8:1:2:ffff::") != "2001:db8:1:2:3::4"
    assert guard.network_of("2001:db8:1:3::4") != guard.network_of("2001:db8:1:2::4")
    assert guard.network_of("::ffff:203.0.114.7") == guard.network_of("203.0.114.7") == "203.0.114.7"


def test_a_tool_call_counts_for_the_agent_that_sent_it_not_for_this_machine(open_to_strangers: None) -> None:
    """Gradio makes an agent's tool call a second time at the page's own address, with the agent's headers."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((turns.Caller.of(SimpleNamespace(scope=scope)).address, scope["headers"]))

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        pass

    door = guard.Guard(app, turns.Listeners())

    def ask(path: str, peer: str, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{path}", "query_string": b""}
        sent = [(b"host", b"localhost"), *(one for one in headers if one[0] != b"host")]
        asyncio.run(door({**scope, "client": (peer, 1), "headers": sent}, receive, send))
        return seen[-1][1]

    passed_on = ask("mcp/", "203.0.114.7", [])
    assert ask("queue/join", "127.0.0.1", passed_on) == [(b"host", b"localhost")]  # nobody else sees it
    ask("queue/join", "127.0.0.1", [(b"x-neurosteer-caller", b"made-up 203.0.114.8")])
    ask("mcp/", "203.0.114.9", [(b"x-neurosteer-caller", b"made-up 203.0.114.8")])
    assert [address for address, _ in seen] == ["203.0.114.7", "203.0.114.7", "127.0.0.1", "203.0.114.9"]


def test_every_door_bounds_strengths_alike() -> None:
    assert limits.MAX_STRENGTH == recipes.MAX_STRENGTH == 100.0
    vector = make_vector()
    doors: list[Callable[[float], Any]] = [
        lambda strength: recipe_of([f"{VECTOR}:{strength}"]),
        lambda strength: use_of(vector, strength),
        lambda strength: strength_of(str(strength)),
        lambda strength: parse_link({"use": [f"mood:{strength}"]}),
    ]
    for door in doors:
        for strength in (100.0, -100.0):
            door(strength)
        for strength in (100.1, 1e38, -1e300, float("inf"), float("nan")):
            with pytest.raises(UsageError, match=r"finite number|from -100 to 100|no artifact at a strength"):
                door(strength)


# --- turns in the queue ----------------------------------------------------------------------------------------------


class Bell:
    """A page with one kind of work, of which one is done at a time, and the order in which callers had their turn."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.go = threading.Semaphore(0)

    def work(self, name: str) -> str:
        self.order.append(name)
        self.go.acquire(timeout=20)
        return name

    def page(self) -> gr.Blocks:
        with gr.Blocks() as page:
            api(self.work, api_name="work", concurrency_limit=1)
        return page


@pytest.fixture
def bell() -> Iterator[tuple[Bell, gr.Blocks, str]]:
    found = Bell()
    page = found.page()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        yield found, page, launch(page, port=port, prevent_thread_lock=True, quiet=True)[1]
    finally:
        for _ in range(300):
            found.go.release()
        page.close(verbose=False)


def client_at(address: str) -> httpx.Client:
    """Somebody who asks from that address of this machine."""
    pool = httpx.Limits(max_connections=None)
    return httpx.Client(transport=httpx.HTTPTransport(local_address=address, limits=pool), timeout=60)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_clients_second_job_waits_behind_anothers_first(bell: tuple[Bell, gr.Blocks, str]) -> None:
    found, _, url = bell
    with client_at(EVIL) as evil, client_at(VICTIM) as other:
        for number in range(6):
            evil.post(f"{url}gradio_api/call/work", json={"data": [f"evil {number}"]})
        until(lambda: found.order == ["evil 0"])
        for number in range(2):
            other.post(f"{url}gradio_api/call/work", json={"data": [f"other {number}"]})
        for _ in range(8):
            found.go.release()
        until(lambda: len(found.order) == 8)
    assert found.order == ["evil 0", "other 0", "evil 1", "other 1", *(f"evil {number}" for number in range(2, 6))]


def test_one_client_holds_its_places_and_leaves_the_others(
    bell: tuple[Bell, gr.Blocks, str], open_to_strangers: None
) -> None:
    found, _, url = bell
    with client_at(EVIL) as evil, client_at(VICTIM) as other:
        answers = [evil.post(f"{url}gradio_api/call/work", json={"data": ["evil"]}) for _ in range(20)]
        codes = [answer.status_code for answer in answers]
        assert codes == [200] * limits.Places.programs + [429] * (20 - limits.Places.programs)
        assert answers[-1].json() == {"detail": turns.TOO_MANY}
        assert other.post(f"{url}gradio_api/call/work", json={"data": ["other"]}).status_code == 200
        found.go.release()
        until(lambda: found.order == ["evil", "other"])


def test_many_clients_leave_places_for_pages(
    bell: tuple[Bell, gr.Blocks, str], open_to_strangers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs at all addresses together have a budget of their own."""
    monkeypatch.setattr(limits, "places", lambda: limits.Places(all_programs=5))
    _, _, url = bell
    codes = []
    for number in range(2, 9):
        with client_at(f"127.0.0.{number}") as client:
            codes.append(client.post(f"{url}gradio_api/call/work", json={"data": ["x"]}).status_code)
    assert codes == [200] * 5 + [429] * 2


def test_what_nobody_listens_for_is_dropped(bell: tuple[Bell, gr.Blocks, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found, page, url = bell
    queue: Any = page._queue
    monkeypatch.setattr(turns, "UNHEARD_S", 0.3)
    monkeypatch.setattr(turns, "SWEEP_S", 0.1)
    with client_at(EVIL) as evil, client_at(VICTIM) as other:
        for _ in range(4):
            evil.post(f"{url}gradio_api/call/work", json={"data": ["evil"]})
        call = other.post(f"{url}gradio_api/call/work", json={"data": ["other"]}).json()["event_id"]
        with other.stream("GET", f"{url}gradio_api/call/work/{call}") as heard:
            until(lambda: len(queue) <= 1)
            found.go.release()
            found.go.release()
            assert "other" in "".join(heard.iter_text())
        until(lambda: not queue.pending_messages_per_session and not queue.event_ids_to_events)
    assert found.order == ["evil", "other"]


def test_a_session_belongs_to_the_login_that_began_it(bell: tuple[Bell, gr.Blocks, str]) -> None:
    _, page, _ = bell
    queue: Any = page._queue

    def asking(user: str | None) -> Any:
        session = {"oauth_info": {"userinfo": {"sub": user}}} if user else {}
        return SimpleNamespace(scope={"session": session})

    for _ in range(2):
        queue._check_login("prepared by mallory", asking(None))
        queue._check_login("bob's own", asking("bob"))
    for session, user in (("prepared by mallory", "bob"), ("bob's own", "mallory"), ("bob's own", None)):
        with pytest.raises(HTTPException, match="another login"):
            queue._check_login(session, asking(user))


def test_uploads_of_strangers_are_bounded_by_bytes_and_by_number(
    bell: tuple[Bell, gr.Blocks, str], open_to_strangers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, url = bell

    def upload(client: httpx.Client, size: int, number: int = 1) -> int:
        files = [("files", (f"{n}.txt", b"x" * size)) for n in range(number)]
        return client.post(f"{url}gradio_api/upload", files=files).status_code

    monkeypatch.setattr(limits, "places", lambda: limits.Places(upload_bytes=10_000, uploads=5))
    with client_at(EVIL) as evil, client_at(VICTIM) as other:
        assert [upload(evil, 4_000) for _ in range(4)] == [200, 200, 413, 413]  # with what a form has around them
        assert upload(other, 10, 5) == 200 and upload(other, 10) == 429
    with client_at("127.0.0.3") as third:
        assert upload(third, 10) == 200


# --- the page as it is -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator["Page"]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    helper = Path(__file__).with_name("strangers_page.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, str(helper), str(port)], env=environment)
    try:
        running = Page(process, f"http://127.0.0.1:{port}/")
        until(lambda: process.poll() is None and running.answers(), 240)
        running.attack(call("list"), call("inspect", "sentiment"))  # what a page does once, and late
        yield running
    finally:
        process.kill()
        process.wait()


class Page:
    """A page in another process, what it costs, and how long another visitor waits for it meanwhile."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process, self.url = process, url
        self._memory = psutil.Process(process.pid).memory_info

    def answers(self) -> bool:
        try:
            return httpx.get(self.url, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def attack(self, *requests: tuple[str, bytes], seconds: float = 20.0) -> "Cost":
        """Send each (path, JSON) and listen to what comes of it, for so long at most, while somebody else opens the
        page again and again."""
        cost, done = Cost(), threading.Event()
        before = self._memory().rss

        def look() -> None:
            with client_at(VICTIM) as visitor:
                while not (done.is_set() and cost.waits):
                    begun = time.monotonic()
                    cost.codes.add(visitor.get(self.url).status_code)
                    cost.waits.append(time.monotonic() - begun)
                    cost.added_mb = max(cost.added_mb, (self._memory().rss - before) / 1e6)
                    done.wait(0.05)

        visitor = threading.Thread(target=look)
        visitor.start()
        try:
            with client_at(EVIL) as evil:
                for path, body in requests:
                    cost.said.append(self._ask(evil, path, body, seconds))
        finally:
            done.set()
            visitor.join()
        return cost

    def _ask(self, evil: httpx.Client, path: str, body: bytes, seconds: float) -> str:
        sent = {"content": body, "headers": {"content-type": "application/json"}}
        answer = evil.post(f"{self.url}gradio_api/{path}", **sent)  # type: ignore[arg-type]
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:300]}"
        session = json.loads(body).get("session_hash")
        where = f"queue/data?session_hash={session}" if session else f"{path}/{answer.json()['event_id']}"
        end, said = time.monotonic() + seconds, ""
        try:
            with evil.stream("GET", f"{self.url}gradio_api/{where}", timeout=seconds) as heard:
                for line in heard.iter_lines():
                    if time.monotonic() > end:
                        return "still working"
                    said += line[:300]
        except httpx.TimeoutException:
            return "still working"
        return said


class Cost:
    """What an attack cost: how long the other visitor waited, and by how much the process grew at most."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.codes: set[int] = set()
        self.added_mb = 0.0
        self.said: list[str] = []

    def check(self) -> None:
        assert self.codes == {200}
        assert max(self.waits) < 2.0, f"another visitor waited {max(self.waits):.1f} s: {self.said}"
        assert self.added_mb <= 100, f"{self.added_mb:.0f} MB more: {self.said}"


def laid_out(url: str) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """A page's events, and its components by their numbers."""
    config = httpx.get(f"{url}config", timeout=30).json()
    return config["dependencies"], {component["id"]: component for component in config["components"]}


def clicked(url: str, button: str) -> dict[str, Any]:
    """What a page sends when a button is clicked and nothing was changed before."""
    dependencies, components = laid_out(url)
    number = next(number for number, one in components.items() if one["props"].get("elem_id") == button)
    event = next(one for one in dependencies if [number, "click"] in one["targets"] and one["backend_fn"])
    return {"data": [components[one]["props"].get("value") for one in event["inputs"]], "fn_index": event["id"]}


def call(name: str, *values: Any) -> tuple[str, bytes]:
    """A call of an endpoint; what is left out is as usual."""
    function = getattr({"evaluate": EvaluateEndpoint, "attribute": CircuitEndpoints, "edges": CircuitEndpoints}.get(
        name, Endpoints), {"list": "offered"}.get(name, name))  # fmt: skip
    usual = [one.default for one in inspect.signature(function).parameters.values()][1:]
    body = json.dumps({"data": [*values, *usual[len(values) :]]}, ensure_ascii=False).encode()
    assert len(body) <= 1.1e6
    return f"call/{name}", body


def bomb(data: bytes = b"[" * 3_900_000) -> str:
    """A small zip file whose config.json is large and deep."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", data)
    return base64.b64encode(file.getvalue()).decode()


MARKS = "a" + "\u0315\u0300" * 120_000  # combining marks in the order that takes a square of their number to sort
MANY_MARKS = ["b" + "\u0315\u0300" * 9_000 for _ in range(25)]
TEXTS = [f"a happy cat sings {n}" for n in range(24)], [f"a sad cat sings {n}" for n in range(24)]
WIDE = b'{"parameters": [' + b",".join([b"[]"] * 1_200_000) + b"]}"
ATTACKS: dict[str, Callable[[], tuple[str, bytes]]] = {
    "steer: long prompt": lambda: call("steer", MARKS, [VECTOR]),
    "steer: strength": lambda: call("steer", "the cat", [f"{VECTOR}:1e38"], False, "", 500),
    "steer: largest strength": lambda: call("steer", "the cat", [f"{VECTOR}:100"], False, "", 40),
    "steer: reference": lambda: call("steer", "the cat", ["a/" * 400_000]),
    "steer: four bombs": lambda: call("steer", "the cat", [bomb()] * 4),
    "steer: raw prompt": lambda: call("steer", "\ufdfa" * 8_000, [VECTOR], False, "", 8, 0, True, 0.8, 0.95, True),
    "build: marks": lambda: call("build", [MARKS, "b"], ["c", "d"]),
    "build: many marks": lambda: call("build", MANY_MARKS, TEXTS[1]),
    "build: layers": lambda: call("build", *TEXTS, "caa", "0-9999," * 140_000),
    "build: layer": lambda: call("build", *TEXTS, "caa", "9" * 900_000),
    "build: name": lambda: call("build", *TEXTS, "caa", "1", "../" * 300_000),
    "build: sae": lambda: call("build", *TEXTS, "sae", "1", "", "", "", "", "", "", 0, "../" * 300_000),
    "build: 40,000 texts": lambda: call("build", [f"p{n}" for n in range(20_000)], [f"n{n}" for n in range(20_000)]),
    "list: model": lambda: call("list", "x" * 1_000_000),
    "inspect: deep": lambda: call("inspect", bomb()),
    "inspect: wide": lambda: call("inspect", bomb(WIDE)),
    "pull: reference": lambda: call("pull", "a/b@" + "c" * 1_000_000),
    "attribute: target": lambda: call("attribute", "the cat", "x" * 900_000),
    "attribute: seed": lambda: call("attribute", "a", " b", "", 9, "difference", "full", False, False, "x" * 900_000),
    "edges: marks": lambda: call("edges", "the cat", MARKS),
    "evaluate: pattern": lambda: call("evaluate", [VECTOR], "regex:(a+)+$"),
    "evaluate: words": lambda: call("evaluate", [VECTOR], "words:" + "a," * 400_000, [], [], [], ["1"], 1, 4),
    "evaluate: strengths": lambda: call("evaluate", [VECTOR], "words:a", [], [], ["the"], ["1e38"], 1, 4),
    "evaluate: marks": lambda: call("evaluate", [VECTOR], "", MANY_MARKS, TEXTS[1], ["the"], ["1"], 1, 4),
    "evaluate: prompt": lambda: call("evaluate", [VECTOR], "words:a", [], [], [MARKS], ["1"], 1, 4),
    "deep JSON": lambda: ("call/list", b'{"data": ' + b"[" * 1_000_000),
    "deep JSON that ends": lambda: ("call/list", b'{"data": ' + b"[" * 490_000 + b"]" * 490_000 + b"}"),
    "wide JSON": lambda: ("call/list", b'{"data": [' + b",".join([b"[]"] * 300_000) + b"]}"),
    "long number": lambda: ("call/list", b'{"data": [' + b"9" * 1_000_000 + b"]}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_request_of_a_program_stops_the_page_for_others(page: Page, attack: str) -> None:
    cost = page.attack(ATTACKS[attack]())
    cost.check()
    assert page.process.poll() is None


HOSTILE_VALUES: dict[str, Any] = {
    "textbox": "0-9999," * 4_000,
    "dropdown": "../../../etc/passwd",
    "radio": "../../../etc/passwd",
    "checkboxgroup": ["../../../etc/passwd"] * 1_000,
    "slider": 1e38,
    "number": 1e308,
    "checkbox": "x" * 1_000,
    "file": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "uploadbutton": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "chatbot": [{"role": "user", "content": "x" * 10_000}] * 10,
    "html": "<" * 10_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("usual", [False, True], ids=["all hostile", "texts hostile"])
def test_no_private_handler_stops_the_page_for_others(page: Page, usual: bool) -> None:
    """Each by its number, as no page would call it; with the choices of the page or with made-up ones."""
    dependencies, components = laid_out(page.url)
    asked = []
    for one in dependencies:
        if not one["backend_fn"] or one["api_visibility"] == "public":
            continue
        values = []
        for number in one["inputs"]:
            kind, usually = components[number]["type"], components[number]["props"].get("value")
            hostile = HOSTILE_VALUES.get(kind)
            values.append(usually if usual and kind not in ("textbox", "chatbot") else hostile)
        body = {"data": values, "fn_index": one["id"], "session_hash": f"evil{one['id']}{usual}"}
        asked.append(("queue/join" if one["queue"] is not False else "run/predict", json.dumps(body).encode()))
    assert len(asked) > 30 and all(len(body) < 1e6 for _, body in asked)
    queued = [one for one in asked if one[0] == "queue/join"]
    cost = page.attack(*queued, seconds=15)
    cost.check()
    assert not any("root:" in said for said in cost.said)
    sent = {"headers": {"content-type": "application/json"}, "timeout": 20}
    unqueued = [body for path, body in asked if path == "run/predict"]
    direct = [httpx.post(f"{page.url}gradio_api/run/predict", content=body, **sent) for body in unqueued]  # type: ignore[arg-type]
    assert direct and not any("root:" in answer.text for answer in direct)
    assert page.process.poll() is None and page.answers()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["steer", "build", "run"])
def test_two_hundred_requests_in_a_second_leave_a_place_for_anothers_run(page: Page, kind: str) -> None:
    run = clicked(page.url, "run")

    def join(session: str) -> tuple[str, bytes]:
        return "queue/join", json.dumps({**run, "session_hash": session}).encode()

    def flood(number: int) -> int:
        path, body = {
            "steer": lambda: call("steer", "the cat", [VECTOR], False, "", 500),
            "build": lambda: call("build", *TEXTS),
            "run": lambda: join(f"flood{number}"),
        }[kind]()
        sent = {"content": body, "headers": {"content-type": "application/json"}}
        return evil.post(f"{page.url}gradio_api/{path}", **sent).status_code  # type: ignore[arg-type]

    with client_at(EVIL) as evil, client_at(VICTIM) as other:
        with ThreadPoolExecutor(32) as pool:
            codes = list(pool.map(flood, range(200)))
        assert set(codes) <= {200, 429} and codes.count(429) > 100
        for path, body in (join("victim"), call("steer", "the cat", [VECTOR], False, "", 8)):
            begun = time.monotonic()
            said = page._ask(other, path, body, 10)
            assert "complete" in said and time.monotonic() - begun < 10, said
    time.sleep(0.5)


def test_a_foreign_name_and_another_web_page_are_refused_over_http(page: Page) -> None:
    refused = httpx.get(page.url, headers={"host": "evil.example"})
    assert refused.status_code == 403 and "'evil.example'" in refused.json()["detail"]
    for path in ("call/list", "queue/join", "upload", "run/predict", "mcp", "component_server", "cancel"):
        for sent in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            answer = httpx.post(f"{page.url}gradio_api/{path}", headers=sent, json={"data": [""]})
            assert answer.status_code == 403 and "another web page" in answer.json()["detail"]
    assert httpx.post(f"{page.url}gradio_api/call/list", json={"data": [""]}).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_request_that_is_too_large_is_not_read(page: Page, announced: bool) -> None:
    size = limits.MAX_BODY_BYTES + 1
    chunks = (b"x" * 65_536 for _ in range(size // 65_536 + 1))
    answer = httpx.post(f"{page.url}gradio_api/call/list", content=b"x" * size if announced else chunks)
    assert answer.status_code == 413 and "larger than 8 MB" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (b'{"data": [' + b",".join([b'"a, [text] with \\" and \\\\"'] * 40_000) + b"]}", True),
        (b'{"data": ["' + b"[{," * 500_000 + b'"]}', True),
        (b'{"data": [' + b"[]," * 60_000 + b"0]}", False),
        (b"0," * 200_000, False),
        (b"[" * 200_000, False),
        (b'{"a' + b'\\":{},' * 60_000, True),  # one text, to its end
        (b'"a\\\\":{},' * 60_000, False),
        (b'"' * 1_000_000, False),
        (('{"data": [' + "[]," * 60_000).encode("utf-16"), False),
    ],
    ids=["texts", "brackets in a text", "lists", "numbers", "deep", "escaped", "not escaped", "quotes", "utf-16"],
)  # fmt: skip
def test_json_of_too_many_values_is_not_parsed(body: bytes, read: bool) -> None:
    if read:
        guard.check_json(body)
    else:
        with pytest.raises(guard.Refused, match="100,000 values"):
            guard.check_json(body)


def test_what_lacks_values_is_one_line_and_not_written_to_the_log(page: Page) -> None:
    answer = httpx.post(f"{page.url}gradio_api/call/steer", json={"data": ["x" * 1_000, ["y"]]})
    assert answer.status_code == 400 and answer.json()["detail"].startswith("2 values were sent for 10 values")


def test_an_unqueued_door_past_the_queue_is_shut(page: Page) -> None:
    """`run/` would call any handler at once, beside all limits of the queue."""
    answer = httpx.post(f"{page.url}gradio_api/run/build", json={"data": list(TEXTS)})
    assert answer.status_code == 404


def test_a_push_that_another_web_page_sends_is_refused(llama: Tiny, hub: FakeHub) -> None:
    with serving(Ready(Session(llama.lm))) as url:
        body = {**clicked(url, "push"), "session_hash": "s"}

        def ask(**sent: str) -> str:
            headers = {name.replace("_", "-"): value for name, value in sent.items()}
            answer = httpx.post(f"{url}gradio_api/queue/join", json=body, headers=headers)
            if answer.status_code != 200:
                return answer.text
            with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash=s", timeout=30) as heard:
                return "".join(heard.iter_text())

        assert "another web page" in ask(origin="https://evil.example")
        assert "another web page" in ask(sec_fetch_site="cross-site")
        assert "own page; nothing was published" in ask()  # a program, by the handler's number
        assert "Choose what to publish first" in ask(origin=url.rstrip("/"))
    assert not hub.repos


# --- models ----------------------------------------------------------------------------------------------------------


class Loader:
    """Loads nothing, slowly, and knows how many were being loaded at once."""

    def __init__(self, llama: Tiny, seconds: float = 0.1) -> None:
        self.lm, self.seconds = llama.lm, seconds
        self.loaded: list[str | None] = []
        self.now = self.most = 0

    def __call__(self, name: str | None, progress: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        self.now -= 1
        self.loaded.append(name)
        return self.lm


def test_models_are_loaded_one_at_a_time_and_never_more_than_are_held(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory_gb", lambda: 1000.0)
    load = Loader(llama)
    models = Models(load=load)
    refused = []

    def visit(name: str) -> None:
        try:
            models.holder(name).wait()
        except ModelError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(8) as visitors:
        list(visitors.map(visit, models.names[1:9]))
    assert load.most == 1 and len(load.loaded) == 1 and len(refused) == 7
    assert all("which others use; try again in a minute" in line for line in refused)


def test_memory_is_reserved_while_a_model_loads_and_free_again_when_that_fails(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory_gb", lambda: 9.0)
    fail = threading.Event()

    def load(name: str | None, progress: Any) -> Any:
        fail.wait(20)
        raise ModelError("The weights are broken.")

    models = Models(load=load, most=4)
    first = models.holder("Llama-3.2-3B-Instruct")  # 6.5 GB
    first.start()
    with pytest.raises(ModelError, match=r"Gemma-2-2B needs about 6\.5 GB of memory and 2\.5 GB are free"):
        models.holder("Gemma-2-2B")
    fail.set()
    with pytest.raises(ModelError, match="broken"):
        first.wait()
    models.holder("Gemma-2-2B")


def test_what_is_only_looked_at_loads_nothing_and_forgets_nothing(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory_gb", lambda: 1000.0)
    load = Loader(llama, 0.0)
    models = Models(load=load)
    for name in (None, "GPT-2-small"):
        models.holder(name).wait()
    endpoints = Endpoints(BuildHandlers(models, Jobs()))
    for name in models.names:
        endpoints.offered(name)
        models.status(name)
    assert list(models._holders) == [models.default, "GPT-2-small"] and len(load.loaded) == 2
    assert models.status("GPT-2-small").ready and models.status("Gemma-2-2B").text == "not loaded yet"
    with pytest.raises(ModelError, match="not on offer"):
        models.status("evil/model")


def test_a_model_that_somebody_uses_keeps_its_place(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory_gb", lambda: 1000.0)
    models, begun, go = Models(load=Loader(llama, 0.0)), threading.Event(), threading.Event()

    def work(lm: Any) -> None:
        begun.set()
        go.wait(20)

    session = models.holder("GPT-2-small").wait()
    visitor = threading.Thread(target=session.run, args=(work,))
    visitor.start()
    begun.wait(20)
    with pytest.raises(ModelError, match="No more models fit beside GPT-2-small"):
        models.holder("Gemma-3-270M")
    go.set()
    visitor.join()
    models.holder("Gemma-3-270M").wait()
    assert "GPT-2-small" not in models._holders


def test_on_a_space_only_what_could_fit_is_offered(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "total_memory_gb", lambda: 3.0)
    assert "Llama-3.1-8B-Instruct" in Models().names
    monkeypatch.setenv("SPACE_ID", "us/page")
    names = Models().names
    assert names[0] == Models().default and "Gemma-3-270M" in names and "Llama-3.1-8B-Instruct" not in names


def test_on_zero_gpu_a_stated_bound_decides_because_its_free_memory_is_made_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert loading.free_memory_gb() == loading.total_memory_gb() == loading.ZERO_GPU_GB
    monkeypatch.setattr(loading, "ZERO_GPU_GB", 10.0)
    with pytest.raises(ModelError, match=r"needs about 17\.5 GB of memory and 10\.0 GB are free"):
        Models().holder("Llama-3.1-8B-Instruct")


def test_a_containers_limit_counts_not_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_CGROUP", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert loading.free_memory_gb() == pytest.approx(psutil.virtual_memory().available / 1e9, rel=0.2)
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("1900000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000000\n")
    assert loading.free_memory_gb() == pytest.approx(0.5) and loading.total_memory_gb() == pytest.approx(2.0)
    (tmp_path / "memory.max").write_text("max\n")
    assert loading.free_memory_gb() > 0.6 or psutil.virtual_memory().available < 1e9


def test_a_holder_alone_needs_no_gate(llama: Tiny) -> None:
    holder = ModelHolder("tiny", lambda name, progress: llama.lm)
    assert not holder.in_use and holder.wait().lm is llama.lm and not holder.loading
