"""uvicorn's connection, bounded before a request is one."""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vidjax.serve.limits import Limits


def connection_class(limits: Limits) -> type[HttpToolsProtocol]:
    """Returns uvicorn's protocol with limits on what comes before the application sees a request.

    uvicorn itself lets a new connection wait for ever, and headers grow without end: those of a
    request whose predecessor is still answered, and what follows the last chunk of a body, too.
    """

    class Connection(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _header_bytes = 0  # received since the last end of headers, or part of a body
        _refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
            if len(self.connections) >= limits.connections:
                self._refused, self.transport = True, transport
                self._close(HTTPStatus.SERVICE_UNAVAILABLE)
                return
            super().connection_made(transport)
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            if self._refused or self.transport.is_closing():
                return
            if self._timer is None and self._between_requests():
                self._await_headers()
            self._header_bytes += len(data)
            super().data_received(data)
            if self._header_bytes > limits.header_bytes:
                self._close(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

        def on_headers_complete(self) -> None:
            self._forget_timer()
            self._header_bytes = 0
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > limits.header_bytes:  # of one piece, or behind another request in a piece
                self._close(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                raise OverflowError  # which ends the parser
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._header_bytes = 0
            super().on_body(body)

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_timer()
            if not self._refused:
                super().connection_lost(exc)

        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _await_headers(self) -> None:
            self._timer = self.loop.call_later(limits.header_seconds, self._too_slow)

        def _too_slow(self) -> None:
            self._timer = None
            self._close(HTTPStatus.REQUEST_TIMEOUT)

        def _forget_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self, status: HTTPStatus) -> None:
            self._forget_timer()
            if self.transport.is_closing():
                return
            if self._between_requests():  # or it would pass for the answer to another one
                head = f"HTTP/1.1 {status.value} {status.phrase}\r\n"
                rest = "connection: close\r\ncontent-length: 0\r\n\r\n"
                self.transport.write((head + rest).encode())
            self.transport.close()

    return Connection
