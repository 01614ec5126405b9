"""What every long piece of work on the page shares: its progress in words, and the kind that a stop names."""

from typing import TYPE_CHECKING

import gradio as gr

from neurosteer.progress import Progress

if TYPE_CHECKING:
    pass


KIND = "build"
PROGRESS = gr.Progress()  # as a default value it is how gradio knows to pass one in


def in_words(progress: gr.Progress) -> Progress:
    """Gradio's progress as the library's."""

    def report(message: str, fraction: float | None = None) -> None:
        progress(fraction or 0.0, desc=message)

    return report
