"""Identifications a second of `vidjax serve`, and of a server that answers one request at a time.

    python -m tests.benchmarks.serve [--people=20000] [--clients=32] [--seconds=60]

Each client sends one clip, one frame of 512 as a binary tensor, waits for its answer and sends the
next clip. One clip in five shows a stranger. Clients and server share the machine, which must be
idle: `server_cpu_ms` and `client_cpu_ms` are processor times of a request. The other server is
`PLAIN`: Python's http.server, and the same gallery. The figures are printed as JSON lines.
"""

import asyncio
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvloop

from tests.benchmarks import common
from tests.benchmarks import gallery as made
from tests.helpers import limits, servers
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip

LENGTH = re.compile(rb"\ncontent-length: *([0-9]+)", re.IGNORECASE)
PLAIN = """\
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
from vidjax import Gallery
people = Gallery(sys.argv[1])
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        x = np.frombuffer(body[-2048:], np.float32)[None]
        found = people.identify({"clip": {"face": x}})["clip"]
        content = json.dumps({"identity": found.identity, "best": found.best}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *words):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def request_of(vector: np.ndarray) -> bytes:
    """Returns a request of the Open Inference Protocol, headers and body."""
    binary = {"binary_data_size": 4 * len(vector)}
    tensor = {"name": "face", "shape": [1, 1, len(vector)], "datatype": "FP32"}
    outputs = [{"name": x, "parameters": {"binary_data": True}} for x in ("identity", "scores")]
    content = {"inputs": [tensor | {"parameters": binary}], "outputs": outputs}
    head = json.dumps(content).encode()
    body = head + vector.astype("<f4").tobytes()
    return (
        "POST /v2/models/gallery/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class Client(asyncio.Protocol):
    """Sends one request after another until `end`; notes the time of each answer, and errors."""

    def __init__(self, requests: Sequence[bytes], end: float, done: asyncio.Future[None]):
        self.times: list[float] = []
        self.errors: list[bytes] = []
        self._requests, self._end, self.done = itertools.cycle(requests), end, done

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._read, self._began = b"", time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Checks an answer once it is there, body and all, and sends the next request."""
        self._read += data
        head, end, body = self._read.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not end or (length and len(body) < int(length[1])):
            return
        now = time.perf_counter()
        self.times.append(now - self._began)
        if not head.startswith(b"HTTP/1.1 200 ") or not length or len(body) > int(length[1]):
            self.errors.append(head[:15])
        if now < self._end:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc or time.perf_counter() < self._end:  # an answer did not come
            self.errors.append(b"hung up")
        self.done.set_result(None)


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Returns requests a second, times in milliseconds, the number of errors, and its own cost."""

    async def run() -> list[Client]:
        loop, end = asyncio.get_running_loop(), time.perf_counter() + seconds
        made = [Client(requests[n::clients], end, loop.create_future()) for n in range(clients)]
        for one in made:
            await loop.create_connection(lambda one=one: one, "127.0.0.1", port)
        await asyncio.gather(*(one.done for one in made))
        return made

    began, before = time.perf_counter(), time.process_time()
    done = uvloop.run(run())
    spent, cpu = time.perf_counter() - began, time.process_time() - before
    times = [one for client in done for one in client.times]
    p50, p99 = (1000 * float(np.percentile(times, q)) for q in (50, 99))
    found = {"requests": len(times), "per_second": len(times) / spent, "p50_ms": p50, "p99_ms": p99}
    errors = sum(len(client.errors) for client in done)
    return found | {"errors": errors, "client_cpu_ms": 1000 * cpu / len(times)}


def measure(words: Sequence[str], requests: Sequence[bytes], clients: int, seconds: float) -> dict:
    """Starts a server by a command that prints its address, and loads it."""
    with limits.running([sys.executable, *words], stderr=None) as process:
        assert process.stdout
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        if "serve" in words:
            servers.Served(process, port).wait()
        load(port, requests, clients, min(2, seconds))
        before = cpu_seconds(process.pid)
        found = load(port, requests, clients, seconds)
        cpu = cpu_seconds(process.pid) - before
        return found | {"server_cpu_ms": 1000 * cpu / found["requests"]}


def main() -> None:
    args = common.parse(__doc__, people=20_000, clients=32, seconds=60.0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "gallery"
        centres = rng.standard_normal((args.people, made.WIDTH), np.float32)
        rows = made.near(centres, rng)
        clips = {f"clip_{n:07}": StoredClip(f"person_{n:07}", row) for n, row in enumerate(rows)}
        Gallery.of_clips(folder, made.CARDS, made.make_front(["face"], rng), clips)
        shown = made.near(centres[rng.integers(0, args.people, 512)], rng)
        shown[::5] = made.near(rng.standard_normal((len(shown[::5]), made.WIDTH), np.float32), rng)
        requests = [request_of(row) for row in shown]
        own = ["-m", "vidjax.main", "serve", f"--gallery={folder}", "--port=0"]
        for name, words in (("serve", own), ("plain", ["-c", PLAIN, str(folder)])):
            found = measure(words, requests, args.clients, args.seconds)
            common.say(json.dumps({"server": name, **found}))


if __name__ == "__main__":
    main()
