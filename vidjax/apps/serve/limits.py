"""Limits the size of requests, checks who has sent them, and counts them.

The web server uvicorn limits the number of connections, but not slow clients and long headers. On
an open network, the server needs a proxy for TLS. The proxy must limit slow clients and long
headers.
"""

import asyncio
import hmac
import logging
import os
import re
import shlex
import stat
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from vidjax.apps import web
from vidjax.apps.gallery.answers import NobodyError
from vidjax.apps.gallery.changes import NotEnrolledError
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import (
    ResultError,
    UncertainWriteError,
    UnreadableError,
    UnwritableError,
)
from vidjax.apps.server_limits import Limits
from vidjax.utils import files
from vidjax.utils.errors import Expected, InUseError, UserError, describe_system_error

LOG = logging.getLogger("vidjax.apps.serve")
ACCESS = logging.getLogger("vidjax.apps.serve.access")  # a line of JSON for each request
REQUEST_ID_FORM = re.compile(r"[\w.-]{1,64}", re.ASCII)
CLIENT_GONE = 499  # the status, in counters and logs, of a request whose client has gone
MIN_TOKEN_LETTERS = 16
# Errors with these statuses may be sent before the body was read, so they end the connection.
ENDING_STATUSES = (400, 401, 403, 404, 405, 413, 415, 429)
CHANGED = "vidjax.changed"  # a key of the scope of a request that has changed the gallery
PIECE_BYTES = 1 << 16  # largest part of an answer that is sent at once
SEE_LOG, LOGGED = ": see the log", "%s (request %s)"
# Type of an error -> status and text of the answer, and seconds until the client may try again.
REFUSALS: dict[type[Exception], tuple[int, str, int | None]] = {
    NotEnrolledError: (404, "no such name is enrolled", None),
    NobodyError: (409, "nobody is enrolled in the gallery: enrol clips", None),
    InUseError: (503, "another process is changing the gallery: try again", 1),
    UnreadableError: (503, "the gallery cannot be read" + SEE_LOG, None),
    UnwritableError: (503, "the gallery cannot be changed" + SEE_LOG, None),
    UncertainWriteError: (507, "the gallery was changed, but its disk fails" + SEE_LOG, 10),
    PermissionError: (503, "the gallery cannot be used" + SEE_LOG, None),
    TimeoutError: (503, "the answer took too long: try again", 1),
}
# Platforms such as Kubernetes ask these paths without a token.
OPEN_PATHS = (web.LIVE, "/v2/health/ready")


class ServerMetrics:
    """Counters for Prometheus. They contain no names of people or clips."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "vidjax", "registry": self.registry}
        about = f"Requests. Code {CLIENT_GONE}: the client has gone."
        self.requests = Counter("requests", about, ["route", "code"], **shared)
        about = "Seconds from request to answer."
        self.seconds = Histogram("request_seconds", about, ["route"], **shared)
        about, sizes = "Clips that were scored together.", [2**n for n in range(9)]
        self.clips = Histogram("batch_clips", about, buckets=sizes, **shared)


class Refused(Expected):
    """An error that the server sends to a client, with the HTTP status `status`.

    The client may try again after `retry_after` seconds. If `retry_after` is None, a second try
    cannot help. `text` describes the error, and `place` says which part of the request has the
    error. The client gets both. The log gets only `text`, because `place` may contain names of
    people.
    """

    def __init__(self, status: int, text: str, retry_after: int | None = None, place: str = ""):
        super().__init__(place + text)
        self.status, self.text, self.reason = status, one_line(place + text), text
        self.headers = dict[str, str]()
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        if status in ENDING_STATUSES:
            self.headers["connection"] = "close"


def one_line(text: str) -> str:
    """Joins the lines of a message with "; ", and cuts the result after 300 letters."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= 300 else line[:300] + "..."


