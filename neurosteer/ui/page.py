"""The page: its tabs, the line that says where the model is, and launching it."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.models.catalog import find_model
from neurosteer.ui import limits
from neurosteer.ui.api.circuits import CircuitEndpoints, serve_circuits
from neurosteer.ui.api.endpoints import Endpoints, serve
from neurosteer.ui.api.evaluate import EvaluateEndpoint, serve_evaluate
from neurosteer.ui.guard import Guard
from neurosteer.ui.jobs import Handlers, Jobs
from neurosteer.ui.loading import ModelHolder, Models
from neurosteer.ui.show import html as render
from neurosteer.ui.show.theme import gradio_theme
from neurosteer.ui.tabs import about as about_tab
from neurosteer.ui.tabs import build as build_tab
from neurosteer.ui.tabs import circuits as circuits_tab
from neurosteer.ui.tabs import evaluate as evaluate_tab
from neurosteer.ui.tabs import library as library_tab
from neurosteer.ui.tabs import steer as steer_tab
from neurosteer.ui.tabs.build_handlers import BuildHandlers
from neurosteer.ui.tabs.circuits import CircuitHandlers
from neurosteer.ui.tabs.evaluate_handlers import EvaluateHandlers
from neurosteer.ui.tabs.library import LibraryHandlers
from neurosteer.ui.tabs.mixer_handlers import MixerHandlers
from neurosteer.ui.tabs.steer_handlers import SteerHandlers
from neurosteer.ui.turns import give_turns

_STATUS_EVERY_S = 1.0
_CACHE_S = (600, 3600)


class PageHandlers(Handlers):
    """What happens around the tabs."""

    def status(self, model: str | None = None) -> list[Any]:
        """The model's line; the timer that asks for it (until loading is over); the button to try again."""
        try:
            status = self.models.status(model)
        except NeuroSteerError:  # not on offer: choosing it said so
            return [gr.skip(), gr.Timer(_STATUS_EVERY_S, active=False), gr.skip()]
        return [
            render.status_line(status),
            gr.Timer(_STATUS_EVERY_S, active=not status.settled),
            gr.update(visible=status.failed),
        ]

    def retry(self, model: str | None = None) -> list[Any]:
        """Load the model again after a failure."""
        self.models.holder(model).start()
        return self.status(model)

    def leave(self, request: gr.Request) -> None:
        """A visitor closed the page: nobody waits for their work any more."""
        self.jobs.leave(request.session_hash)


def create_app(
    model_name: str | None = None,
    *,
    holder: ModelHolder | None = None,
    host: str | None = None,
    trust_visitors: bool | None = None,
) -> gr.Blocks:
    """The page. The model begins to load here, in a thread of its own; the page answers meanwhile.

    Beyond this machine visitors are strangers: they are not lent its login of the Hub, nor patterns and autoencoders
    of their own choice. `trust_visitors` (None: as NEUROSTEER_TRUST_VISITORS says) treats them as its owner. `host` and
    it have to be those given to `launch`, because they decide what the page offers.
    """
    limits.serve_at(host, trust_visitors)
    models, jobs = Models(model_name) if holder is None else Models.of(holder, model_name), Jobs()
    building = BuildHandlers(models, jobs)
    with gr.Blocks(title="NeuroSteer", delete_cache=_CACHE_S) as page:
        serve(Endpoints(building))  # before all others, who would take their names
        serve_circuits(CircuitEndpoints(models, jobs))
        serve_evaluate(EvaluateEndpoint(models, jobs))
        gr.HTML(render.heading(), elem_classes="ns-flush")
        with gr.Row(elem_classes="ns-model"):
            model = gr.Dropdown(
                [(model_label(name), name) for name in models.names],
                value=models.default,
                label="Model",
                scale=0,
                min_width=420,
                elem_id="model",
            )
            with gr.Column():
                status = gr.HTML(
                    render.status_line(models.holder().status), elem_id="model-status", elem_classes="ns-flush"
                )
                retry = gr.Button("Load the model again", size="sm", visible=False, min_width=180)
        shelf = gr.State({})
        with gr.Tabs() as tabs:
            with gr.Tab("Steer", id="steer"):
                steer = steer_tab.lay_out(model, shelf)
            with gr.Tab("Build", id="build"):
                build = build_tab.lay_out()
            with gr.Tab("Circuits", id="circuits"):
                circuits = circuits_tab.lay_out()
            with gr.Tab("Evaluate", id="evaluate-tab") as evaluating:
                evaluate = evaluate_tab.lay_out()
            with gr.Tab("Library", id="library") as entry:
                library = library_tab.lay_out()
            with gr.Tab("About", id="about-tab"):
                about_tab.lay_out()
        build_tab.wire(build, steer.mixer, tabs, page, building)
        steer_tab.wire(steer, SteerHandlers(models, jobs))
        steer_tab.wire_mixer(steer, page, MixerHandlers(models, jobs, building))
        circuits_tab.wire(circuits, steer.mixer, CircuitHandlers(models, jobs))
        evaluate_tab.wire(evaluate, steer.mixer, build.source, evaluating, EvaluateHandlers(models, jobs))
        library_tab.wire(library, steer.mixer, tabs, entry, LibraryHandlers(models))
        _wire_status(page, PageHandlers(models, jobs), model, status, retry)
    models.holder().start()
    return page


def _wire_status(
    page: gr.Blocks, handlers: PageHandlers, model: gr.Dropdown, status: gr.HTML, retry: gr.Button
) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    timer = gr.Timer(_STATUS_EVERY_S)
    line = [status, timer, retry]
    timer.tick(handlers.status, model, line, **quiet)
    page.load(handlers.status, model, line, **quiet)
    model.change(handlers.status, model, line, **quiet)
    retry.click(handlers.retry, model, line, **quiet)
    page.unload(handlers.leave)


def model_label(name: str) -> str:
    """'SmolLM2-135M-Instruct (chat, 0.6 GB)': what it is and what memory it needs."""
    known = find_model(name)
    if known is None:
        return name
    return f"{known.name} ({'chat' if known.chat else 'base'}, {known.memory_gb:g} GB)"


def launch(
    page: gr.Blocks,
    *,
    host: str | None = None,
    port: int | None = None,
    trust_visitors: bool | None = None,
    **options: Any,
) -> Any:
    """Serve the page. Host and port: as given, else GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, else this machine only
    (everywhere on a Space) and the first free port from 7860. `trust_visitors` is as for `create_app`; `options` are
    gradio's own.

    Raises `UsageError` when it cannot be served there.
    """
    limits.serve_at(host, trust_visitors)
    server = limits.bound_to()
    listeners = give_turns(page.queue(max_size=limits.MAX_QUEUED, api_open=False))
    try:
        return page.launch(
            server_name=server,
            server_port=port,
            theme=gradio_theme(),
            css_paths=Path(__file__).with_name("style.css"),
            max_file_size=limits.MAX_FILE_BYTES,
            max_threads=limits.MAX_EVENTS,  # threads of their own: else the page itself would wait behind all events
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=find_spec("mcp") is not None,  # an extra of gradio's
            app_kwargs={"middleware": [Middleware(Guard, listeners=listeners)]},
            **options,
        )
    except OSError as error:
        wanted = port or os.environ.get("GRADIO_SERVER_PORT") or "any from 7860 on"
        raise UsageError(
            f"The page cannot be served at {server}, port {wanted}: the port is taken, or the address is not one of "
            "this machine's; choose others."
        ) from error
