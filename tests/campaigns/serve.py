"""A server under attack: hostile requests, kills while it changes people, thousands of connections.

    python -m tests.campaigns.serve FOLDER [--requests=2000] [--seconds=600] [--every=20]
        [--connections=10000] [--seed=0]

Requests are right ones with a seeded mutation: other sizes, types and numbers, deep JSON, half
bodies, false lengths, broken headers. Each must get an answer below 500 (or none, if it is no HTTP)
in time; a right request between them gets the right answer, and the memory stays level. Then a
SIGKILL hits the server every few seconds while clients enrol, remove and identify: what was
answered must be there, who was removed must not be named. `--connections` are opened and kept, as
many as the limit of open files allows: those beyond the server's limit are refused, and when they
are gone it answers again.
"""

import argparse
import contextlib
import json
import random
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import servers
from vidjax.gallery.gallery import Gallery

SECONDS = 25.0  # of the slowest answer: a body that does not come, and then some
SLOW = 0.01  # share of requests that wait for a limit of time


def right(rng: random.Random) -> bytes:
    """Returns a request that gets a 200."""
    clips = {"q": servers.make_frames(rng.randrange(10**6), f"person {rng.randrange(12)}")}
    if rng.random() < 0.5:
        body = json.dumps({"clips": servers.as_json(clips)}).encode()
        return _request("/identify", body, ["Content-Type: application/json"])
    face = clips["q"]["face"][None].astype("<f4")
    tensor = {"name": "face", "shape": list(face.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": face.nbytes}
    head = json.dumps({"inputs": [tensor]}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return _request("/v2/models/gallery/infer", head + face.tobytes(), [length])


def _request(path: str, body: bytes, headers: Sequence[str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def mutated(rng: random.Random) -> bytes:
    """Returns a request with something wrong, mostly."""
    head, _, body = right(rng).partition(b"\r\n\r\n")
    kind = rng.randrange(9)
    if kind == 0:  # bytes of the body
        changed = bytearray(body)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        body = bytes(changed)
    elif kind == 1:  # a number
        body = body.replace(
            b"0.", rng.choice([b"NaN", b"-1e999", b"1e39", b'"0"', b"[0", b"{}"]), 1
        )
    elif kind == 2:  # a size
        body = body.replace(b"[1, 1, 8]", rng.choice([b"[]", b"[-1]", b"[9999999999]", b"[1,2,8]"]))
    elif kind == 3:  # a type
        body = body.replace(b"FP32", rng.choice([b"FP64", b"BYTES", b"INT8", b"\xff", b"null"]))
    elif kind == 4:  # depth
        body = rng.choice([b"[", b'{"a":', b'{"clips":[']) * rng.randrange(1, 50_000)
    elif kind == 5:  # half a body, or too much
        body = body[: rng.randrange(len(body))] if rng.random() < 0.5 else body * 3
    elif kind == 6:  # headers
        head = head.replace(b"Host", rng.choice([b"Ho st", b"X" * 50_000, b"\0", b"Origin"]), 1)
    elif kind == 7:  # the method and the path
        line = rng.choice(
            [b"GET / HTTP/9", b"DELETE /clips/" + b"a" * 3000 + b" HTTP/1.1", b"\xff"]
        )
        head = line + head[head.index(b"\r\n") :]
    else:  # random bytes
        return rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n"
    if kind != 5 or rng.random() > SLOW:  # the length is right, so that the body is looked at
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
        head = b"\r\n".join([*lines, b"Content-Length: %d" % len(body)])
    return head + b"\r\n\r\n" + body


def send(port: int, content: bytes) -> int:
    """Sends bytes; returns the status of the answer, 0 if the server only hung up.

    Raises:
      TimeoutError: neither came.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as one:
        answer = b""
        with contextlib.suppress(ConnectionError):
            one.sendall(content)
            one.shutdown(socket.SHUT_WR)
            while part := one.recv(1 << 16):
                answer += part
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def memory(server: servers.Served) -> int:
    """Returns the MiB of a server's memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) >> 10


def attack(folder: Path, count: int, seed: int) -> tuple[Counter[int], list[int]]:
    """Sends mutated requests; returns statuses, and the memory at the half and at the end."""
    rng, found, level = random.Random(seed), Counter[int](), []
    with servers.served(folder) as server:
        query = {"clips": servers.as_json({"q": servers.make_frames(7030, "person 3")})}
        wanted = server.ask("POST", "/identify", query)
        for number in range(count):
            status = send(server.port, mutated(rng))
            assert status < 500, f"seed {seed}, request {number}: {status}"
            found[status] += 1
            if number % 50 == 49:
                assert server.ask("POST", "/identify", query) == wanted
            if number in (count // 2, count - 1):
                level.append(memory(server))
        assert server.end() == 0
    return found, level


def kill(folder: Path, seconds: float, every: float, seed: int) -> Counter[str]:
    """Kills a server every few seconds while it is used; returns how much was answered."""
    rng, found = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    held: dict[str, bool] = {}  # person -> enrolled, as the last answer said
    unsure: set[str] = set()  # whose change got no answer
    number = 0
    while time.monotonic() < end or not found["kills"]:
        with servers.served(folder) as server:
            people = server.ask("GET", "/identities")[1]["identities"]
            for name, there in held.items():
                if name not in unsure:
                    assert (name in people) == there, f"seed {seed}: {name} {there}"
            held = {name: name in people for name in held}
            unsure.clear()
            timer = threading.Timer(every * rng.uniform(0.5, 1), server.process.kill)
            timer.start()
            with contextlib.suppress(ConnectionError, OSError, json.JSONDecodeError):
                while True:
                    number += 1
                    _use(server, rng, held, unsure, found, number)
            timer.join()
            found["kills"] += 1
    return found


def _use(
    server: servers.Served,
    rng: random.Random,
    held: dict[str, bool],
    unsure: set[str],
    found: Counter[str],
    number: int,
) -> None:
    """Enrols or removes somebody, and looks for somebody who is removed."""
    name = f"made {rng.randrange(30)}"
    unsure.add(name)
    if held.get(name):
        status, answer = server.ask("DELETE", f"/identities/{name.replace(' ', '%20')}")
    else:
        clips = {f"clip of {number} {time.time_ns()}": servers.make_frames(number, name)}
        body = {"clips": servers.as_json(clips), "identity": name}
        status, answer = server.ask("POST", "/enrol", body)
    assert status == 200, (status, answer)
    held[name] = not held.get(name)
    unsure.discard(name)
    found["changes"] += 1
    gone = rng.choice(sorted(held))
    query = {"clips": servers.as_json({"q": servers.make_frames(number, gone)}), "k": 100}
    status, answer = server.ask("POST", "/identify", query)
    named = {one["identity"] for one in answer["clips"][0]["best"]}
    assert status == 200 and named >= {one for one, there in held.items() if there}
    assert not named & {one for one, there in held.items() if not there}
    found["answers"] += 1


def crowd(folder: Path, count: int) -> dict[str, int]:
    """Opens connections and keeps them; returns how many, how long, and that it answers again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 100)), hard))
    count = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    with servers.served(folder) as server, contextlib.ExitStack() as stack:
        before = memory(server)
        opened = 0
        for _ in range(count):
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", server.port), timeout=5)
                stack.enter_context(one)
                opened += 1
        after = memory(server)
        stack.close()
        end = time.monotonic() + SECONDS
        while server.ask("GET", "/v2/health/live")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.end() == 0
    return {"opened": opened, "memory_before": before, "memory_after": after}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = args.folder / "g"
    servers.make_gallery(folder)
    statuses, level = attack(folder, args.requests, args.seed)
    sys.stdout.write(f"hostile: {dict(sorted(statuses.items()))}, MiB at half and end {level}\n")
    sys.stdout.flush()
    found = kill(folder, args.seconds, args.every, args.seed)
    sys.stdout.write(f"killed: {dict(found)}, {len(Gallery(folder).identities)} people left\n")
    sys.stdout.flush()
    sys.stdout.write(f"connections: {crowd(folder, args.connections)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
