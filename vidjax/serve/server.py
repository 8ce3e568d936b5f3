"""Runs the application until a signal; then answers what it has read, and nobody else."""

import gc
import logging
import signal
import socket

import uvicorn

from vidjax.errors import UserError
from vidjax.serve.limits import Guard, Limits

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; port 0 is any free one. UserError if it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port}: {error.strerror}\nname another --host or --port"
        ) from None
    return listener


def make_config(app: Guard, limits: Limits) -> uvicorn.Config:
    """Returns uvicorn's settings."""
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        backlog=min(2 * limits.connections, 1024),
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(limits.drain_seconds),
    )


def serve(app: Guard, listener: socket.socket, limits: Limits) -> bool:
    """Answers requests until SIGINT or SIGTERM; returns False if requests were cut off."""
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)  # warnings about strangers' requests
    gc.freeze()  # modules and people live on: no collection looks at them
    server = uvicorn.Server(make_config(app, limits))
    # uvicorn handles a signal, and raises it again when all is answered: then it does nothing.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return server.started and not server.force_exit
