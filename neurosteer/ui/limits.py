"""Who visits the page, and what one visitor may ask of what all of them share. Each limit has one name and is here."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Protocol

from neurosteer.validation import check_number

# Of one request.
MAX_NEW_TOKENS = 512
MAX_PROMPT = 8_000  # characters
MAX_STRENGTH = 100.0  # that of `artifacts.recipes`, which takes seconds to import
MAX_SECONDS = 300.0  # of one run or build
MAX_EVALUATED_TEXTS = 600  # of one evaluation, its controls counted
MAX_EVALUATED_PROMPTS, MAX_EVALUATED_STRENGTHS, MAX_EVALUATED_SAMPLES, MAX_EVALUATED_TOKENS = 32, 9, 5, 128
MAX_JUDGE_CHARACTERS = 2_000_000  # of the labelled texts that a judge is trained on
MAX_FILE_BYTES = 25 << 20
MAX_UPLOAD_BYTES = MAX_FILE_BYTES + (1 << 20)  # of a request that uploads a file
MAX_BODY_BYTES = 8 << 20  # of every other request
MAX_JSON_VALUES = 100_000  # in it: two sets of 20,000 texts and more

# Of all visitors together, at the same time.
MAX_RUNS = 64  # texts are written together, so many cost little more than one
MAX_BUILDS = 2
MAX_CIRCUITS = 2
MAX_EVALUATIONS = 2
MAX_EVENTS = 128  # under way, of whatever kind
MAX_QUEUED = 256  # events that wait for their turn


@dataclass(frozen=True)
class Places:
    """What one client may hold at the same time, and leave behind."""

    session: int = 12  # events of one open page, waiting or under way
    address: int = 32  # the same of everybody at one address
    programs: int = 8  # of these, calls by programs
    all_programs: int = MAX_QUEUED // 4  # calls by programs at all addresses together
    requests: int = 32  # that are being answered
    streams: int = 200  # that are being read: two for each open page
    upload_bytes: int = 100 << 20  # within an hour, which is how long uploads are kept
    uploads: int = 100


def places() -> Places | None:
    """What a stranger may hold; None where visitors are trusted."""
    return Places() if strangers() else None


def check_strength(of: str, strength: float) -> None:
    """Raises `UsageError` where a strength is beyond what any model withstands: it would only make numbers of none."""
    check_number(f"The strength of {of[:60]!r}", strength, -MAX_STRENGTH, MAX_STRENGTH)


# --- who the visitors are --------------------------------------------------------------------------------------------

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass
class _Served:
    """What whoever serves the page has said. The environment says the rest."""

    host: str | None = None
    trust: bool | None = None


_served = _Served()


def serve_at(host: str | None, trust_visitors: bool | None) -> None:
    """Remember where the page is served and whether its visitors are trusted (None: as the environment says)."""
    _served.host, _served.trust = host, trust_visitors


def strangers() -> bool:
    """Whether visitors are strangers: whoever can reach the page may not be the machine's owner. They are on a Space,
    and wherever the page answers beyond this machine unless its owner says that visitors are trusted."""
    return on_a_space() or (_reaches_beyond() and not _trusted())


def on_a_space() -> bool:
    """Whether this is a Hugging Face Space."""
    return bool(os.environ.get("SPACE_ID"))


def on_zero_gpu() -> bool:
    """Whether this is a Space whose GPU comes and goes (ZeroGPU), as `spaces` tells."""
    return _is_set("SPACES_ZERO_GPU")


def bound_to() -> str:
    """The address that the page listens on: as given, else as the environment says, else this machine's own."""
    everywhere = "0.0.0.0" if on_a_space() else "127.0.0.1"
    return _served.host or os.environ.get("GRADIO_SERVER_NAME") or everywhere


def allowed_hosts() -> tuple[str, ...]:
    """The further names by which the page may be asked for, from NEUROSTEER_ALLOWED_HOSTS: `page.lab.example,*.local`.
    On a Space also its own."""
    named = f"{os.environ.get('NEUROSTEER_ALLOWED_HOSTS', '')},{os.environ.get('SPACE_HOST', '')}"
    return tuple(host.strip().lower() for host in named.split(",") if host.strip())


def answers_to(name: str) -> bool:
    """Whether the page is known by this host name. A name that somebody else points at this machine is refused: behind
    it a web page could do whatever this machine's own browser may."""
    if is_loopback(name) or on_a_space() or any(fnmatch(name, host) for host in allowed_hosts()):
        return True
    return not is_loopback(bound_to()) and (_is_address(name) or name == socket.gethostname().lower())


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine to itself."""
    bare = host.strip("[]").lower()
    return bare in LOOPBACK_NAMES or (_is_address(bare) and ipaddress.ip_address(bare).is_loopback)


def _reaches_beyond() -> bool:
    """An allowed name means that a proxy in front of this machine hands requests on, wherever the page listens."""
    return not is_loopback(bound_to()) or not all(map(is_loopback, allowed_hosts()))


def _trusted() -> bool:
    return _is_set("NEUROSTEER_TRUST_VISITORS") if _served.trust is None else _served.trust


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "t", "true", "yes")


# --- what they are lent ----------------------------------------------------------------------------------------------


class Login(Protocol):
    """What gradio hands over of a visitor who logged in."""

    token: str


def visitors_token(login: Login | None) -> str | bool | None:
    """The token to use for a visitor: their own; else that of this machine's login (None), which strangers are never
    lent: for them False, none at all."""
    if login is not None:
        return login.token
    return False if strangers() else None
