"""A visitor of the page and its model, for tests without a browser."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from tiny import D_MODEL, make_vector

from neurosteer.artifacts.features import Feature, FeatureContext
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.steering.batches import Batch
from neurosteer.steering.session import Session
from neurosteer.ui.gpu import LocalSession
from neurosteer.ui.loading import ModelHolder, Status
from neurosteer.ui.mixer import MOST, SLIDERS, Mix
from neurosteer.ui.page import create_app, launch
from neurosteer.ui.source import Source
from neurosteer.ui.tabs.steer_handlers import SteerHandlers
from neurosteer.ui.tabs.steer_texts import Ask, View, new_talk

HOSTILE = "<script>alert('x')</script> & \"<img src=x onerror=alert(1)>"
SKIP = gr.skip()
ENDPOINTS = ["steer", "build", "list", "inspect", "pull", "attribute", "edges", "evaluate"]


def texts(word: str, count: int = 24) -> tuple[str, ...]:
    return tuple(f"{word} the cat sings over mountain {number}" for number in range(count))


EXAMPLES = ContrastSet(texts("happy"), texts("sad"), name="mood", source="mood.csv: CSV")


class Ready(ModelHolder):
    """A holder whose model is there."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._begun, self._session = True, LocalSession(session)
        self._status = Status("tiny on CPU, float32", ready=True)
        self._imported.set()


class Never(ModelHolder):
    """A holder that is never asked to load."""

    def start(self) -> None:
        pass


@contextmanager
def serving(holder: ModelHolder) -> Iterator[str]:
    """The address of a page of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = create_app(holder=holder)
    try:
        yield launch(page, port=port, prevent_thread_lock=True, quiet=True)[1]
    finally:
        page.close(verbose=False)


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """When a step of decoding was done; each takes at least so long."""
    done: list[float] = []
    step = Batch.step

    def slowly(self: Batch) -> Any:
        time.sleep(seconds)
        done.append(time.monotonic())
        return step(self)

    monkeypatch.setattr(Batch, "step", slowly)
    return done


def visitor(name: str = "anna") -> Any:
    return SimpleNamespace(session_hash=name)


def source(kind: str, **given: Any) -> Source:
    empty = Source(kind, None, None, None, None, "", "")
    return empty._replace(**given)


def mix_of(
    shelf: Any, chosen: list[str], *strengths: float, without_overlap: bool = False, standing: list[str] | None = None,
    model: str | None = None,
) -> Mix:  # fmt: skip
    """As the page hands it over. The sliders stand for `standing`, which by default is what is chosen."""
    sliders = dict(zip(SLIDERS, (*strengths, *[1.0] * MOST), strict=False))
    stand_for = chosen if standing is None else standing
    return Mix.of(model, shelf, stand_for, chosen, without_overlap, **sliders)


told = gr.Progress()  # outside of an event it tells nobody


def feature(index: int = 7, **given: Any) -> Feature:
    plain: dict[str, Any] = {
        "layer": 1,
        "weight": 1.5,
        "score": 0.1,
        "rates": (0.123, 0.021),
        "means_active": (2.0, 1.0),
        "promoted": (" glad", " happy"),
        "suppressed": (" sad",),
        "contexts": (FeatureContext("what a", " lovely", " day", 3.0),),
    }
    return Feature(index=index, **{**plain, **given})


def along(layers: dict[int, list[float]], name: str = "v", **given: Any) -> SteeringVector:
    """A vector whose first coordinates are given at each layer, the others 0."""
    directions = {layer: torch.tensor([*values, *[0.0] * (D_MODEL - len(values))]) for layer, values in layers.items()}
    return make_vector(list(layers), name=name, directions=directions, **given)


def ask(**given: Any) -> Ask:
    plain = Ask("prompt", "the cat", new_talk(), "unsteered", None, 8, 0.8, 0.95, 0, True)
    return plain._replace(**given)


def run(steering: SteerHandlers, asked: Ask, mixed: Mix) -> list[View]:
    return list(steering.run(visitor(), asked, mixed))
