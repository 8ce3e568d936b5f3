"""Several servers of one gallery: changes, locks, and restarts behind a proxy."""

import contextlib
import itertools
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import limits, servers
from tests.helpers.small_runs import ROOT
from vidjax.apps.gallery.gallery import Gallery

Ask = Callable[..., tuple[int, Any]]  # of `servers.Served`
PAGE = ROOT / "vidjax/apps/serve/PROXY.md"
CLIENTS = 32
UNREADY = ("--unready_seconds=2", "--drain_seconds=5")


def enrolment(name: str, number: int) -> dict[str, object]:
    clips = servers.as_json({f"clip {number} of {name}": servers.make_frames(number, name)})
    return {"clips": clips, "identity": name}


def names_of(server: servers.Served, name: str, number: int = 9000) -> set[str]:
    """Returns the people with whom a server compares a clip."""
    body = {"clips": servers.as_json({"q": servers.make_frames(number, name)}), "k": 1000}
    status, answer = server.ask("POST", "/identify", body)
    assert status == 200, answer
    return {best["identity"] for best in answer["clips"][0]["best"]}


@pytest.mark.slow
def test_change_by_one_process_is_in_the_next_answer_of_every_server(tmp_path):
    folder = servers.make_gallery(tmp_path / "g").folder
    with servers.served(folder) as first, servers.served(folder) as second:
        for turn, (one, other) in enumerate([(first, second), (second, first)] * 3):
            name = f"Ada {turn}"
            assert one.ask("POST", "/enrol", enrolment(name, 1))[0] == 200
            assert name in names_of(other, name)
            assert one.ask("DELETE", f"/identities/Ada%20{turn}")[0] == 200
            assert name not in names_of(other, name)
        Gallery(folder).enrol({"y": servers.make_frames(8200, "Yan")}, "Yan")  # as a command
        assert "Yan" in names_of(first, "Yan") & names_of(second, "Yan")

        # Both servers enrol at once. Enrolments wait for each other, and none is lost.
        def enrol(number: int) -> int:
            server, name = (first, second)[number % 2], f"Bo {number}"
            return server.ask("POST", "/enrol", enrolment(name, number))[0]

        with ThreadPoolExecutor(16) as pool:
            assert {*pool.map(enrol, range(60))} == {200}
        wanted = {f"Bo {number}" for number in range(60)}
        assert wanted <= names_of(first, "Bo 0") & names_of(second, "Bo 0")
        # A change that lasts longer than `lock_seconds`, 5 s.
        with Gallery(folder)._store.open(write=True):
            began = time.monotonic()
            assert first.ask("POST", "/enrol", enrolment("Cleo", 1))[0] == 503
            assert 5 < time.monotonic() - began < 9
            assert "Yan" in names_of(second, "Yan")  # answers do not wait
        assert first.ask("POST", "/enrol", enrolment("Cleo", 1))[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_signal_makes_a_server_unready_before_it_ends(tmp_path, signals):
    folder = servers.make_gallery(tmp_path / "g").folder
    with servers.served(folder, "--unready_seconds=4") as server:
        began = time.monotonic()
        server.process.terminate()
        while server.is_ready():
            assert time.monotonic() < began + 2
        assert names_of(server, "person 1") and not server.is_ready()
        assert (server.end() if signals == 2 else server.process.wait(60)) == 0
        assert (time.monotonic() - began > 4) == (signals == 1)


@contextlib.contextmanager
def balanced(folder: Path, ports: list[int]) -> Iterator[Ask]:
    """Yields a function that asks a server that was ready a moment ago, as a proxy does."""
    del folder
    every = [servers.Served(None, port) for port in ports]
    ready, turn = every, itertools.count()

    def watch() -> None:
        nonlocal ready
        ready = [server for server in every if server.is_ready()] or ready

    def ask(*words: Any) -> tuple[int, Any]:
        first = next(turn)
        for number in range(2):
            with contextlib.suppress(ConnectionRefusedError):
                return ready[(first + number) % len(ready)].ask(*words)
        raise ConnectionRefusedError

    with limits.repeat(watch, 0.1):
        yield ask


@contextlib.contextmanager
def proxied(
    program: str, words: list[str], config: str, folder: Path, ports: list[int]
) -> Iterator[Ask]:
    """Runs a proxy with the configuration of the page; yields a function that asks the proxy."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"this machine has no {program}")
    port = find_ports(1)[0]
    for old, new in zip((8081, 8082), ports, strict=True):
        config = config.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    config = config.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    config = re.sub(r"(?m)^.*ssl_certificate.*\n", "", config)
    (folder / "config").write_text(
        config.replace("people.example {", f"http://127.0.0.1:{port} {{")
    )
    with limits.running([path, *words], cwd=folder, env={"HOME": str(folder)}) as process:
        server = servers.Served(process, port)
        server.wait()
        yield server.ask
        process.terminate()
        process.communicate(timeout=20)


def example(name: str) -> str:
    (block,) = re.findall(rf"<!-- proxy: {name} -->\n```text\n(.*?)```", PAGE.read_text(), re.S)
    return block


@contextlib.contextmanager
def behind_caddy(folder: Path, ports: list[int]) -> Iterator[Ask]:
    words = ["run", "--config=config", "--adapter=caddyfile"]
    config = example("caddy").replace("{\n", "{\n\tadmin off\n", 1)
    with proxied("caddy", words, config, folder, ports) as ask:
        yield ask


@contextlib.contextmanager
def behind_nginx(folder: Path, ports: list[int]) -> Iterator[Ask]:
    paths = "".join(
        f"{name}_temp_path {name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = "daemon off; pid pid; error_log stderr; events {}\nhttp {\naccess_log off;\n"
    config += f"{paths}{example('nginx')}\n}}"
    with proxied("nginx", ["-p", str(folder), "-c", "config"], config, folder, ports) as ask:
        yield ask


def find_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in opened]


@pytest.mark.slow
@pytest.mark.parametrize("way", [balanced, behind_caddy, behind_nginx])
def test_rolling_restart_under_32_clients_fails_no_request(tmp_path, way):
    folder, ports = servers.make_gallery(tmp_path / "g").folder, find_ports(2)
    statuses, enrolled, ended = Counter[tuple[str, Any]](), [], threading.Event()

    def work(number: int, ask: Ask) -> None:
        query = {"clips": servers.as_json({"q": servers.make_frames(7000 + number, "person 3")})}
        for turn in itertools.count():
            name = f"client {number}, turn {turn}"
            enrols = turn % 20 == number % 20
            path, body = ("/enrol", enrolment(name, turn)) if enrols else ("/identify", query)
            try:
                status = ask("POST", path, body)[0]
            except OSError as error:
                status = repr(error)
            statuses[path, status] += 1
            enrolled.extend([name] * enrols)
            if ended.is_set():
                return

    with contextlib.ExitStack() as stack:

        def start(port: int) -> servers.Served:
            # If all clients enrol at once, the server must not ask one of them to try again (429).
            flags = (*UNREADY, f"--waiting_changes={CLIENTS}")
            return stack.enter_context(servers.served(folder, *flags, port=port))

        running = [*map(start, ports)]
        with way(tmp_path, ports) as ask, ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(work, number, ask) for number in range(CLIENTS)]
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
            for client in clients:
                client.result()
    assert {status for _, status in statuses} == {200}, statuses
    assert statuses.total() > 500 and {*enrolled} <= Gallery(folder).identities.keys()
