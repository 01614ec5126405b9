"""What the page costs a visitor: what is sent, how long until it can be used, and from a click to the first token.

    python tests/benchmarks/page_speed.py [--rounds 10]

Starts `python app.py` on a free port and opens it in Chromium with an empty cache. The time from a click on a
ready-made recipe to the first characters of the steered text on screen stands beside what the same prompt takes in this
process, unsteered and in turns: its first token (one pass over the prompt), and its second (a pass and a step).
With OMP_NUM_THREADS=1 everything computes in one thread, which is fairer on a machine that others use too.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from neurosteer.models.loading import load_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Session

ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
PROMPT = "Tell me about your day."
FIRST_TOKEN = """() => new Promise((done) => {
  const text = document.querySelector("#steered textarea");
  const button = [...document.querySelectorAll("#presets button")][0];
  const before = text.value;
  const clicked = performance.now();
  const look = () => {
    if (text.value && text.value !== before) {
      done(performance.now() - clicked);
      document.querySelector("#stop").click();
    } else requestAnimationFrame(look);
  };
  button.click();
  look();
})"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_it_listens(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def first_load(browser: Any, address: str) -> None:
    page = browser.new_context().new_page()
    sizes: list[int] = []
    page.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
    started = time.perf_counter()
    page.goto(address)
    page.get_by_role("button", name="Delighted").wait_for()
    usable = time.perf_counter() - started
    page.wait_for_timeout(3000)  # whatever else it fetches; the network is never idle, since the page listens
    print(f"first load: {len(sizes)} requests, {sum(sizes) / 1e6:.2f} MB; buttons on screen after {usable:.2f} s")
    page.context.close()


def click_to_token(page: Any) -> float:
    seconds = page.evaluate(FIRST_TOKEN) / 1000
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    page.wait_for_timeout(300)
    return seconds


def unsteered(session: Session) -> tuple[float, float]:
    """Seconds to the first and to the second token."""
    started = time.perf_counter()
    stream = session.stream(PROMPT, max_new_tokens=2, sampling=Sampling(seed=0))
    next(stream)
    first = time.perf_counter() - started
    next(stream)
    return first, time.perf_counter() - started


def told(name: str, values: Sequence[float], unit: str = " ms") -> str:
    scale = 1000 if unit == " ms" else 1
    low, middle = min(values) * scale, statistics.median(values) * scale
    return f"{name}: {middle:.3g}{unit} (least {low:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    port = free_port()
    server = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ROOT)
    try:
        session = Session(load_model())
        until_it_listens(port)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}")
            page.locator("#model-status").get_by_text("Model: ready").wait_for(timeout=120_000)
            first_load(browser, f"http://127.0.0.1:{port}")
            click_to_token(page)
            unsteered(session)
            rounds_taken = [(click_to_token(page), *unsteered(session)) for _ in range(rounds)]
            browser.close()
    finally:
        server.terminate()
        server.wait(30)
    clicks, firsts, seconds = zip(*rounds_taken, strict=True)
    print(told("click to first steered token", clicks))
    for name, bare in (("first unsteered token", firsts), ("second", seconds)):
        ratios = [click / one for click, one in zip(clicks, bare, strict=True)]
        print(f"{told(name, bare)}; the click against it: {told('ratio', ratios, '')}")
    print(f"medians and least of {rounds} rounds")


if __name__ == "__main__":
    main()
