"""Fixtures that several test files share."""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hermetic  # noqa: F401  (first: it clears what the Hub's client reads when it is imported)
import pytest
import tiny as tinies
import torch
from checks import Ran, Run
from hub_server import FakeHub, running
from tiny import ARCHITECTURES, Tiny, hook_count

from neurosteer import cli
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.errors import NeuroSteerError
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.steering.session import Session

if TYPE_CHECKING:
    from neurosteer.ui.loading import ModelHolder
    from neurosteer.ui.tabs.build_handlers import BuildHandlers
    from neurosteer.ui.tabs.mixer_handlers import MixerHandlers
    from neurosteer.ui.tabs.steer_handlers import SteerHandlers

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


SLOW = {"embedded", "browser", "shared"}
"""Markers of tests left out by default: they need the embedded model, a browser or data beside the checkout."""
SLOW_MODULES = {
    "test_clamp",  # products of recipes and architectures; steering's own stay
    "test_gpu",  # processes of the real scheduler of GPUs
    "test_hub_faults",  # connections that break in every way
    "test_lm_harness",
    "test_sae_method",  # products of options; one of each stands in test_features
    "test_sae_training",
    "test_serving",  # many callers by the clock
    "test_visitors",
}
SLOW_FIXTURES = {"page"}  # one in a process of its own or in a browser
USUAL = {"llama", "gemma3", "gpt2"}
"""Of products of tests and architectures these are run by default: one without a sliding window, one with it and with
norms after the blocks, and one with biases and learned positions."""
BY_THE_CLOCK = {"browser"}
BY_THE_CLOCK_MODULES = {"test_gpu", "test_serving", "test_strangers", "test_visitors"}
"""Whose tests need the machine for themselves: run one after another (`-m clock -n 0`)."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before tests are left out by their markers."""
    for item in items:
        marks, module = {mark.name for mark in item.iter_markers()}, item.path.stem
        fixtures = getattr(item, "fixturenames", ())
        if SLOW & marks or SLOW_FIXTURES & set(fixtures) or module in SLOW_MODULES or _is_further_architecture(item):
            item.add_marker(pytest.mark.slow)
        if BY_THE_CLOCK & marks or module in BY_THE_CLOCK_MODULES:
            item.add_marker(pytest.mark.clock)


def _is_further_architecture(item: pytest.Item) -> bool:
    values = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    return any(value in ARCHITECTURES and value not in USUAL for value in values if isinstance(value, str))


@pytest.fixture(scope="session", params=ARCHITECTURES)
def each(request: pytest.FixtureRequest) -> Tiny:
    """A tiny model of every architecture in turn."""
    return tinies.tiny(request.param)


@pytest.fixture(scope="session")
def llama() -> Tiny:
    return tinies.tiny("llama")


@pytest.fixture(scope="session")
def model_folder(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as `save_pretrained` writes it, to be read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama.model.save_pretrained(folder)
    llama.lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["neurosteer", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def hub_server() -> Iterator[FakeHub]:
    with running() as server:
        yield server


@pytest.fixture
def hub(hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """A Hub of our own with nothing in it, asked over HTTP by the real client; alice is logged in."""
    hub_server.reset()
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # for processes that a test starts; here it was read long ago
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    return hub_server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between two tries; the seconds that would have passed are listed."""
    pauses: list[float] = []
    for module in ("neurosteer.hub.client", "huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    return pauses


# --- the page (imported where it is used: gradio takes seconds) ------------------------------------------------------


@pytest.fixture
def holder(llama: Tiny) -> "ModelHolder":
    """A tiny model, as the page holds it."""
    from pages import Ready

    return Ready(Session(llama.lm))


@pytest.fixture
def building(holder: "ModelHolder") -> "BuildHandlers":
    from neurosteer.ui.jobs import Jobs
    from neurosteer.ui.loading import Models
    from neurosteer.ui.tabs.build_handlers import BuildHandlers

    return BuildHandlers(Models.of(holder), Jobs())


@pytest.fixture
def steering(building: "BuildHandlers") -> "SteerHandlers":
    from neurosteer.ui.tabs.steer_handlers import SteerHandlers

    return SteerHandlers(building.models, building.jobs)


@pytest.fixture
def mixing(building: "BuildHandlers") -> "MixerHandlers":
    from neurosteer.ui.tabs.mixer_handlers import MixerHandlers

    return MixerHandlers(building.models, building.jobs, building)


@pytest.fixture(scope="session")
def mood(llama: Tiny) -> SteeringVector:
    """Built on the tiny model."""
    from pages import EXAMPLES

    built = build(llama.lm, EXAMPLES, layers=1, name="mood")
    assert isinstance(built, SteeringVector)
    return built


@pytest.fixture(scope="module")  # while it runs, this thread has an event loop
def browser() -> Iterator[Any]:
    """Chromium, or a skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def embedded_lm() -> LanguageModel:
    """The embedded model in float32, or a skip where it cannot be had."""
    try:
        return load_model(device="cpu", dtype="float32")
    except NeuroSteerError as error:
        pytest.skip(f"the embedded model cannot be had: {error}")


@pytest.fixture(autouse=True)
def few_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models on one thread: several threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    embedded = any(request.node.get_closest_marker(name) for name in ("embedded", "shared"))
    torch.set_num_threads(before if embedded else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_hook_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to a shared model, no hook is on it afterwards."""
    yield
    for name in ("each", "llama"):
        if name in request.fixturenames:
            assert hook_count(request.getfixturevalue(name).model) == 0
