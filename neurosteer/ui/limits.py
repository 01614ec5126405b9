"""What a visitor may ask of a page that others use too."""

import os
from typing import Protocol

MAX_NEW_TOKENS = 512
MAX_PROMPT = 8_000  # characters
MAX_SECONDS = 300.0  # of one run or build
MAX_VISITORS = 64  # runs and builds that the page takes on at once; most of them wait for their turn
MAX_BUILDS = 2  # at once
MAX_EVALUATED_TEXTS = 600  # of one evaluation, its controls counted
MAX_EVALUATED_PROMPTS, MAX_EVALUATED_STRENGTHS, MAX_EVALUATED_SAMPLES, MAX_EVALUATED_TOKENS = 32, 9, 5, 128
MAX_JUDGE_CHARACTERS = 2_000_000  # of the labelled texts that a judge is trained on


def on_a_space() -> bool:
    """Whether this is a Hugging Face Space, whose visitors are strangers."""
    return bool(os.environ.get("SPACE_ID"))


def on_zero_gpu() -> bool:
    """Whether this is a Space whose GPU comes and goes (ZeroGPU), as `spaces` tells."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


class Login(Protocol):
    """What gradio hands over of a visitor who logged in."""

    token: str


def visitors_token(login: Login | None) -> str | bool | None:
    """The token to use for a visitor: their own; on a machine of one's own that of the login there (None). A Space's
    own token is never lent to visitors: False, none at all."""
    if login is not None:
        return login.token
    return False if on_a_space() else None