def read_token(path: Path) -> bytes:
    """Reads the token, the secret that clients must send, from a file or a link to a file.

    Raises UserError if the token is not a word of 16 letters or more, or if other users may read
    the file. If another user owns the file, as in Kubernetes, the group may read it.
    """
    with files.open_input(path) as file:
        status = os.fstat(file.fileno())
        content = file.read(4096)
    others = stat.S_IRWXO | (stat.S_IRWXG if status.st_uid == os.geteuid() else 0)
    if status.st_mode & others:
        raise UserError(
            f"'{path}' can be read by other users\n"
            f"run chmod 600 {shlex.quote(str(path))}; "
            "for a secret of Kubernetes, set defaultMode: 0400"
        )
    token = content.strip()
    if len(token) < MIN_TOKEN_LETTERS or not token.isascii() or len(token.split()) != 1:
        raise UserError(
            f"'{path}' must contain a token, one ASCII word of length {MIN_TOKEN_LETTERS} or more\n"
            f"make one: (umask 077; openssl rand -hex 32 > {shlex.quote(str(path))})"
        )
    return token


class Bodies:
    """Reads the bodies of requests, and limits the memory of all requests together.

    The ASGI scope of a request must contain `vidjax.held`, the bytes that the request takes in
    memory, and `vidjax.clock`, its `asyncio.Timeout`. `Guard` sets both.
    """

    def __init__(self, limits: Limits):
        self._limits, self._held = limits, 0

    async def read(self, request: Request, limit: int) -> bytes:
        """Reads the body of a request, and starts a new time limit, `answer_seconds`.

        Raises Refused if the body has more than `limit` bytes, if the request has a header
        Content-Encoding or Upgrade, or if all requests together take too much memory.
        """
        headers = request.headers
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refused(415, "send the body without Content-Encoding")
        if "upgrade" in headers:  # the HTTP parser then takes the body for another protocol
            raise Refused(400, "send the body without the header Upgrade")
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
        """Records that a request takes `size` bytes of memory in total. `scope` is its ASGI scope.

        Raises Refused (HTTP status 429) if all requests together take too much memory. A request
        that has changed the gallery is never refused, because the client would send the change
        again.
        """
        more = size - scope["vidjax.held"]
        if more > 0 and self._held + more > self._limits.held_bytes and not scope.get(CHANGED):
            raise Refused(429, "all requests together take too much memory: try again", 1)
        self._held += more
        scope["vidjax.held"] = size


def set_clock(scope: Scope, seconds: float) -> None:
    """Sets a new time limit for a request: `seconds` seconds from now.

    `scope` is the ASGI scope of the request.
    """
    scope["vidjax.clock"].reschedule(asyncio.get_running_loop().time() + seconds)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body is too large: send at most {limit:,} bytes")


