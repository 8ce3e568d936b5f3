"""Servers get hostile requests, are killed or restarted, or share a gallery."""

import contextlib
import http.client
import io
import itertools
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import gallery as made
from tests.helpers import limits, servers
from tests.helpers.cases import quick_first
from tests.helpers.small_runs import ROOT
from vidjax.apps.gallery.gallery import Gallery

pytestmark = pytest.mark.slow


def npz_of(array, method):
    """Returns an `.npz` with an array `face`, compressed by a method of `zipfile`."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive, archive.open("face.npy", "w") as file:
        np.lib.format.write_array(file, array)
    return content.getvalue()


WIDTH = made.WIDTH
# Functions that make the body of a small request, whose arrays or answer are large.
MANY = [{"clip": f"c {n}", "face": [[n + 1] * WIDTH]} for n in range(256)]
LARGE = {
    "uint8": lambda: npz_of(np.ones((1 << 16, WIDTH), np.uint8), zipfile.ZIP_DEFLATED),
    "bzip2": lambda: npz_of(np.ones((1 << 14, WIDTH), np.float32), zipfile.ZIP_BZIP2),
    "lists": lambda: b'{"clips": [{"clip": "c", "face": [' + b"[]," * 1_000_000 + b"1]}]}",
    "many": lambda: json.dumps({"clips": MANY, "k": 1000}).encode(),
}


@pytest.mark.parametrize("kind", quick_first(LARGE, mark=pytest.mark.nightly))
def test_small_requests_that_unpack_to_large_arrays_take_little_memory(tmp_path, kind):
    """64 clients ask at the same time. As float32, the arrays of "uint8" would take 8 GB."""
    rng, body = np.random.default_rng(0), LARGE[kind]()
    form, query = ("json", "") if body[:1] == b"{" else ("x-npz", "?clip=c")
    content = {"Content-Type": f"application/{form}"}
    clips = made.make_clips(num_parts=1, count=WIDTH, rng=rng)
    Gallery.of_clips(tmp_path / "g", made.CARDS, made.make_front(["face"], rng), clips)
    with servers.served(tmp_path / "g") as server, ThreadPoolExecutor(64) as pool:

        def ask(body):
            with contextlib.suppress(ConnectionError):
                return server.ask("POST", f"/identify{query}", body, content)[0]
            return 429  # the server may refuse a request by closing the connection

        assert {*pool.map(ask, [body] * 64)} <= {200, 413, 422, 429, 503}
        facts = Path(f"/proc/{server.process.pid}/status").read_text()
        assert int(facts.split("VmHWM:")[1].split()[0]) < 1000 << 10  # most memory so far, in KB
        # The server still answers.
        status, answer = server.ask("POST", "/identify", {"clips": MANY[:1], "threshold": 0.5})
        assert (status, answer["clips"][0]["clip"]) == (200, "c 0")
        assert server.end() == 0


HEAD = (
    "POST /identify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    "Connection: close\r\nContent-Length: {}\r\n\r\n"
)
WRONG = (b"NaN", b"-1e999", b"1e39", b'"0"', b"[0", b"{}", b"\xff", b"[" * 50_000, b'{"a":' * 9_000)


def mutated(rng, body):
    """Returns a request whose body, numbers, length or header are wrong, or only random bytes."""
    kind, at = rng.randrange(5), rng.randrange(len(body))
    if kind == 0:
        body = body[:at] + rng.randbytes(4) + body[at + 4 :]
    elif kind == 1:
        body = body.replace(b"0.", rng.choice(WRONG), 1)
    head = HEAD.format(len(body)).encode()
    if kind == 2:
        body = rng.choice((body[:at], body * 3))
    elif kind == 3:
        place = rng.randrange(len(head))
        head = head[:place] + rng.choice((b"\0", b"\r\n", b"X" * 50_000, b"\xff")) + head[place:]
    return rng.randbytes(3000) + b"\r\n\r\n" if kind == 4 else head + body


def test_server_survives_mutated_requests_without_using_more_memory(tmp_path, fault_seed, campaign):
    servers.make_gallery(tmp_path / "g")
    rng, statuses, held = random.Random(fault_seed), Counter(), []
    query = {"clips": servers.as_json({"q": servers.make_frames(7030, "person 3")})}
    with servers.served(tmp_path / "g") as server:
        wanted = server.ask("POST", "/identify", query)[1]["clips"][0]
        for number in range(2000 if campaign else 200):
            answer = b""
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=25)
            with connection as opened, contextlib.suppress(ConnectionError):
                opened.sendall(mutated(rng, json.dumps(query).encode()))
                opened.shutdown(socket.SHUT_WR)
                while part := opened.recv(1 << 16):
                    answer += part
            statuses[answer[9:12]] += 1  # the HTTP status; empty if the server closed early
            assert answer[9:10] < b"5", (number, answer[:200])
            if number % 50 == 49:  # an intact request gets the right answer
                best = server.ask("POST", "/identify", query)[1]["clips"][0]
                assert best["identity"] == wanted["identity"] == "person 3"
                assert best["score"] == pytest.approx(wanted["score"], abs=1e-6)
                held.append(limits.held_by(server.process.pid))
        assert server.end() == 0
    assert statuses[b"422"] > statuses.total() / 8  # many requests were read, and found invalid
    assert held[-1] <= held[len(held) // 2] + (64 << 20)  # bytes, in the second half


def test_server_conforms_to_its_openapi_description(tmp_path, fault_seed, campaign):
    pytest.importorskip("schemathesis")
    servers.make_gallery(tmp_path / "g")
    with servers.served(tmp_path / "g") as server:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run",
            f"http://127.0.0.1:{server.port}/openapi.json", "--phases=coverage,fuzzing",
            f"--max-examples={50 if campaign else 5}", f"--max-time={300 if campaign else 6}",
            f"--seed={fault_seed}", "--generation-database=none", "--no-color",
            # Valid fields can contradict each other, such as three frames and two qualities.
            "--exclude-checks=positive_data_acceptance",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert server.end() == 0


def test_killed_server_keeps_every_change_that_it_confirmed(tmp_path, fault_seed, campaign):
    rng, number = random.Random(fault_seed), 0
    enrolled = {*servers.make_gallery(tmp_path / "g").identities}
    unsure: set[str] = set()  # people whose last change was not confirmed, because of a kill
    for _ in range(50 if campaign else 2):
        with servers.served(tmp_path / "g") as server:
            # After a restart, the gallery has all confirmed changes.
            found = {*server.ask("GET", "/identities")[1]["identities"]}
            assert found - unsure == enrolled - unsure
            enrolled, unsure = found, set()
            # Changes follow each other until the server is killed.
            timer = threading.Timer(rng.uniform(1, 2), server.process.kill)
            timer.start()
            with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
                while True:
                    number += 1
                    name = f"made {rng.randrange(30)}"
                    unsure.add(name)
                    words = "POST", "/enrol", servers.enrolment(name, time.time_ns())
                    if name in enrolled:
                        words = "DELETE", f"/identities/{name.replace(' ', '%20')}"
                    status, answer = server.ask(*words)
                    assert status == 200, (status, answer)
                    enrolled ^= {name}
                    assert server.candidates(name, number) == enrolled
                    unsure.discard(name)
            timer.join()
    assert number > 4, "too few changes were made"


def test_change_by_one_process_is_in_the_next_answer_of_every_server(tmp_path):
    folder = servers.make_gallery(tmp_path / "g").folder
    with servers.served(folder) as first, servers.served(folder) as second:
        for turn, (one, other) in enumerate([(first, second), (second, first)] * 3):
            name = f"Ada {turn}"
            assert one.ask("POST", "/enrol", servers.enrolment(name, 1))[0] == 200
            assert name in other.candidates(name)
            assert one.ask("DELETE", f"/identities/Ada%20{turn}")[0] == 200
            assert name not in other.candidates(name)
        Gallery(folder).enrol({"y": servers.make_frames(8200, "Yan")}, "Yan")  # as a command
        assert "Yan" in first.candidates("Yan") & second.candidates("Yan")

        # Both servers enrol at once. Enrolments wait for each other, and none is lost.
        def enrol(number):
            server, name = (first, second)[number % 2], f"Bo {number}"
            return server.ask("POST", "/enrol", servers.enrolment(name, number))[0]

        with ThreadPoolExecutor(16) as pool:
            assert {*pool.map(enrol, range(60))} == {200}
        wanted = {f"Bo {number}" for number in range(60)}
        assert wanted <= first.candidates("Bo 0") & second.candidates("Bo 0")


@pytest.mark.parametrize("signals", [1, 2])
def test_signal_makes_a_server_unready_before_it_ends_without_printed_names(tmp_path, signals):
    folder = servers.make_gallery(tmp_path / "g").folder
    with servers.served(folder, "--unready-seconds=4") as server:
        assert server.ask("POST", "/enrol", servers.enrolment("Ada Secret", 0))[0] == 200
        assert server.ask("DELETE", "/identities/Ada%20Secret")[0] == 200
        began = time.monotonic()
        server.process.terminate()
        while server.is_ready():
            assert time.monotonic() < began + 2
        assert server.candidates("person 1") and not server.is_ready()
        assert (server.end() if signals == 2 else server.process.wait(60)) == 0
        assert (time.monotonic() - began > 4) == (signals == 1)
        out, err = server.process.communicate()
        assert "ready" in err and "ended" in out and "Secret" not in out + err


def find_ports(count):
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in opened]


def balanced(ports):
    """Returns a function that asks the servers in turn, if they are ready, as a proxy does."""
    every, turn = [servers.Served(None, port) for port in ports], itertools.count()

    def ask(*words):
        first = next(turn)
        order = (every[(first + number) % len(every)] for number in range(len(every)))
        return next(server for server in order if server.is_ready()).ask(*words)

    return ask


# What the example of the page needs in addition to run as a program of a test.
NGINX = "daemon off; pid pid; error_log stderr; events {}\nhttp {\naccess_log off;\n" + "".join(
    f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)


@contextlib.contextmanager
def proxied(program, folder, ports):
    """Runs a proxy with the configuration of the page; yields a function that asks the proxy."""
    path = shutil.which(program) or pytest.skip(f"this machine has no {program}")
    page, (port,) = (ROOT / "vidjax/apps/serve/PROXY.md").read_text(), find_ports(1)
    (config,) = re.findall(rf"<!-- proxy: {program} -->\n```text\n(.*?)```", page, re.S)
    if program == "nginx":
        words, config = ["-p", str(folder), "-c", "config"], f"{NGINX}{config}\n}}"
    else:
        words = ["run", "--config=config", "--adapter=caddyfile"]
        config = config.replace("{\n", "{\n\tadmin off\n", 1)
    config = re.sub(r"(?m)^.*ssl_certificate.*\n", "", config)
    for old, new in (
        ("127.0.0.1:8081", f"127.0.0.1:{ports[0]}"), ("127.0.0.1:8082", f"127.0.0.1:{ports[1]}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port}"),
        ("people.example {", f"http://127.0.0.1:{port} {{"),
    ):  # fmt: skip
        config = config.replace(old, new)
    (folder / "config").write_text(config)
    with limits.running([path, *words], cwd=folder, env={"HOME": str(folder)}) as process:
        server = servers.Served(process, port)
        server.wait()
        yield server.ask
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.parametrize("program", ["", "caddy", "nginx"])
def test_rolling_restart_under_32_clients_fails_no_request(tmp_path, program):
    folder, ports, clients = servers.make_gallery(tmp_path / "g").folder, find_ports(2), 32
    statuses, enrolled, ended = Counter(), [], threading.Event()

    def work(number, ask):
        query = {"clips": servers.as_json({"q": servers.make_frames(7000 + number, "person 3")})}
        for turn in itertools.count():
            name, path, body = f"client {number}, turn {turn}", "/identify", query
            if turn % 20 == number % 20:
                path, body = "/enrol", servers.enrolment(name, turn)
                enrolled.append(name)
            try:
                status = ask("POST", path, body)[0]
            except OSError as error:
                status = repr(error)
            statuses[path, status] += 1
            if ended.is_set():
                return

    # If all clients enrol at once, the server must not ask one of them to try again (429).
    flags = ("--unready-seconds=2", "--drain-seconds=5", f"--waiting-changes={clients}")
    with contextlib.ExitStack() as stack:

        def start(port):
            return stack.enter_context(servers.served(folder, *flags, port=port))

        running = [*map(start, ports)]
        way = proxied(program, tmp_path, ports) if program else nullcontext(balanced(ports))
        with way as ask, ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(work, number, ask) for number in range(clients)]
            try:
                for place, port in enumerate(ports):
                    time.sleep(2)
                    before = statuses.total()
                    assert running[place].end() == 0
                    assert statuses.total() > before
                    running[place] = start(port)
                time.sleep(2)
            finally:
                ended.set()
            for client in working:
                client.result()
    assert {status for _, status in statuses} == {200}, statuses
    assert statuses.total() > 500 and {*enrolled} <= Gallery(folder).identities.keys()
