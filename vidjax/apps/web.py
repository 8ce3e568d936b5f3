"""Runs a web application until a signal arrives, and recognises requests from this machine.

The server of galleries and the page on which a user corrects names use these functions.
"""

import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from urllib.parse import SplitResult, urlsplit

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vidjax.apps.server_limits import Limits
from vidjax.utils.errors import UserError

LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEFAULTS = Limits()
FULL = PlainTextResponse("Service Unavailable", 503, {"connection": "close"})
LIVE = "/v2/health/live"  # platforms restart a server that does not answer this path


def is_loopback(host: str) -> bool:
    """Returns True if only programs on this machine can reach a server at the address `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def is_local(headers: Headers) -> bool:
    """Returns whether a request has exactly one header Host, which names this machine."""
    hosts = headers.getlist("host")
    return len(hosts) == 1 and is_loopback(_split(f"//{hosts[0]}").hostname or "")


def is_same_site(headers: Headers) -> bool:
    """Returns False if a web page of another site has sent the request with these headers."""
    origin = headers.get("origin")
    same_origin = origin is None or _split(origin).netloc == headers.get("host")
    return same_origin and headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def _split(address: str) -> SplitResult:
    with contextlib.suppress(ValueError):
        return urlsplit(address)
    return urlsplit("")


def listen(host: str, port: int, limits: Limits = DEFAULTS) -> socket.socket:
    """Opens a socket that listens at an address. Port 0 stands for any free port.

    Raises UserError if the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6  # an address such as `::` also takes requests of IPv4
        listener = socket.create_server(address, family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the host is too long
        reason = str(error.strerror).partition(" (")[0] if isinstance(error, OSError) else error
        raise UserError(
            f"cannot listen at {host}:{port}: {reason}\nname another --host or --port"
        ) from None
    # Closes connections whose clients read nothing. The unit is a millisecond.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * limits.unread_seconds)
    return listener


class Server(uvicorn.Server):
    """A uvicorn server that ends after a signal, even if a thread hangs.

    While too many connections are open, requests get the status 503. Only requests to the path
    LIVE, with which a platform checks that the server works, are always answered.

    The signal sets the event `leaving`. After `limits.unready_seconds`, or at a second signal, the
    server stops accepting requests. Requests that have arrived are still answered.
    """

    def __init__(self, app: ASGIApp, limits: Limits, leaving: threading.Event):
        super().__init__(
            uvicorn.Config(
                self._answer, interface="asgi3", ws="none", lifespan="on", log_config=None,
                access_log=False, server_header=False, proxy_headers=False,
                headers=[("x-content-type-options", "nosniff")],
                backlog=min(2 * limits.connections, 1024),
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=limits.drain_seconds,
            )
        )  # fmt: skip
        self._app, self._most = app, limits.connections
        self._leaving, self._unready_seconds = leaving, limits.unready_seconds
        self._end = _make_timer(limits.drain_seconds + limits.end_seconds, self._give_up)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_full = len(self.server_state.connections) >= self._most
        refuses = is_full and scope["type"] == "http" and scope["path"] != LIVE
        await (FULL if refuses else self._app)(scope, receive, send)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal, such as SIGTERM, that asks the server to end. See the class."""
        if self._unready_seconds and not self._leaving.is_set():
            _make_timer(self._unready_seconds, self._stop).start()
        elif self.should_exit:
            super().handle_exit(sig, frame)  # uvicorn cuts off the requests at a second SIGINT
        else:
            self._stop()
        self._leaving.set()

    def _stop(self) -> None:
        if not self.should_exit:
            self.should_exit = True
            self._end.start()

    def _give_up(self) -> None:
        LOG.error("the server has ended before its work was finished: repeat unanswered requests")
        os._exit(1)  # the next process undoes an unfinished change


def _make_timer(seconds: float, function: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    return timer


def serve(
    app: ASGIApp,
    listener: socket.socket,
    limits: Limits = DEFAULTS,
    leaving: threading.Event | None = None,
) -> bool:
    """Answers requests at the socket `listener` until SIGINT or SIGTERM arrives.

    The signal sets the event `leaving`, so that `app` can report that the server will end soon.
    Returns True if all requests were answered. Returns False if the server could not start, or has
    cut off requests. If a thread hangs after the signal, the process ends with exit code 1.
    """
    for name in ("uvicorn", "uvicorn.error"):  # their warnings would let any client fill the log
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.freeze()  # modules and people stay in memory, so the garbage collector may skip them
    server = Server(app, limits, leaving or threading.Event())
    # uvicorn raises a signal again after the last answer. The second signal must do nothing.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return server.started and not server.force_exit
