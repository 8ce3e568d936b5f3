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
from urllib.parse import SplitResult, urlsplit

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from vidjax.apps.gallery.changes import NotEnrolledError
from vidjax.apps.gallery.gallery import NobodyError
from vidjax.apps.gallery.store import UnreadableError, UnwritableError
from vidjax.utils import files
from vidjax.utils.errors import Expected, InUseError, UserError, of_the_system

LOG = logging.getLogger("vidjax.apps.serve")
LEAST_TOKEN = 16  # letters
# Status of an error that may come before the body is read: it ends the connection.
UNREAD = (400, 401, 403, 404, 405, 413, 415, 429)
PIECE = 1 << 16  # bytes of an answer that are sent at once
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")  # a platform's probes have no token


class Limits(NamedTuple):
    """Limits of a server.

    Attributes:
      body_bytes: of one request, binary; the arrays of an `.npz` may become as much float32.
      json_bytes: of one request in JSON, or of the JSON before binary tensors.
      held_bytes: of all requests and answers that are in memory, together: bodies, the frames that
        they become, with a copy of them, and answers until they are sent.
      clips: of one request.
      frames: of one clip and modality.
      batch_clips: that are scored together, at most.
      waiting_clips: of requests that wait to be scored, or for the vectors to be enrolled.
      waiting_changes: enrolments and removals that wait.
      connections: open at a time.
      answer_seconds: until an answer, from the end of the body on.
      change_seconds: of a change besides, which fits coordinates anew where it must.
      request_seconds: in which a body comes, and again in which an answer is taken.
      idle_seconds: that a connection stays open after an answer.
      drain_seconds: for requests under way, after a signal to end.
      end_seconds: after a signal, until the process ends, whatever it does.
    """

    body_bytes: int = 32 << 20
    json_bytes: int = 4 << 20
    held_bytes: int = 256 << 20
    clips: int = 256
    frames: int = 20_000
    batch_clips: int = 64
    waiting_clips: int = 1024
    waiting_changes: int = 16
    connections: int = 512
    answer_seconds: float = 10.0
    change_seconds: float = 120.0
    request_seconds: float = 130.0
    idle_seconds: float = 30.0
    drain_seconds: float = 15.0
    end_seconds: float = 20.0


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
        self.status, self.text, self.headers = status, one_line(text), dict[str, str]()
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if status == HTTPStatus.UNAUTHORIZED:
            self.headers["www-authenticate"] = "Bearer"
        if status in UNREAD:
            self.headers["connection"] = "close"


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
    """Reads the bodies of requests, and counts the bytes of all that are in memory.

    `scope["vidjax.held"]` are the bytes of one request, and `scope["vidjax.clock"]` is its timeout.
    """

    def __init__(self, limits: Limits):
        self._limits, self._held = limits, 0

    async def read(self, request: Request, limit: int) -> bytes:
        """Returns a body of at most `limit` bytes, chunked or not; Refused if it is larger.

        From its end on, `answer_seconds` are left for the answer.
        """
        headers = request.headers
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body without an encoding")
        if "upgrade" in headers:  # the HTTP parser takes the body for another protocol
            raise Refused(HTTPStatus.BAD_REQUEST, "send the body without the header Upgrade")
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 15 or int(length) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            self.hold(request.scope, size)
            parts.append(part)
        set_clock(request.scope, self._limits.answer_seconds)
        return b"".join(parts)

    def hold(self, scope: Scope, size: int) -> None:
        """Notes that a request takes `size` bytes now; Refused if all take too many."""
        more = size - scope["vidjax.held"]
        if more > 0 and self._held + more > self._limits.held_bytes:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many large requests at once", 1)
        self._held += more
        scope["vidjax.held"] = size


def set_clock(scope: Scope, seconds: float) -> None:
    """Gives a request so many seconds from now on."""
    scope["vidjax.clock"].reschedule(asyncio.get_running_loop().time() + seconds)


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
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; events of the server's life are passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                self._bodies.hold(scope, int(Headers(raw=message["headers"])["content-length"]))
                set_clock(scope, self._limits.request_seconds)
                status = message["status"]
            rest = memoryview(message.get("body", b""))
            while len(rest) > PIECE:  # waits until the client has taken most of the earlier pieces
                piece, rest = bytes(rest[:PIECE]), rest[PIECE:]
                await send({"type": message["type"], "body": piece, "more_body": True})
                message["body"] = bytes(rest[:PIECE])
            await send(message)

        scope["app"] = self._app  # with it, the router raises for an unknown path or method
        scope["vidjax.held"] = 0
        began = asyncio.get_running_loop().time()
        limits, sends = self._limits, scope["method"] == "POST"
        seconds = limits.request_seconds if sends else limits.answer_seconds
        try:
            self._check_sender(scope, Headers(scope=scope))
            async with asyncio.timeout(seconds) as scope["vidjax.clock"]:
                await self._app(scope, receive, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            if status:
                raise ConnectionAbortedError from None  # half an answer is out: cuts it off
            refused = refusal_of(error)
            status = refused.status
            content = msgspec.json.encode({"error": refused.text})
            response = Response(content, status, refused.headers, "application/json")
            await response(scope, receive, send)
        finally:
            self._bodies.hold(scope, 0)
        seconds = asyncio.get_running_loop().time() - began
        path = self._paths.get(scope.get("endpoint"), "other").replace(":path", "")
        self._metrics.requests.labels(path, status).inc()
        self._metrics.seconds.observe(seconds)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        """Refuses a false token, and pages of other sites that a browser on this machine shows."""
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
            raise Refused(HTTPStatus.BAD_REQUEST, "wanted one header Host")
        if self._token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
            if not (right and scheme.lower() == "bearer") and scope["path"] not in OPEN_PATHS:
                raise Refused(HTTPStatus.UNAUTHORIZED, "wanted: Authorization: Bearer TOKEN")
            return
        if not is_loopback(_split(f"//{''.join(hosts)}").hostname or ""):
            raise Refused(HTTPStatus.FORBIDDEN, "the header Host names another machine")
        origin = headers.get("origin")
        other_site = origin is not None and _split(origin).netloc != hosts[0]
        if other_site or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not ask")


def refusal_of(error: Exception) -> Refused:
    """Returns what a client is told of an error; folders and faults of vidjax stay in the log."""
    unavailable = HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        refused = Refused(HTTPStatus(error.status_code), f"{error.detail}: see /openapi.json")
        refused.headers |= error.headers or {}
        return refused
    if isinstance(error, NotEnrolledError):
        return Refused(HTTPStatus.NOT_FOUND, "no such name is enrolled")
    if isinstance(error, NobodyError):
        return Refused(HTTPStatus.CONFLICT, "the gallery has nobody enrolled")
    if isinstance(error, InUseError):
        return Refused(unavailable, "another process changes the gallery", 1)
    if isinstance(error, UnreadableError):
        LOG.error("%s", one_line(str(error)))
        return Refused(unavailable, "the gallery cannot be read: see the log")
    if isinstance(error, UnwritableError):
        LOG.error("%s", one_line(str(error)))
        return Refused(unavailable, "the gallery cannot be changed: see the log")
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


def _place_of(error: Exception) -> str:
    """Returns the kind of an error and the lines of code that it went through, not its message."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
    return f"{type(error).__name__} at {places}"


def _split(address: str) -> SplitResult:
    """Returns the parts of an address; all are empty if it is malformed."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def unprocessable(text: str) -> Refused:
    """Returns the error of a request that is well-formed and wrong."""
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, text)
