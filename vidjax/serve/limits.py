"""What a stranger may send, and who may ask: sizes, times, a token, and where a request comes from.

`Guard` stands before the application. It checks the sender before it reads a byte of the body, and
the body while it arrives. `connection` bounds what comes before a request is one.
"""

import asyncio
import functools
import hmac
import ipaddress
import logging
import os
import stat
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from vidjax import files
from vidjax.errors import Expected, UserError
from vidjax.serve.metrics import Metrics

LOG = logging.getLogger("vidjax.serve")
LEAST_TOKEN = 16  # letters
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")  # a platform's probes have no token


class Limits(NamedTuple):
    """Limits of a server.

    Attributes:
      body_bytes: of one request, binary; an `.npz` may unpack to as much.
      json_bytes: of one request in JSON, or of the JSON before binary tensors.
      held_bytes: of all requests that are read or wait, together.
      header_bytes: of the headers of a request.
      clips: of one request.
      batch_clips: that are scored together, at most.
      waiting_clips: of requests that wait to be scored, or for the vectors to be enrolled.
      waiting_changes: enrolments and removals that wait.
      connections: open at a time.
      header_seconds, body_seconds: in which headers, and then the body, must have arrived.
      answer_seconds: until an answer, from the end of the body on.
      change_seconds: the same of a change, which fits coordinates anew where it must.
      idle_seconds: that a connection without a request stays open.
      drain_seconds: for requests under way, after a signal to end.
    """

    body_bytes: int = 32 << 20
    json_bytes: int = 4 << 20
    held_bytes: int = 256 << 20
    header_bytes: int = 32 << 10
    clips: int = 256
    batch_clips: int = 64
    waiting_clips: int = 1024
    waiting_changes: int = 16
    connections: int = 512
    header_seconds: float = 5.0
    body_seconds: float = 10.0
    answer_seconds: float = 10.0
    change_seconds: float = 120.0
    idle_seconds: float = 30.0
    drain_seconds: float = 20.0


class Refused(Expected):
    """A request that gets an error: its status, one line, and seconds after which to try again."""

    def __init__(self, status: HTTPStatus, text: str, retry_after: int | None = None):
        super().__init__(text)
        self.status, self.text, self.retry_after = status, one_line(text), retry_after


def one_line(text: str) -> str:
    """Returns the message of an error as one short line."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= 300 else line[:300] + "..."


def read_token(path: Path) -> bytes:
    """Returns the token in a file; UserError unless it is long, and only its owner may read it."""
    with files.open_regular(path) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        content = file.read(4096)
    if mode & 0o077:
        raise UserError(f"{path}: others may read the token\nchmod 600 {path}")
    token = content.strip()
    if len(token) < LEAST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise UserError(
            f"{path}: wanted one word of {LEAST_TOKEN} letters or more\n"
            f"make one: (umask 077; openssl rand -hex 32 > {path})"
        )
    return token


@functools.lru_cache(64)
def is_loopback(host: str) -> bool:
    """Returns True if only programs of this machine reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application that refuses, bounds and counts requests before another one sees them.

    The other application reads the body by `read_body`. It may raise Refused; every other error
    becomes a 500 whose log names the place in the code, and nothing of the request.
    """

    def __init__(self, app: Router, limits: Limits, metrics: Metrics, token: bytes | None):
        self.routes = app.routes
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else b"Bearer " + token
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; events of the server's life are passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self, receive, dict(scope["headers"]))
        scope["vidjax.body"] = body
        scope["app"] = self._app  # with it, the router raises for a path or method that is not
        answered = _Answered(send)
        began = asyncio.get_running_loop().time()
        error: Refused | None = None
        try:
            self._check_sender(scope["path"], body.headers)
            seconds = self._limits.body_seconds + self._limits.change_seconds
            async with asyncio.timeout(seconds):  # of a client that does not read its answer, too
                await self._app(scope, receive, answered)
        except Refused as refused:
            error = refused
        except HTTPException as unknown:
            error = Refused(HTTPStatus(unknown.status_code), f"{unknown.detail}: see /docs")
        except TimeoutError:
            error = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "no answer in time", 1)
        except _Gone:
            return
        except Exception as bug:
            LOG.error("internal error: %s", _place_of(bug))
            error = Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        finally:
            self._held -= body.size
        if error is not None:
            if answered.status:
                raise ConnectionAbortedError  # half an answer is out: the server cuts it off
            await _send_error(answered, error, close=not body.complete)
        seconds = asyncio.get_running_loop().time() - began
        self._metrics.count_request(scope.get("vidjax.route", "other"), answered.status, seconds)

    def _check_sender(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuses a false token, and pages of other sites that a browser on this machine shows."""
        if self._token is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._token) and path not in OPEN_PATHS:
                raise Refused(HTTPStatus.UNAUTHORIZED, "wanted: Authorization: Bearer TOKEN")
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(_hostname(host)):
            raise Refused(HTTPStatus.FORBIDDEN, "the header Host names another machine")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.rpartition("//")[2] != host:
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not ask")

    def hold(self, body: "_Body", size: int) -> None:
        """Counts bytes of a body; raises Refused where it is, or all together are, too large."""
        body.size += size
        self._held += size
        if body.size > body.limit:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has {body.limit:,} bytes at most"
            )
        if self._held > self._limits.held_bytes:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many large requests at once", 1)

    async def read(self, body: "_Body", limit: int) -> bytes:
        """Returns a body of at most `limit` bytes; raises Refused where it is larger or slow."""
        body.limit = limit
        length = body.headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15 or int(length) > limit:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has {limit:,} bytes at most"
            )
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await body.read()
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the body came too slowly") from None


async def read_body(scope: Scope, limit: int) -> bytes:
    """Returns the body of a request that a Guard has let through; Refused if it is too large."""
    body: _Body = scope["vidjax.body"]
    return await body.guard.read(body, limit)


class _Gone(Exception):
    """The client has hung up."""


class _Body:
    """A body: its headers, what was read of it, and how much that is."""

    def __init__(self, guard: Guard, receive: Receive, headers: Mapping[bytes, bytes]):
        self.guard, self._receive, self.headers = guard, receive, headers
        self.size, self.limit, self.complete = 0, 0, False

    async def read(self) -> bytes:
        parts: list[bytes] = []
        while True:
            message: Message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            self.guard.hold(self, len(part))
            parts.append(part)
            if not message.get("more_body", False):
                self.complete = True
                return b"".join(parts)


class _Answered:
    """Sends messages, and keeps the status; 0 before the answer has begun."""

    def __init__(self, send: Send):
        self._send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


async def _send_error(send: Send, error: Refused, *, close: bool) -> None:
    """Sends an error as `{"error": LINE}`; `close` ends a connection whose body was not read."""
    content = msgspec.json.encode({"error": error.text})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if close:
        headers.append((b"connection", b"close"))
    start = {"type": "http.response.start", "status": int(error.status), "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": content})


def _place_of(error: Exception) -> str:
    """Returns the kind of an error and the lines of code that it went through, not its message."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
    return f"{type(error).__name__} at {places}"


@functools.lru_cache(64)
def _hostname(host: str) -> str:
    """Returns the name in a Host header, without the port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def unprocessable(text: str) -> Refused:
    """Returns the error of a request that is well-formed and wrong."""
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, text)
