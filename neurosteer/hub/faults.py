"""What went wrong between us and the Hub, in one line with the remedy. No token and no signed address gets into it."""

import errno
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neurosteer.errors import HubError, HubUnreachable
from neurosteer.text import flat

LOG_IN = "run `hf auth login` or set HF_TOKEN"

_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2")  # the client's, by its version
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_PASSING = (408, 429, 500, 502, 503, 504)
_RESET = re.compile(r";\s*t\s*=\s*(\d{1,9})")


@dataclass(frozen=True)
class Asked:
    """What was asked of whom: `to` as in "read user/repo", and the repo that it is about."""

    to: str
    endpoint: str
    token: str | None
    repo: str | None = None


def root_of(error: BaseException) -> BaseException:
    """The answer, the lost connection or the system's error behind what the client raised."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            break
        if isinstance(current, (HfHubHTTPError, TimeoutError, ConnectionError)) or _is_connection(current):
            return current
        if isinstance(current, OSError) and current.errno is not None:
            return current
        current = current.__cause__ or current.__context__
    return error


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    root = root_of(error)
    if isinstance(root, HfHubHTTPError):
        return root.response.status_code in _PASSING
    return _is_connection(root) or _is_cut_short(root) or _is_plain_connection(root)


def retry_after(error: BaseException) -> float | None:
    """How many seconds the Hub asks to wait, where it does."""
    root = root_of(error)
    return asked_pause(root.response) if isinstance(root, HfHubHTTPError) else None


def asked_pause(response: Any) -> float | None:
    """How many seconds an answer of the Hub asks to wait, where it does."""
    limit = _RESET.search(response.headers.get("ratelimit", ""))
    if response.status_code == 429 and limit is not None:
        return float(limit[1])
    text = response.headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    moment = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def explain(error: BaseException, asked: Asked) -> HubError:
    """The error to raise for one of the client's, of the system's or of an answer that makes no sense."""
    root = root_of(error)
    if isinstance(root, HubError):
        return root
    if isinstance(error, ValueError) and "metadata in README" in str(error):
        return HubError(f"The Hub refuses the card's metadata when asked to {asked.to}: {_shown(str(error), asked)}")
    if isinstance(root, HfHubHTTPError):
        return _explain_answer(root, asked)
    if isinstance(root, OfflineModeIsEnabled):
        return HubUnreachable(f"HF_HUB_OFFLINE is set, so the Hub is not asked to {asked.to}; unset it and try again.")
    if isinstance(root, TimeoutError) or (_is_connection(root) and "Timeout" in type(root).__name__):
        return HubUnreachable(f"The Hub did not answer in time when asked to {asked.to}; try again later.")
    if _is_connection(root) or _is_plain_connection(root):
        return HubUnreachable(
            f"The connection to the Hub ({asked.endpoint}) failed when asked to {asked.to}; check the network and try "
            "again."
        )
    if _is_cut_short(root):
        return HubUnreachable(f"A download broke off when asked to {asked.to}; try again.")
    if isinstance(root, OSError) and root.errno in _FULL_DISK:
        return HubError(f"The disk is full, so NeuroSteer could not {asked.to}; make room, or set HF_HOME elsewhere.")
    if isinstance(root, OSError) and root.errno is not None:
        return HubError(
            f"The Hub's cache could not be used to {asked.to} ({root.strerror}); check the folder that HF_HOME names."
        )
    return HubError(
        f"{asked.endpoint} did not answer like the Hub when asked to {asked.to} ({type(root).__name__}); check "
        "HF_ENDPOINT and proxies, or try again later."
    )


def _explain_answer(error: HfHubHTTPError, asked: Asked) -> HubError:
    status, repo = error.response.status_code, asked.repo or "it"
    page = f"{asked.endpoint}/{asked.repo}" if asked.repo else asked.endpoint
    if isinstance(error, GatedRepoError):
        first = "" if asked.token else f" and {LOG_IN}"
        return HubError(f"{repo} is gated: ask for access (accept its terms) at {page}{first}, then try again.", status)
    if isinstance(error, DisabledRepoError):
        return HubError(f"The Hub has disabled {repo}; see {page}.", status)
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repo} has no such revision (asked to {asked.to}); its revisions are at {page}.", status)
    if isinstance(error, EntryNotFoundError):
        return HubError(f"{repo} lacks a file that is needed to {asked.to}; see {page}.", status)
    if status == 401 and asked.token and not isinstance(error, RepositoryNotFoundError):
        return HubError(f"The Hub refused the token when asked to {asked.to}: it is expired or revoked; {LOG_IN}.", 401)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return HubError(_not_found(asked), status)
    if status == 403:
        return HubError(
            f"Your token may not {asked.to}; use one with write access ({asked.endpoint}/settings/tokens), or a repo "
            "of your own.",
            status,
        )
    return _explain_status(error, status, asked)


def _explain_status(error: HfHubHTTPError, status: int, asked: Asked) -> HubError:
    if status == 429:
        wait = retry_after(error)
        when = "in a few minutes" if wait is None else f"in {wait:.0f} s"
        return HubUnreachable(
            f"The Hub allows no more requests for now (asked to {asked.to}); try again {when}.", status
        )
    if status >= 500 or status == 408:
        return HubUnreachable(
            f"The Hub failed (error {status}) when asked to {asked.to}; try again later (status.huggingface.co).",
            status,
        )
    if status in (409, 412):
        return HubError(f"Somebody else changed {asked.repo} at the same time; try again.", status)
    if status in (402, 413, 507):
        return HubError(f"The Hub has no room to {asked.to} (error {status}): {_said(error, asked)}", status)
    return HubError(f"The Hub refused (error {status}) to {asked.to}: {_said(error, asked)}", status)


def _not_found(asked: Asked) -> str:
    if not asked.repo:
        return f"The Hub knows nothing of the kind when asked to {asked.to}; check the names."
    if asked.token:
        return (
            f"The Hub knows no {asked.repo} that your token may read (asked to {asked.to}); check the name, or ask its "
            "owner for access."
        )
    return f"The Hub knows no public {asked.repo} (asked to {asked.to}); check the name, or {LOG_IN} if it is private."


def _said(error: HfHubHTTPError, asked: Asked) -> str:
    return _shown(error.server_message or "it gave no reason", asked)


def _shown(text: str, asked: Asked) -> str:
    """What a server said, as a sentence on one line, not too long, and without the token whatever happens."""
    line = flat(text)
    return (line.replace(asked.token, "(token)") if asked.token else line)[:200].rstrip(".") + "."


def _is_connection(error: BaseException) -> bool:
    """Whether it is of the HTTP library that the client uses, and no answer of the Hub."""
    return not isinstance(error, HfHubHTTPError) and type(error).__module__.split(".")[0] in _HTTP_LIBRARIES


def _is_plain_connection(error: BaseException) -> bool:
    """The system's own, and what the client's faster way of transferring files raises."""
    return isinstance(error, ConnectionError) and not isinstance(error, OfflineModeIsEnabled)


def _is_cut_short(error: BaseException) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)
