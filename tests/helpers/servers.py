"""A server in a separate process, as a user starts it, and a gallery for it."""

import contextlib
import http.client
import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np

from tests.helpers import limits, made_galleries
from tests.helpers.made_galleries import WIDTHS


def make_gallery(folder):
    """Makes a gallery of faces and voices, as `vidjax who` makes them with nets."""
    return made_galleries.make(folder, origin=made_galleries.CARDS)


def make_frames(number, person, frames=1):
    """Returns modality -> features [frames, D] of a clip of a person of `make_gallery`."""
    rows = [made_galleries.make_clip(number + turn, person).vector for turn in range(frames)]
    parts = np.split(np.stack(rows), np.cumsum([*WIDTHS.values()])[:-1], axis=1)
    return dict(zip(WIDTHS, parts, strict=True))


def as_json(clips):
    """Returns clips as the value of `clips` in the JSON of a request."""
    lists = {clip: {k: x.tolist() for k, x in parts.items()} for clip, parts in clips.items()}
    return [{"clip": clip, **parts} for clip, parts in lists.items()]


def enrolment(name, *numbers):
    """Returns the body of a request that enrols the clips `NAME NUMBER` of a person."""
    clips = {f"{name} {n}": make_frames(8000 + n, name) for n in numbers}
    return {"clips": as_json(clips), "identity": name}


class Served:
    """A running server; `ask` sends a request on a new connection."""

    def __init__(self, process, port):
        self.process, self.port = process, port

    def ask(self, method, path, body=None, headers=None) -> tuple[int, Any]:
        """Returns the status and content of an answer. A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.getheader("content-type", "")
            return answer.status, json.loads(content) if "json" in kind else content

    def candidates(self, name, number=9000) -> set[str]:
        """Returns the people with whom the server compares a clip of a person."""
        body = {"clips": as_json({"q": make_frames(number, name)}), "k": 1000}
        status, answer = self.ask("POST", "/identify", body)
        assert status == 200, answer
        return {best["identity"] for best in answer["clips"][0]["best"]}

    def wait(self):
        end = time.monotonic() + 60
        while not self.is_ready():
            assert time.monotonic() < end
            time.sleep(0.02)

    def is_ready(self):
        with contextlib.suppress(OSError):  # a proxy that does not listen yet
            return self.ask("GET", "/v2/health/ready")[0] == 200
        return False

    def end(self):
        """Ends the server by SIGTERM; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def served(folder, *flags, port=0):
    """Runs `vidjax serve`, by default at a free port, in the context; yields the ready server."""
    command = [sys.executable, "-m", "vidjax.main", "serve", f"--gallery={folder}"]
    command += [f"--port={port}", *flags]
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    with limits.running(command, env=env) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        if not line.startswith("http://"):
            raise AssertionError(process.stderr.read())
        server = Served(process, int(line.rsplit(":", 1)[1]))
        server.wait()
        yield server
