"""The page in a real browser, with the embedded model: what a visitor does, from a file of texts to steered text."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hub_server import FakeHub

from neurosteer.artifacts.features import Feature, FeatureContext
from neurosteer.artifacts.storage import load, pack, unpack
from neurosteer.artifacts.strength import Calibration
from neurosteer.errors import NeuroSteerError
from neurosteer.models.catalog import default_model
from neurosteer.models.sources import locate

pytestmark = [pytest.mark.browser, pytest.mark.embedded]

ROOT = Path(__file__).parent.parent
PATIENCE_MS = 120_000
TABS = ("Steer", "Build", "Circuits", "Evaluate", "Library", "About")
ABORTED = ("AbortError", "Connection errored out")
HOSTILE = "<img src=x onerror=document.title='taken'> ${1+1} {{1+1}}"

THINGS = ["film", "meal", "room", "book", "concert", "walk", "teacher", "garden", "train", "market"]
GLAD = ("I loved the {}, it was wonderful and warm.", "What a delightful {}, I smiled all evening.")
SORRY = ("I hated the {}, it was dreadful and cold.", "What a miserable {}, I frowned all evening.")


@pytest.fixture(scope="module")
def address(hub_server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page that runs in a process of its own, as `python app.py` starts it; or the one at NEUROSTEER_PAGE."""
    if running := os.environ.get("NEUROSTEER_PAGE"):
        yield running.rstrip("/")
        return
    try:
        locate(default_model())
    except NeuroSteerError as error:
        pytest.skip(f"the embedded model cannot be had: {error}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_alice",
                   "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub")), "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ROOT, env=environment)
    try:
        _until_it_listens(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _until_it_listens(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "app.py ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("app.py does not listen after a minute")


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh visitor on the page, the model ready. Afterwards: no console error, no other host, no traceback."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    errors: list[str] = []
    outside: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("framenavigated", lambda frame: _forget_aborted(errors) if frame is page.main_frame else None)
    page.on("request", lambda request: outside.append(request.url) if _is_outside(request.url, address) else None)
    page.goto(address)
    page.locator("#model-status").get_by_text("Model: ready: SmolLM2-135M-Instruct on").wait_for()
    yield page
    assert "Traceback" not in page.locator("body").inner_text()
    assert page.title() == "NeuroSteer"
    found = list(errors)
    context.close()  # which aborts whatever is under way
    assert not found
    assert not outside


def _forget_aborted(errors: list[str]) -> None:
    """Drop what the browser says of requests that it aborted because the page was left."""
    errors[:] = [error for error in errors if not any(said in error for said in ABORTED)]


def go(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()


def _is_outside(url: str, address: str) -> bool:
    return not url.startswith((f"{address}/", "data:", "blob:"))


def text_of(page: Any, pane: str) -> str:
    return page.locator(f"#{pane} textarea").input_value()


def watch_both(page: Any, enough: int) -> list[tuple[int, int]]:
    """The lengths of both texts as they grow, until the run is over or both have `enough` characters."""
    seen = [(0, 0)]
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < deadline:
        now = (len(text_of(page, "unsteered")), len(text_of(page, "steered")))
        if now != seen[-1]:
            seen.append(now)
        if min(now) >= enough or page.locator("#steer-note").get_by_text("tokens/s").count():
            return seen
        page.wait_for_timeout(30)
    raise TimeoutError("the texts did not come to an end")


def test_from_a_file_of_texts_to_steered_text_and_back(page: Any, tmp_path: Path) -> None:
    table = tmp_path / "my reviews.csv"
    rows = [f'"{form.format(thing)}",{label}' for forms, label in ((GLAD, "pos"), (SORRY, "neg"))
            for form in forms for thing in THINGS]  # fmt: skip
    table.write_text("\n".join(["text,label", *rows, rows[0]]), encoding="utf-8")

    go(page, "Build")
    page.get_by_label("Upload one file").check()
    page.locator("#file input[type=file]").set_input_files(table)
    page.locator("#preview").get_by_text("20 texts show it, 20 don’t").wait_for()
    assert "my reviews.csv" in page.locator("#preview").inner_text()

    page.get_by_label("Name", exact=True).fill("reviews")
    page.locator("#build").click()
    page.locator("#try-it").wait_for()
    result = page.locator("#built").inner_text()
    assert "reviews is ready: a steering vector at layer" in result and "1 repeated" in result
    page.locator("#plot .js-plotly-plot").wait_for()

    with page.expect_download() as download:
        page.locator("#download-built").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    artifact = unpack(saved)
    assert (saved.name, artifact.name, artifact.provenance.n_positive) == ("reviews.zip", "reviews", 20)

    page.locator("#try-it").click()
    page.locator("#prompt textarea").fill("What was the restaurant like?")
    page.locator("#run").click()
    grown = watch_both(page, enough=10_000)
    assert len({plain for plain, _ in grown}) > 3 and len({steered for _, steered in grown}) > 3
    whole = text_of(page, "unsteered")
    assert whole != text_of(page, "steered")

    page.locator("#run:not([disabled])").click()
    page.locator("#steer-note").get_by_text("Writing").wait_for()
    page.wait_for_function("document.querySelector('#steered textarea').value.length > 15")
    page.locator("#stop").click()
    page.locator("#steer-note").get_by_text("Stopped; what was written is kept.").wait_for()
    part = text_of(page, "unsteered")
    assert 0 < len(part) < len(whole) and whole.startswith(part)  # the same seed

    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(saved)
    page.locator("#mix-note").get_by_text("reviews (2) is added").wait_for()
    page.get_by_label("reviews (2)").first.wait_for()


def test_a_broken_file_is_one_line_and_the_rest_is_kept(page: Any, tmp_path: Path) -> None:
    table = tmp_path / "broken.csv"
    table.write_text("text,label\nhappy,positive\nsad,maybe\n", encoding="utf-8")
    go(page, "Build")
    page.get_by_label("Name", exact=True).fill("kept")
    page.get_by_label("Upload one file").check()
    page.locator("#file input[type=file]").set_input_files(table)
    page.locator("#preview .ns-error").wait_for()
    page.locator("#build").click()
    error = page.locator("#build-error .ns-error")
    error.wait_for()
    assert "broken.csv" in error.inner_text() and "maybe" in error.inner_text()
    assert page.get_by_label("Name", exact=True).input_value() == "kept"


@pytest.fixture
def film(page: Any) -> Iterator[Callable[[int], None]]:
    """Takes a picture, to be shown for so many ms; NEUROSTEER_FILM=FILE.gif makes a film of them (the README's)."""
    target = os.environ.get("NEUROSTEER_FILM")
    frames: list[tuple[bytes, int]] = []
    if target:
        page.set_viewport_size({"width": 1180, "height": 1480})
    yield lambda ms: frames.append((page.screenshot(), ms)) if target else None
    if target and frames:
        from PIL import Image

        pictures = [Image.open(BytesIO(frame)).convert("RGB").resize((826, 1036)) for frame, _ in frames]
        first, *others = (picture.quantize(160, dither=Image.Dither.NONE) for picture in pictures)
        first.save(target, save_all=True, append_images=others, duration=[ms for _, ms in frames], loop=0)


def test_the_first_visit_takes_one_click_to_a_steered_text(page: Any, film: Callable[[int], None]) -> None:
    film(1500)
    page.get_by_role("button", name="Delighted").click()
    page.wait_for_function("document.querySelector('#steered textarea').value.length > 15")
    while not page.locator("#steer-note").get_by_text("tokens/s").count():
        film(240)
        page.wait_for_timeout(200)
    film(1500)
    for kind, words in (("by what is steered with", "Blue words lie"), ("by how much steering changes them", "KL")):
        page.get_by_label(kind).check()
        page.locator("#coloured").get_by_text(words).wait_for()
        assert page.locator("#coloured .ns-token").count() > 20
        film(3500)


def test_what_visitors_and_models_write_is_shown_as_it_is(page: Any) -> None:
    go(page, "Build")
    page.get_by_label("Paste texts").check()
    page.get_by_label("Texts that show it").last.fill(f"{HOSTILE}\nglad\nhappy")
    page.get_by_label("Texts that don’t").last.fill("sad\nlow\ndown")
    page.locator("#preview").get_by_text("3 texts show it").wait_for()
    assert HOSTILE in page.locator("#preview").inner_text()

    page.locator("#build").click()
    page.locator("#try-it").click()
    page.get_by_role("radio", name="Chat", exact=True).check()
    page.locator("#prompt textarea").fill(HOSTILE)
    page.locator("#run").click()
    page.locator("#steer-note").get_by_text("Writing").wait_for()
    page.locator("#stop").click()
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    for side in ("unsteered", "steered"):
        assert HOSTILE in page.locator(f"#{side}-chat").inner_text()
    assert page.locator("img[src=x]").count() == 0


def test_readable_features_are_listed_and_steer(page: Any) -> None:
    go(page, "Build")
    page.get_by_label("sae:").check()
    page.get_by_role("button", name="Advanced").click()
    page.locator("#calibrate input").uncheck()  # which other tests do, and takes a while
    page.locator("#build").click()
    features = page.locator("#features")
    features.get_by_role("table").wait_for()
    assert "sentiment-sae is ready: a steering vector at layer" in page.locator("#built").inner_text()
    assert features.get_by_role("rowheader").count() == 12
    assert "of its 64 features that weigh most" in features.inner_text()
    places = features.locator("details").first
    assert not places.locator("mark").first.is_visible()
    places.locator("summary").click()
    places.locator("mark").first.wait_for()

    page.locator("#try-it").click()
    page.locator("#about summary").first.click()
    assert page.locator("#about").get_by_role("rowheader").count() == 12
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#about").get_by_role("rowheader").count() == 12  # a list to the eye, a table still
    page.locator("#run").click()
    watch_both(page, enough=10_000)
    assert text_of(page, "unsteered") != text_of(page, "steered")


def test_an_uploaded_slider_tells_what_it_is_made_of_and_what_it_shares_with_another(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="Delighted").click()
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").first.click()
    own: Any = unpack(Path(download.value.path()))
    place = FeatureContext(HOSTILE, HOSTILE, "W" * 300, 1.0)
    feature = Feature(
        own.layers[0], 7, 1.0, 1.0, (0.2, 0.1), (1.0, 1.0), promoted=(HOSTILE, "W" * 300), contexts=(place,)
    )
    turned = {layer: direction + direction.roll(1) for layer, direction in own.directions.items()}
    other = replace(own, name="other", description=HOSTILE, directions=turned, features=(feature,))
    (tmp_path / "other.zip").write_bytes(pack(other))
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(tmp_path / "other.zip")
    page.locator("#overlap").get_by_text("sentiment and other: overlap 0.").wait_for()

    page.get_by_text("About other").click()
    page.locator("#about").get_by_text("Where it fires most").click()
    shown = page.locator("#about").inner_text()
    assert shown.count(HOSTILE) == 4 and page.locator("img[src=x]").count() == 0
    assert page.locator("#about mark").inner_text() == HOSTILE
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    page.get_by_label("Remove the overlap").check()
    page.locator("#run").click()
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    assert text_of(page, "unsteered") != text_of(page, "steered")


def test_the_page_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for tab in TABS:
        go(page, tab)
        if tab == "Library":
            page.get_by_label("sentiment (released)").check()
            page.locator("#card pre").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_recipes_are_compared_and_the_words_coloured(page: Any) -> None:
    page.get_by_role("button", name="Formal", exact=True).click()
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    page.locator("#keep").click()
    page.get_by_label("kept: formality +1").wait_for()
    page.get_by_role("button", name="Casual").click()
    page.locator("#unsteered").get_by_text("Kept: formality +1").wait_for()
    page.locator("#steered").get_by_text("Steered: formality −1").wait_for()
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    left, right = text_of(page, "unsteered"), text_of(page, "steered")
    assert left and right and left != right
    for kind in ("by what is steered with", "by how much steering changes them"):
        page.get_by_label(kind).check()
        page.locator("#coloured .ns-token").first.wait_for()
        shown = page.locator("#coloured .ns-coloured").all_inner_texts()
        assert [" ".join(text.split()) for text in shown] == [" ".join(text.split()) for text in (left, right)]


def test_a_circuits_multiplier_is_moved(page: Any, tmp_path: Path) -> None:
    """A circuit that scales its neurons: 1 is the unsteered model, 0 switches them off."""
    own: Any = load(ROOT / "vectors" / "sentiment-circuit")
    (tmp_path / "c.zip").write_bytes(pack(replace(own, name="scaled", operation="scale", calibration=Calibration(2.0))))
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(tmp_path / "c.zip")
    number = page.get_by_label("number input for scaled: multiplier")
    number.wait_for()
    page.get_by_text("Settings").first.click()
    page.get_by_label("Greedy").check()
    texts = {}
    for multiplier in ("1", "0"):
        number.fill(multiplier)
        number.blur()
        page.locator("#run:not([disabled])").click()
        page.locator("#steer-note").get_by_text("Writing").wait_for()
        page.locator("#steer-note").get_by_text("tokens/s").wait_for()
        texts[multiplier] = (text_of(page, "unsteered"), text_of(page, "steered"))
    assert texts["1"][0] == texts["1"][1] == texts["0"][0] != texts["0"][1]


def test_a_shared_link_opens_the_same_recipe(page: Any, address: str) -> None:
    page.get_by_role("button", name="Grateful").click()
    page.locator("#prompt textarea").fill("Write to <b>me</b> & Bob.")
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    page.locator("#share").click()
    page.wait_for_function("(document.querySelector('#link textarea, #link input') || {}).value?.startsWith('http')")
    link = page.locator("#link textarea, #link input").first.input_value()
    assert link.startswith(f"{address}/?use=gratitude:1&prompt=Write")
    page.goto(link)
    page.get_by_label("gratitude").first.wait_for()
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('Write to')")
    assert page.locator("#prompt textarea").input_value() == "Write to <b>me</b> & Bob."
    page.locator("#run").click()
    page.wait_for_function("document.querySelector('#steered textarea').value.length > 15")


def test_a_link_that_leads_nowhere_says_so(page: Any, address: str) -> None:
    page.goto(f"{address}/?use=../etc/passwd:1&prompt=x")
    page.locator("#mix-error .ns-error").get_by_text("no artifact at a strength").wait_for()
    page.get_by_role("button", name="Delighted").click()
    page.wait_for_function("document.querySelector('#steered textarea').value.length > 3")


def test_the_page_can_be_used_by_keyboard_alone(page: Any) -> None:
    page.locator("#presets button").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Disappointed"
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#steered textarea').value.length > 3")
    page.get_by_role("tab", name="Build").focus()
    page.keyboard.press("Enter")
    page.locator("#build").wait_for()


needs_own_page = pytest.mark.skipif(
    "NEUROSTEER_PAGE" in os.environ, reason="the page at NEUROSTEER_PAGE is not connected to the Hub of the tests"
)


@pytest.fixture
def own_hub(address: str, hub_server: FakeHub) -> Iterator[FakeHub]:
    """The empty Hub that the page talks to, as alice."""
    hub_server.reset()
    yield hub_server
    hub_server.reset()


def reviews(folder: Path, each: int) -> Path:
    table = folder / "reviews.csv"
    rows = [
        f'"{forms[number % 2].format(THINGS[number % 10])} Number {number}.",{label}'
        for forms, label in ((GLAD, "pos"), (SORRY, "neg"))
        for number in range(each)
    ]
    table.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return table


@needs_own_page
def test_built_from_a_file_published_found_again_and_steered_with(
    page: Any, browser: Any, address: str, own_hub: FakeHub, tmp_path: Path
) -> None:
    go(page, "Build")
    page.get_by_label("Upload one file").check()
    page.locator("#file input[type=file]").set_input_files(reviews(tmp_path, 45))
    page.locator("#preview").get_by_text("45 texts show it, 45 don’t").wait_for()
    page.get_by_label("Name", exact=True).fill("glad")
    page.locator("#build").click()
    page.locator("#try-it").click()
    page.locator("#run").click()
    page.locator("#steer-note").get_by_text("tokens/s").wait_for()
    assert text_of(page, "unsteered") != text_of(page, "steered")

    go(page, "Library")
    page.locator("#who").get_by_text("You publish as alice.").wait_for()
    page.locator("#repo input, #repo textarea").fill("alice/glad")
    page.locator("#publish-text textarea").fill(f"Gladder texts. {HOSTILE}")
    page.locator("#push").click()
    page.locator("#push-note").get_by_text("Published:").wait_for()
    assert set(own_hub.repos["alice/glad"].head.files) >= {"config.json", "weights.safetensors", "README.md"}

    other = browser.new_context().new_page()
    other.set_default_timeout(PATIENCE_MS)
    other.goto(address)
    go(other, "Library")
    other.locator("#search-text input, #search-text textarea").fill("glad")
    other.locator("#search").click()
    other.get_by_label("alice/glad").check()
    other.locator("#hub-card").get_by_text("Gladder texts.").wait_for()
    assert other.locator("img[src=x]").count() == 0 and other.title() == "NeuroSteer"
    other.locator("#pull").click()
    other.locator("#found-note").get_by_text("alice/glad is added").wait_for()
    go(other, "Steer")
    other.get_by_label("alice/glad").first.wait_for()
    other.locator("#run").click()
    other.locator("#steer-note").get_by_text("tokens/s").wait_for()
    assert text_of(other, "steered") == text_of(page, "steered")  # the same seed, the same bytes
    other.context.close()


@needs_own_page
def test_what_the_hub_refuses_is_one_line_and_the_work_is_kept(page: Any, own_hub: FakeHub, tmp_path: Path) -> None:
    own: Any = load(ROOT / "vectors" / "sentiment")
    (tmp_path / "mine.zip").write_bytes(pack(replace(own, name="mine")))
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(tmp_path / "mine.zip")
    page.locator("#mix-note").get_by_text("mine is added").wait_for()
    go(page, "Library")
    error = page.locator("#push-error .ns-error")
    page.locator("#repo input, #repo textarea").fill("bob/mine")  # another's
    page.locator("#push").click()
    error.get_by_text("bob/mine").wait_for()
    own_hub.fail("whoami", "status", status=401, times=9)
    page.locator("#repo input, #repo textarea").fill("alice/mine")
    page.locator("#push").click()
    error.get_by_text("token").wait_for()
    assert "hf_alice" not in page.locator("body").inner_text()
    page.locator("#labels").get_by_label("mine (mine)").wait_for()  # still there
    page.locator("#reference input, #reference textarea").fill("nobody/nothing")
    page.locator("#pull").click()
    page.locator("#hub-error .ns-error").get_by_text("nobody/nothing").wait_for()


def test_a_file_that_is_too_large_is_refused(page: Any, tmp_path: Path) -> None:
    go(page, "Build")
    page.get_by_label("Upload one file").check()
    (tmp_path / "large.csv").write_bytes(b"text,label\n" + b"x" * (21 << 20))
    page.locator("#file input[type=file]").set_input_files(tmp_path / "large.csv")
    page.locator("#preview .ns-error").get_by_text("20 MB").wait_for()


def test_the_neurons_of_an_answer_are_found_and_switched_off(page: Any) -> None:
    go(page, "Circuits")
    page.locator("#attribute").click()
    page.locator("#predictions").get_by_text("The circuit × 0").wait_for()
    for picture in ("heat", "edges"):
        page.locator(f"#{picture} .js-plotly-plot").wait_for()
    first = page.locator("#predictions ol").nth(0).locator("li").first.inner_text()
    without = page.locator("#predictions ol").nth(1).locator("li").first.inner_text()
    assert first.startswith("·Paris") and not without.startswith("·Paris")
    number = page.get_by_label("number input for Multiplier")
    number.fill("1")
    number.blur()
    page.locator("#predictions").get_by_text("The circuit × 1").wait_for()
    both = [page.locator("#predictions ol").nth(place).inner_text() for place in (0, 1)]
    assert both[0] == both[1]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#save-circuit").click()
    page.locator("#circuit").get_by_text("is on your shelf").wait_for()
    go(page, "Steer")
    page.get_by_label("Paris-relp: multiplier").first.wait_for()


def test_a_circuit_of_nothing_is_one_line(page: Any) -> None:
    go(page, "Circuits")
    page.locator("#target input, #target textarea").fill("")
    page.locator("#attribute").click()
    page.locator("#circuit-error .ns-error").get_by_text("next word is empty").wait_for()


def test_from_a_description_to_a_slider(page: Any, tmp_path: Path) -> None:
    go(page, "Build")
    page.get_by_label("Describe it").check()
    page.locator("#describe").click()
    page.locator("#describe-error .ns-error").get_by_text("Fill in both lines").wait_for()
    page.locator("#instruct textarea").fill(f"Write in a very positive, delighted tone. {HOSTILE}")
    page.locator("#against textarea").fill("Write in a very negative, disappointed tone.")
    page.locator("#describe").click()
    written = page.locator("#answers").get_by_text("Tell me about a walk through a small town.").first
    written.wait_for(timeout=3 * PATIENCE_MS)  # 128 answers
    page.locator("#preview").get_by_text("They are read as answers to").wait_for()
    with page.expect_download() as download:
        page.locator("#download-answers").click()
    saved = tmp_path / "answers.csv"
    download.value.save_as(saved)
    assert saved.read_text(encoding="utf-8").startswith("prompt,chosen,rejected")
    page.get_by_role("button", name="Advanced").click()
    page.locator("#calibrate input").uncheck()  # which other tests do, and takes a while
    page.locator("#build").click()
    page.locator("#try-it").wait_for()
    assert "answers-caa is ready" in page.locator("#built").inner_text()
