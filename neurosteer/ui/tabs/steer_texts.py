"""Both texts of a run of the Steer tab: what is asked for, and what its panes show while they grow."""

from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.ui.mixer import Mix
from neurosteer.ui.show import html as render

if TYPE_CHECKING:
    from neurosteer.artifacts.recipes import Recipe

SIDES = ("unsteered", "steered")
UNSTEERED_SIDE, KEPT_SIDE = "unsteered", "kept"

Talk = dict[str, list[dict[str, str]]]
"""A conversation per side, as messages with `role` and `content`."""


class Kept(NamedTuple):
    """A recipe that was put aside to compare others with."""

    recipe: "Recipe"
    words: str


class Ask(NamedTuple):
    """What to write, and beside what."""

    mode: str
    prompt: str
    talk: Talk
    against: str
    kept: Kept | None
    max_new_tokens: float
    temperature: float
    top_p: float
    seed: int
    greedy: bool

    @property
    def beside(self) -> Kept | None:
        """The recipe of the left side; None for the unsteered model."""
        return self.kept if self.against == KEPT_SIDE else None


class View(NamedTuple):
    """Updates for the components that a run changes, by name; by default none."""

    run: Any = gr.skip()
    again: Any = gr.skip()
    stop: Any = gr.skip()
    error: Any = gr.skip()
    note: Any = gr.skip()
    unsteered: Any = gr.skip()
    steered: Any = gr.skip()
    unsteered_chat: Any = gr.skip()
    steered_chat: Any = gr.skip()
    talk: Any = gr.skip()
    prompt: Any = gr.skip()
    last: Any = gr.skip()
    coloured: Any = gr.skip()
    picked: Any = gr.skip()


_WRITING = View(error="", coloured="")
"""While texts grow. What is there already costs gradio a fifth of what it makes of leaving a component alone."""


def new_talk() -> Talk:
    return {side: [] for side in SIDES}


class Texts:
    """Both texts of a run as they grow, and what the panes of its mode show of them."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.chat = ask.mode == "chat"
        self.texts = ["", ""]
        self._chats_before = [_escaped(ask.talk[side]) for side in SIDES]

    def asked(self, side: str) -> Any:
        """The prompt of a side: the text alone, or that side's conversation with it."""
        prompt = self.ask.prompt
        return [*self.ask.talk[side], {"role": "user", "content": prompt}] if self.chat else prompt

    def take(self, first: int, pieces: tuple[str, ...]) -> None:
        for row, piece in enumerate(pieces, start=first):
            self.texts[row] += piece

    def begun(self, mix: Mix, note: str) -> View:
        """At once: Stop works, and what is to be compared is said above the texts."""
        beside = f"Kept: {self.ask.beside.words}" if self.ask.beside else "Unsteered"
        named = [gr.update(label=label) for label in (beside, f"Steered: {mix.in_words()}")]
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        view = self._shown(*named)._replace(note=render.note_line(note))
        return view._replace(run=off, again=off, stop=on)

    def view(self, *, done: bool = False) -> View:
        """The texts as they stand; `done` adds them to the conversation."""
        if not self.chat:
            return self._shown(*self.texts)
        talk = {
            side: [*self.asked(side), {"role": "assistant", "content": text}]
            for side, text in zip(SIDES, self.texts, strict=True)
        }
        view = self._shown(*(_escaped(talk[side]) for side in SIDES))
        return view._replace(talk=talk if done else gr.skip(), prompt="")

    def _shown(self, left: Any, right: Any) -> View:
        """Updates for the two panes of the mode."""
        if self.chat:
            return _WRITING._replace(unsteered_chat=left, steered_chat=right)
        before = self._chats_before
        return _WRITING._replace(unsteered=left, steered=right, unsteered_chat=before[0], steered_chat=before[1])


def _escaped(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**message, "content": render.chat_text(message["content"])} for message in talk]
