"""The About tab: what this is, for somebody who has never heard of it, and what it cannot do."""

from pathlib import Path

import gradio as gr


def lay_out() -> None:
    """The tab's text, within the current layout."""
    gr.Markdown(Path(__file__).with_name("about.md").read_text(encoding="utf-8"), elem_id="about-text")
