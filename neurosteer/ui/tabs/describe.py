"""A part of the Build tab: examples that the model writes itself, told to do something and told otherwise."""

from typing import Any

import gradio as gr

from neurosteer.errors import Cancelled, UsageError
from neurosteer.ui.jobs import guarded, problem
from neurosteer.ui.limits import MAX_BUILDS
from neurosteer.ui.show import html as render
from neurosteer.ui.source import answers_csv
from neurosteer.ui.tabs.startable import Startable, ended, wire_work
from neurosteer.ui.wiring import Parts, Updates, bound
from neurosteer.ui.work import QUIET, at_most, in_words

HEADERS = ["Prompt", "Told to", "Told otherwise"]
_LONGEST = 1000


class DescribeHandlers(Startable):
    """What happens there."""

    kind = "describe"

    def write(
        self, request: gr.Request, progress: gr.Progress, instruct: str, against: str, model: str | None
    ) -> Updates:
        """The model's answers, as a table to look at and edit. Whatever goes wrong becomes one line."""
        try:
            if not instruct.strip() or not against.strip():
                raise UsageError("Fill in both lines: what the model is told to show it, and to not show it.")
            cancel = self.jobs.current(request.session_hash, self.kind)
            with at_most(cancel, "describe it in fewer words"):
                told = in_words(progress)
                session = self.models.holder(model).wait(told, cancel)
                from neurosteer.building.described import described_examples

                found = session.run(described_examples, instruct, against, samples=1, progress=told, cancel=cancel)
            columns = (found.positive_prompts, found.positive, found.negative)
            rows: list[list[Any]] = [list(row) for row in zip(*columns, strict=True)]
            table = gr.update(value=rows, visible=True)
            return {**ended(), "answers": table, "told": (instruct, against), **self.keep(request, rows)}
        except Cancelled:
            return ended(note=render.note_line("Cancelled: no answers were written."))
        except Exception as error:
            return ended(error=render.error_line(problem(error)))

    def keep(self, request: gr.Request, rows: list[list[Any]]) -> Updates:
        """The table as it stands, as a file."""
        path = self.jobs.folder(request.session_hash) / "answers.csv"
        path.write_text(answers_csv(rows), encoding="utf-8", errors="replace", newline="")
        return {"download": gr.update(value=str(path), visible=True)}


def lay_out(tab: Parts) -> None:
    """Its components, within the current layout: the table of answers is a part of `tab`, as other sources of examples
    are, the rest of `tab.describing`."""
    parts = Parts(told=gr.State(()))
    parts.instruct = gr.Textbox(
        "", label="What the model is told, to show it", placeholder="Write like a pirate.", max_lines=3,
        max_length=_LONGEST, elem_id="instruct",
    )  # fmt: skip
    parts.against = gr.Textbox(
        "",
        label="And to not show it",
        placeholder="Write plainly.",
        max_lines=3,
        max_length=_LONGEST,
        elem_id="against",
    )
    with gr.Row():
        parts.start = gr.Button("Write the answers", min_width=90, elem_id="describe")
        parts.cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel-describe")
    parts.error = gr.HTML(elem_id="describe-error", elem_classes="ns-flush")
    parts.note = gr.HTML(elem_id="describe-note", elem_classes="ns-flush")
    tab.answers = gr.Dataframe(
        headers=HEADERS, type="array", interactive=True, wrap=True, visible=False, max_height=320, show_label=False,
        elem_id="answers",
    )  # fmt: skip
    parts.download = gr.DownloadButton("Download the answers", visible=False, elem_id="download-answers")
    tab.describing = parts


def wire(tab: Parts, model: Any, handlers: DescribeHandlers) -> None:
    """`model` names the one that is to write."""
    parts = tab.describing
    outputs = {"answers": tab.answers, "download": parts.download, "told": parts.told}
    given = [parts.instruct, parts.against, model]
    wire_work(parts, [parts.start.click], handlers, handlers.write, given, outputs, at_once=MAX_BUILDS,
              shown_on=parts.note)  # fmt: skip
    tab.answers.input(*bound(guarded(handlers.keep), [tab.answers], {"download": parts.download}), **QUIET)
