"""Measures `vidjax serve`, and a server that answers one request at a time.

    python -m tests.benchmarks.serve [--people=20000] [--clients=32] [--seconds=60]

Each client sends a clip, a frame of 512 numbers in an `.npz`, and waits for the answer before it
sends the next clip. One clip in five shows a stranger. Clients and servers run on the same
machine, which must be idle. The script prints a line of JSON for each server.
"""

import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from tests.benchmarks import common, gallery
from tests.helpers import limits, servers
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip

ANSWER = re.compile(rb"HTTP/1\.1 200 .*\ncontent-length: *([0-9]+)", re.IGNORECASE | re.DOTALL)
PLAIN = """\
import io, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
from vidjax import Gallery
people = Gallery(sys.argv[1])
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        clip = dict(np.load(io.BytesIO(body)))
        answer = people.identify({"clip": clip})["clip"]
        content = json.dumps({"identity": answer.identity, "best": answer.best}).encode()
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


def make_request(vector: np.ndarray) -> bytes:
    """Returns the bytes of a request that identifies a vector."""
    np.savez(file := io.BytesIO(), face=vector[None])
    body = file.getvalue()
    headers = (
        "POST /identify?clip=clip HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/x-npz\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return headers.encode() + body


async def run_client(port: int, requests: Sequence[bytes], end: float) -> list[float]:
    """Sends requests until the time `end`; returns the seconds until each answer.

    An error ends the client. The last number is then NaN.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    with contextlib.closing(writer), contextlib.suppress(OSError, EOFError):
        for request in itertools.cycle(requests):
            times.append(np.nan)
            start = time.perf_counter()
            writer.write(request)
            match = ANSWER.match(await reader.readuntil(b"\r\n\r\n"))
            if not match:
                break
            await reader.readexactly(int(match[1]))
            now = time.perf_counter()
            times[-1] = now - start
            if now >= end:
                break
    return times


def load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> dict[str, float]:
    async def run() -> list[list[float]]:
        end, parts = time.perf_counter() + seconds, [requests[n::clients] for n in range(clients)]
        return await asyncio.gather(*(run_client(port, part, end) for part in parts))

    start, cpu_start = time.perf_counter(), time.process_time()
    times = np.array([*itertools.chain(*uvloop.run(run()))])
    spent, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    p50, p99 = (1000 * np.nanpercentile(times, [50, 99])).tolist()
    count, errors = len(times), int(np.isnan(times).sum())
    figures = {"requests": count, "per_second": count / spent, "p50_ms": p50, "p99_ms": p99}
    return figures | {"errors": errors, "client_cpu_ms": 1000 * cpu_seconds / count}


def measure(words: Any, requests: Any, clients: int, seconds: float) -> dict[str, float]:
    """Starts a server by `python WORDS`, which prints its address; returns all figures."""
    with limits.running([sys.executable, *words], stderr=None) as process:
        assert process.stdout
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        if "serve" in words:
            servers.Served(process, port).wait()
        load(port, requests, clients, min(2, seconds))  # fills caches
        cpu_start = read_cpu_seconds(process.pid)
        figures = load(port, requests, clients, seconds)
        cpu_seconds = read_cpu_seconds(process.pid) - cpu_start
        return figures | {"server_cpu_ms": 1000 * cpu_seconds / figures["requests"]}


def read_cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    args = common.parse(__doc__, people=20_000, clients=32, seconds=60.0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "gallery"
        centres = rng.standard_normal((args.people, gallery.WIDTH), np.float32)
        vectors = enumerate(gallery.near(centres, rng))
        clips = {f"clip_{n:07}": StoredClip(f"person_{n:07}", row) for n, row in vectors}
        Gallery.of_clips(folder, gallery.CARDS, gallery.make_front(["face"], rng), clips)
        shown = centres[rng.integers(0, args.people, 512)]
        shown[::5] = rng.standard_normal(shown[::5].shape, np.float32)  # strangers
        requests = [make_request(vector) for vector in gallery.near(shown, rng)]
        own = ["-m", "vidjax.main", "serve", f"--gallery={folder}", "--port=0"]
        for name, words in {"serve": own, "plain": ["-c", PLAIN, str(folder)]}.items():
            figures = measure(words, requests, args.clients, args.seconds)
            common.print_text(json.dumps({"server": name, **figures}))
