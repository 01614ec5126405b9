"""The door of the page: which requests gradio gets to see at all.

Refused here, each with one line: names that are not the page's, other web pages that act with a visitor's browser,
bodies and uploads that are too large, and more at once from one address than everybody can have. What comes through
carries who sent it (`turns.Caller`); whose turn it then is, `turns.Turns` decides.
"""

import hmac
import ipaddress
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neurosteer.ui import limits
from neurosteer.ui.turns import TOO_MANY, Caller, Listeners

_API = "/gradio_api"
_SAFE_METHODS = ("GET", "HEAD")
_KEPT_S = 3600.0  # an upload, before gradio removes it
_VOUCHER = b"x-neurosteer-caller"


class Refused(Exception):
    """A request that is not let in: an HTTP status and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Guard:
    """ASGI middleware in front of gradio."""

    def __init__(self, app: ASGIApp, listeners: Listeners) -> None:
        self._app = app
        self._listeners = listeners
        self._secret = secrets.token_urlsafe(24)
        self._requests: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        self._uploads: dict[str, list[tuple[float, int, int]]] = {}  # when, bytes, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            check_host(headers)
            from_page = check_origin(scope["method"], headers)
            address = self._address(scope, headers)
            with self._place(scope["method"], address), self._listener(scope):
                caller = Caller(address, from_page)
                known = {**scope, "neurosteer.caller": caller, "headers": self._vouching(scope, caller)}
                await self._let_in(known, receive, send)
        except Refused as refusal:
            await JSONResponse({"detail": str(refusal)}, refusal.status)(scope, receive, send)

    # --- who it is ---

    def _address(self, scope: Scope, headers: Headers) -> str:
        """The caller's. A tool call of an MCP client comes a second time, from gradio itself: then whose it was."""
        secret, _, address = headers.get(_VOUCHER.decode(), "").partition(" ")
        if address and hmac.compare_digest(secret, self._secret):
            return address
        peer = (scope.get("client") or ("unknown", 0))[0]
        return network_of(_forwarded(headers) or peer if limits.on_a_space() else peer)

    def _vouching(self, scope: Scope, caller: Caller) -> list[tuple[bytes, bytes]]:
        """The headers. For MCP with the caller among them: gradio sends a tool call's headers along when it makes the
        call at the page's own address."""
        kept = [(name, value) for name, value in scope["headers"] if name != _VOUCHER]
        if scope["path"].startswith(f"{_API}/mcp"):
            kept.append((_VOUCHER, f"{self._secret} {caller.address}".encode()))
        return kept

    # --- how much there is room for ---

    @contextmanager
    def _place(self, method: str, address: str) -> Iterator[None]:
        places = limits.places()
        held = self._streams if method in _SAFE_METHODS else self._requests
        if places is not None and held[address] >= (places.streams if held is self._streams else places.requests):
            raise Refused(429, TOO_MANY)
        held[address] += 1
        try:
            yield
        finally:
            held[address] -= 1
            if not held[address]:
                del held[address]

    @contextmanager
    def _listener(self, scope: Scope) -> Iterator[None]:
        name, path = "", scope["path"]
        if scope["method"] == "GET" and path.startswith(f"{_API}/queue/data"):
            name = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        elif scope["method"] == "GET" and path.startswith(f"{_API}/call/"):
            name = path.rstrip("/").rpartition("/")[2]
        with ExitStack() as stack:
            if name:
                stack.enter_context(self._listeners.listening(name))
            yield

    def _room_for_uploads(self, address: str) -> int | None:
        """How many bytes more a client may upload; None for as many as they like."""
        places = limits.places()
        if places is None:
            return None
        oldest = time.monotonic() - _KEPT_S
        kept = {who: [one for one in past if one[0] > oldest] for who, past in self._uploads.items()}
        self._uploads = {who: past for who, past in kept.items() if past}
        past = self._uploads.get(address, [])
        used, files = sum(size for _, size, _ in past), sum(number for _, _, number in past)
        if used >= places.upload_bytes or files >= places.uploads:
            raise Refused(429, "You have uploaded more within the last hour than this page keeps; try again later.")
        return places.upload_bytes - used

    # --- what is sent ---

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        uploading = scope["path"].rstrip("/") == f"{_API}/upload"
        room = self._room_for_uploads(scope["neurosteer.caller"].address) if uploading else None
        most = limits.MAX_UPLOAD_BYTES if uploading else limits.MAX_BODY_BYTES
        body = _Body(receive, send, most if room is None else min(most, room))
        body.check_announced(Headers(scope=scope))
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.too_large:
                raise
        finally:
            if uploading and room is not None:
                past = self._uploads.setdefault(scope["neurosteer.caller"].address, [])
                past.append((time.monotonic(), body.size, body.n_files))
        if body.too_large and not body.answered:
            raise body.refusal()


class _Body:
    """Counts what a request sends, and ends it where that is too much."""

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive, self._send, self._most = receive, send, most
        self.size = self._quotes = 0
        self.too_large = self.answered = False

    @property
    def n_files(self) -> int:
        """How many an answer to an upload names, as JSON."""
        return max(1, self._quotes // 2)

    def refusal(self) -> Refused:
        return Refused(413, f"The request is larger than {self._most / (1 << 20):.0f} MB, which is more than is read.")

    def check_announced(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most:
            raise self.refusal()

    async def receive(self) -> Message:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        if self.size > self._most:
            self.too_large = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.too_large and not self.answered:
            return  # what gradio makes of a request that was cut off
        self.answered = True
        self._quotes += message.get("body", b"").count(b'"')
        await self._send(message)


def check_host(headers: Headers) -> None:
    """Raises `Refused` where the page is asked for by a name that is not its own."""
    name = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    if not limits.answers_to(name):
        raise Refused(
            403,
            f"This page is not known as {name[:100]!r}; whoever serves it can allow that name with "
            "NEUROSTEER_ALLOWED_HOSTS.",
        )


def check_origin(method: str, headers: Headers) -> bool:
    """Whether the request is known to come from the page itself (programs send nothing that says so).

    Raises `Refused` where another web page sends it and it may change something.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    own = site == "same-origin" if site is not None else origin is not None and _is_own(origin, headers)
    foreign = site in ("cross-site", "same-site") or (site is None and origin is not None and not own)
    if foreign and method not in _SAFE_METHODS:
        raise Refused(403, "This request comes from another web page; open NeuroSteer's own page instead.")
    return own


def _is_own(origin: str, headers: Headers) -> bool:
    """Whether an Origin is the address that was asked, or the page's name in front of a proxy that asks by another."""
    found = urlsplit(origin)
    return found.netloc == headers.get("host") or (found.hostname or "") in limits.allowed_hosts()


def _forwarded(headers: Headers) -> str | None:
    """The last public address of X-Forwarded-For: a proxy adds the one it saw at the end, and what comes before is the
    caller's to invent."""
    for part in reversed(headers.get("x-forwarded-for", "").split(",")):
        try:
            if ipaddress.ip_address(part.strip()).is_global:
                return part.strip()
        except ValueError:
            continue
    return None


def network_of(address: str) -> str:
    """What counts as one client: an address, or the network of an IPv6 address, of which everybody has 2^64."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 6:
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((parsed, 64), strict=False))
    return address
