"""The Hub as one caller sees it. Every request goes through `Hub.ask`, which limits it in time, tries it again where
that helps, and says in one line what went wrong."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.utils import hf_raise_for_status

from neurosteer.errors import HubError
from neurosteer.hub.faults import LOG_IN, Asked, asked_pause, explain, is_passing, retry_after
from neurosteer.version import VERSION

logger = logging.getLogger(__name__)

Token = str | bool | None
"""A token; None for that of `HF_TOKEN` or the stored login; False for none at all."""

QUICK_S = 30.0
TRIES = 3
LONGEST_PAUSE_S = 60.0
_FIRST_PAUSE_S = 1.0
_LONGEST_SILENCE_S = 60.0  # of a server, where the client itself has no limit

_until: ContextVar[float] = ContextVar("until", default=math.inf)
"""When the try that is under way has to be over, on the clock of `time.monotonic`."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Hub:
    """Where the Hub is, and with which token it is asked (None: without)."""

    endpoint: str
    token: str | None = field(repr=False)

    def ask(
        self,
        to: str,
        request: Callable[[HfApi], Answer],
        *,
        repo: str | None = None,
        seconds: float | None = None,
        tries: int = TRIES,
    ) -> Answer:
        """The answer to `request`, which gets the Hub's client.

        Args:
            to: what it is for, as in "read user/repo"; for messages.
            repo: the repo it is about.
            seconds: how long one try may take; `QUICK_S` when left out.
            tries: 1 where the client itself tries again, as it does when it lists.

        Raises:
            HubUnreachable: no connection, no answer in time, or a failing Hub, also after `tries` tries.
            HubError: everything else that the Hub refuses.
        """
        limit = seconds or QUICK_S
        for attempt in range(1, tries + 1):
            began = time.monotonic()
            try:
                with _within(limit):
                    return request(self._api())
            except Exception as error:
                pause = _pause(error, attempt)
                if pause is None or attempt == tries or time.monotonic() - began >= limit:
                    raise explain(error, Asked(to, self.endpoint, self.token, repo)) from error
                logger.info("Trying again in %.0f s to %s (%s).", pause, to, type(error).__name__)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def url(self, repo: str) -> str:
        """The page of `repo`."""
        return f"{self.endpoint}/{repo}"

    def user(self) -> dict[str, Any]:
        """Whose token it is, as the Hub describes them. Raises `HubError` without a token or with a bad one."""
        if self.token is None:
            raise HubError(f"You are not logged in to the Hub; {LOG_IN}.")
        return self.ask("see who you are", lambda api: api.whoami())

    def _api(self) -> HfApi:
        return HfApi(
            endpoint=self.endpoint, token=self.token or False, library_name="neurosteer", library_version=VERSION
        )


def connect(token: Token = None) -> Hub:
    """The Hub that `HF_ENDPOINT` names, or huggingface.co. Raises `HubError` for a token that cannot be one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    given = (get_token() if token is None or token is True else token) or None
    if given is not None and not (given.isascii() and given.isprintable() and " " not in given):
        raise HubError("The token holds characters that no token has; copy it again from the Hub's settings.")
    return Hub(endpoint, given)


def whoami(token: Token = None) -> str | None:
    """The user's name on the Hub; None when not logged in. Raises `HubError` for a token that is no longer good."""
    hub = connect(token)
    return None if hub.token is None else str(hub.user().get("name"))


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids asking the Hub."""
    return bool(constants.HF_HUB_OFFLINE)


def check_time() -> None:
    """Raise `TimeoutError` when the try that is under way takes too long."""
    if time.monotonic() > _until.get():
        raise TimeoutError("no answer in time")


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Let no request made here go on after `seconds`.

    The client itself waits without limit for a server that says nothing, and for an hour when it is asked to. So its
    requests get limits of their own, in the thread that makes them: none is left behind.
    """
    hooks: dict[str, list[Callable[[Any], Any]]] = get_session().event_hooks
    for when, hook in (("request", _limit), ("response", _refuse_long_pause)):
        if hook not in hooks[when]:
            hooks[when].append(hook)
    token = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(token)


def _limit(request: Any) -> None:
    """Before each request of the client: how long it may be silent."""
    check_time()
    left = min(_until.get() - time.monotonic(), _LONGEST_SILENCE_S)
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        what: left if limits.get(what) is None else min(left, limits[what])
        for what in ("connect", "read", "write", "pool")
    }


def _refuse_long_pause(response: Any) -> None:
    """After each answer: where the client would sleep for long before it tries again, it is an error instead."""
    if response.status_code >= 400 and (asked_pause(response) or 0) > LONGEST_PAUSE_S:
        response.read()
        hf_raise_for_status(response)


def _pause(error: Exception, attempt: int) -> float | None:
    """How many seconds to wait before trying again; None where that is of no use."""
    if not is_passing(error):
        return None
    asked = retry_after(error)
    if asked is not None:
        return asked if asked <= LONGEST_PAUSE_S else None
    return _FIRST_PAUSE_S * 3 ** (attempt - 1)