class Guard:
    """An ASGI application that checks requests before a router answers them.

    It checks the sender of each request, limits the time and memory of answers, and counts the
    requests. Every error becomes an answer `{"error": "one line"}`.
    """

    def __init__(self, router: Router, gallery: Gallery, limits: Limits, token: bytes | None):
        self.leaving = threading.Event()  # set when the server will end
        self.gallery, self.limits, self.metrics = gallery, limits, ServerMetrics()
        self.bodies = Bodies(limits)
        self._router, self._token = router, token
        self._paths = {route.endpoint: route.path for route in reversed(router.routes)}  # pyright: ignore

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes ASGI events to the application. An HTTP request is checked first."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        status, reason, headers = 0, "", Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID_FORM.fullmatch(given) else os.urandom(8).hex()
        more = {"x-request-id": request_id}
        if self.leaving.is_set():  # so that the client's next connection is to another server
            more["connection"] = "close"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                message["headers"] += [(x.encode(), y.encode()) for x, y in more.items()]
                self.bodies.hold(scope, int(Headers(raw=message["headers"])["content-length"]))
                set_clock(scope, self.limits.request_seconds)
                status = message["status"]
            rest = memoryview(message.get("body", b""))
            while len(rest) > PIECE_BYTES:  # `send` waits until the client has read earlier parts
                piece, rest = bytes(rest[:PIECE_BYTES]), rest[PIECE_BYTES:]
                await send({"type": message["type"], "body": piece, "more_body": True})
                message["body"] = bytes(rest[:PIECE_BYTES])
            await send(message)

        scope["app"] = self._router  # makes the router raise an error for an unknown path or method
        scope["vidjax.held"] = scope["vidjax.clips"] = 0
        began = asyncio.get_running_loop().time()
        limits, sends = self.limits, scope["method"] == "POST"
        seconds = limits.request_seconds if sends else limits.answer_seconds
        try:
            self._check_sender(scope, headers)
            async with asyncio.timeout(seconds) as scope["vidjax.clock"]:
                await self._router(scope, receive, answer)
        except ClientDisconnect:
            status = status or CLIENT_GONE
        except Exception as error:
            # If a part of the answer is already sent, uvicorn closes the connection.
            if not status:
                refused = to_refusal(error, request_id)
                # The traceback and the error refer to each other. The body would stay in memory
                # until Python searches for such cycles.
                error.__traceback__ = None
                status, reason = refused.status, refused.reason
                content = msgspec.json.encode({"error": refused.text})
                response = Response(content, status, refused.headers | more, "application/json")
                await response(scope, receive, send)
        finally:
            self.bodies.hold(scope, 0)
        seconds = asyncio.get_running_loop().time() - began
        self._record(scope, request_id, status, reason, seconds)

    def _record(
        self, scope: Scope, request_id: str, status: int, reason: str, seconds: float
    ) -> None:
        """Counts a request, and writes it to the log. The log contains no name, token or body.

        `status` is the HTTP status of the answer, and `reason` its error, or "".
        """
        path = self._paths.get(scope.get("endpoint"), "other").replace(":path", "")
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        if ACCESS.isEnabledFor(logging.INFO):
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "method": scope["method"],
                "route": path,
                "status": status,
                "ms": round(1000 * seconds, 1),
                "clips": scope["vidjax.clips"],
                "gallery": self.gallery.version,
                "model": self.gallery.origin.digest[:12],
            }
            line |= {"reason": reason} if reason else {}
            ACCESS.info("%s", msgspec.json.encode(line).decode())

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        """Raises Refused if the sender may not use the server.

        If the server has a token, a request must contain the token, except for the paths
        OPEN_PATHS. If the server has no token, the header Host must name this machine, and the
        request must not come from a web page of another site.
        """
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
            raise Refused(400, "the header Host is missing or repeated: send a single header Host")
        if self._token is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(token.strip().encode("latin-1"), self._token)
            if not (is_right and scheme.lower() == "bearer") and scope["path"] not in OPEN_PATHS:
                raise Refused(401, "send the header Authorization: Bearer TOKEN")
            return
        if not web.is_local(headers):
            raise Refused(403, "the header Host names another machine: send requests to localhost")
        if not web.is_same_site(headers):
            text = "a web page of another site sent this request: open the address of the server"
            raise Refused(403, text)


def to_refusal(error: Exception, request_id: str) -> Refused:
    """Converts an exception to the error that is sent to the client.

    If the request has caused the exception, the client gets the message of the exception. The
    messages of other exceptions may contain paths or names of people, so the client gets a general
    text instead. The log then gets more about the error, and the id of the request.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, ResultError):
        refused = Refused(409, str(error))
        refused.reason = "the gallery is a result of another command"  # the message has a path
        return refused
    if isinstance(error, HTTPException):
        refused = Refused(error.status_code, f"{error.detail}: see /openapi.json")
        refused.headers |= error.headers or {}
        return refused
    for kind, (status, text, retry_after) in REFUSALS.items():
        if isinstance(error, kind):
            if text.endswith(SEE_LOG):
                LOG.error(LOGGED, one_line(str(error)), request_id)
            return Refused(status, text, retry_after)
    # Messages may contain names of people, so the log gets the place of the error instead.
    frames = [*traceback.walk_tb(error.__traceback__)][-1:-5:-1]
    places = (f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in frames)
    reason = f"{type(error).__name__} at {' < '.join(places)}"
    if isinstance(error, UserError):
        refused = Refused(422, str(error))
        refused.reason = reason
        return refused
    if text := describe_system_error(error):
        LOG.error(LOGGED, one_line(text), request_id)
        return Refused(507, f"the gallery cannot be written{SEE_LOG}", 10)
    LOG.error(LOGGED, f"internal error: {reason}", request_id)
    return Refused(500, f"internal error{SEE_LOG}")
