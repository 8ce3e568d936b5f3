"""What a stranger may send, and who may ask: sizes, a token, and where a request comes from.

`Guard` stands before the application: it checks the sender, turns errors into answers, and counts
both. `Bodies` reads bodies, and bounds them while they arrive. uvicorn bounds the number of
connections. Slow clients and long headers are left to the proxy that a server in an open net needs
for TLS.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
import stat
import traceback
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from vidjax import files
from vidjax.errors import Expected, InUseError, UserError, of_the_system
from vidjax.gallery.changes import NotEnrolledError
from vidjax.gallery.gallery import NobodyError, UnreadableError

LOG = logging.getLogger("vidjax.serve")
LEAST_TOKEN = 16  # letters
UNREAD = (401, 403, 404, 405, 413, 415, 429)  # status of an error that comes before the body
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")  # a platform's probes have no token


class Limits(NamedTuple):
    """Limits of a server.

    Attributes:
      body_bytes: of one request, binary; an `.npz` may unpack to as much.
      json_bytes: of one request in JSON, or of the JSON before binary tensors.
      held_bytes: of all requests that are read or wait, together.
      clips: of one request.
      batch_clips: that are scored together, at most.
      waiting_clips: of requests that wait to be scored, or for the vectors to be enrolled.
      waiting_changes: enrolments and removals that wait.
      connections: open at a time.
      answer_seconds: until an answer, from the end of the body on.
      change_seconds: the same of a change, which fits coordinates anew where it must.
      request_seconds: from the headers of a request until its answer is sent.
      idle_seconds: that a connection stays open after an answer.
      drain_seconds: for requests under way, after a signal to end.
    """

    body_bytes: int = 32 << 20
    json_bytes: int = 4 << 20
    held_bytes: int = 256 << 20
    clips: int = 256
    batch_clips: int = 64
    waiting_clips: int = 1024
    waiting_changes: int = 16
    connections: int = 512
    answer_seconds: float = 10.0
    change_seconds: float = 120.0
    request_seconds: float = 130.0
    idle_seconds: float = 30.0
    drain_seconds: float = 20.0


class Metrics:
    """Counters of a server for Prometheus; no name of a person or clip is in them.

    The `route` of a request is a pattern of the application, such as `/clips/{name}`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "vidjax", "registry": self.registry}
        about = "Requests that got an answer."
        self.requests = Counter("requests", about, ["route", "code"], **own)
        self.seconds = Histogram("request_seconds", "Seconds until the answer.", **own)
        about, sizes = "Clips that were scored together.", [2**n for n in range(9)]
        self.clips = Histogram("batch_clips", about, buckets=sizes, **own)


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


def is_loopback(host: str) -> bool:
    """Returns True if only programs of this machine reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Bodies:
    """Reads the bodies of requests, and counts the bytes of all that are in memory."""

    def __init__(self, limits: Limits):
        self._most, self._held = limits.held_bytes, 0

    async def read(self, request: Request, limit: int) -> bytes:
        """Returns a body of at most `limit` bytes, chunked or not; Refused if it is larger."""
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 15 or int(length) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        async for part in request.stream():
            self._held += len(part)
            request.scope["vidjax.held"] += len(part)
            if request.scope["vidjax.held"] > limit:
                raise _too_large(limit)
            if self._held > self._most:
                raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many large requests at once", 1)
            parts.append(part)
        return b"".join(parts)

    def release(self, scope: Scope) -> None:
        """Forgets the body of a request that is answered."""
        self._held -= scope["vidjax.held"]


def _too_large(limit: int) -> Refused:
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has {limit:,} bytes at most")


class Guard:
    """An ASGI application that checks the sender of a request, and counts and bounds the answers.

    Every error of the router becomes an answer, `{"error": LINE}`.
    """

    def __init__(
        self, app: Router, bodies: Bodies, limits: Limits, metrics: Metrics, token: bytes | None
    ):
        self.routes = app.routes
        self._paths = {route.endpoint: route.path for route in reversed(app.routes)}  # pyright: ignore
        self._app, self._bodies, self._limits, self._metrics = app, bodies, limits, metrics
        self._token = None if token is None else b"Bearer " + token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; events of the server's life are passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope["app"] = self._app  # with it, the router raises for an unknown path or method
        scope["vidjax.held"] = 0
        began = asyncio.get_running_loop().time()
        try:
            self._check_sender(scope["path"], Headers(scope=scope))
            async with asyncio.timeout(self._limits.request_seconds):
                await self._app(scope, receive, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            if status:
                raise ConnectionAbortedError from None  # half an answer is out: cuts it off
            await _error_response(refusal_of(error))(scope, receive, answer)
        finally:
            self._bodies.release(scope)
        seconds = asyncio.get_running_loop().time() - began
        path = self._paths.get(scope.get("endpoint"), "other").replace(":path", "")
        self._metrics.requests.labels(path, status).inc()
        self._metrics.seconds.observe(seconds)

    def _check_sender(self, path: str, headers: Headers) -> None:
        """Refuses a false token, and pages of other sites that a browser on this machine shows."""
        if self._token is not None:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._token) and path not in OPEN_PATHS:
                raise Refused(HTTPStatus.UNAUTHORIZED, "wanted: Authorization: Bearer TOKEN")
            return
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if not is_loopback(_hostname(host)):
            raise Refused(HTTPStatus.FORBIDDEN, "the header Host names another machine")
        if origin and origin.rpartition("//")[2] != host:
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not ask")


def refusal_of(error: Exception) -> Refused:
    """Returns what a client is told of an error; folders and faults of vidjax stay in the log."""
    unavailable = HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        return Refused(HTTPStatus(error.status_code), f"{error.detail}: see /openapi.json")
    if isinstance(error, NotEnrolledError):
        return Refused(HTTPStatus.NOT_FOUND, "no such name is enrolled")
    if isinstance(error, NobodyError):
        return Refused(HTTPStatus.CONFLICT, "the gallery has nobody enrolled")
    if isinstance(error, InUseError):
        return Refused(unavailable, "another process changes the gallery", 1)
    if isinstance(error, UnreadableError):
        LOG.error("%s", one_line(str(error)))
        return Refused(unavailable, "the gallery is damaged: see the log")
    if isinstance(error, UserError):
        return unprocessable(str(error))
    if isinstance(error, TimeoutError):
        return Refused(unavailable, "no answer in time", 1)
    if text := of_the_system(error):
        LOG.error("%s", one_line(text))
        status = HTTPStatus.INSUFFICIENT_STORAGE
        return Refused(status, "the gallery cannot be written: see the log", 10)
    LOG.error("internal error: %s", _place_of(error))
    return Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")


def _error_response(error: Refused) -> Response:
    """Returns `{"error": LINE}`; it ends the connection if the body may not have been read."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if error.status in UNREAD:
        headers["connection"] = "close"
    content = msgspec.json.encode({"error": error.text})
    return Response(content, error.status, headers, "application/json")


def _place_of(error: Exception) -> str:
    """Returns the kind of an error and the lines of code that it went through, not its message."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
    return f"{type(error).__name__} at {places}"


def _hostname(host: str) -> str:
    """Returns the name in a Host header, without the port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def unprocessable(text: str) -> Refused:
    """Returns the error of a request that is well-formed and wrong."""
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, text)
