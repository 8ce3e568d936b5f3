"""Connects the processes of a run, and ends all processes if one of them dies.

Process 0 listens at the address of `--coordinator`, and the other processes connect to it. When all
have connected, process 0 stops listening, and `jax.distributed` uses the same address. The
connections stay open while the processes work. If a process dies, the system closes its
connections, and the other processes end with a message before JAX aborts them.

A message is a line of text: `I of N` from process I to process 0, and the answer `start` or
`refused REASON`. When a process ends, it sends `done` or `failed`. Process 0 sends `lost I` if
process I has died.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from vidjax.utils import exit_codes, files
from vidjax.utils.errors import Expected, UserError
from vidjax.utils.messages import print_problem

TIMEOUT_SECONDS = 300  # default of --coordinator_timeout
HELLO_SECONDS = 5.0  # how long process 0 waits for the first line of a connection
RETRY_SECONDS = 0.5  # between two attempts to connect to process 0
REPORT_SECONDS = 1.0  # a process that fails has this time to print its own error first
# A machine without power or network closes no connection. Linux then reports its loss after
# 30 s + 4 x 10 s, which is sooner than JAX aborts the process.
KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 4}
LINE_BYTES = 300

_peers: dict[int, socket.socket] = {}  # index of a process -> connection
_has_failed = threading.Event()  # set when this process has printed an error of its own


def meet(address: str, count: int, index: int, timeout: float) -> None:
    """Connects process 0 with all other processes. If one dies later, ends this process.

    Every process calls this function. `address` is HOST:PORT of process 0. `count` is the number of
    processes, and `index` is the number of this process, from 0 on. If a process is missing after
    `timeout` seconds, raises UserError.
    """
    end = time.monotonic() + timeout
    _peers.update(
        _gather(address, count, end) if index == 0 else _reach(address, count, index, end)
    )
    for peer in _peers.values():
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
    for other in _peers:
        threading.Thread(target=_watch, args=(other, count), daemon=True).start()


def leave(code: int) -> None:
    """Reports to the other processes that this process ends with the exit code `code`.

    If the code stands for a failure, the other processes end, too. This process first gives them a
    moment to print a message, because JAX aborts all processes when process 0 has ended.
    """
    failed = code not in (0, 130, 143)
    if failed:
        _has_failed.set()
    for peer in _peers.values():
        _send(peer, "failed" if failed else "done")
    if _peers and failed:
        time.sleep(3 * REPORT_SECONDS)


@contextlib.contextmanager
def blame_lost_process() -> Iterator[None]:
    """After an error in a `with` block, finds out whether another process of the run has died.

    Waits for a moment. If another process has died, a thread (`_watch`) ends this process with a
    message during the wait. Otherwise, the error is raised again.
    """
    try:
        yield
    except Exception as error:
        if _peers and not isinstance(error, Expected):
            time.sleep(3 * REPORT_SECONDS)
        raise


def _gather(address: str, count: int, end: float) -> dict[int, socket.socket]:
    """Waits in process 0 until all other processes are connected.

    Returns a dict, index of a process -> connection. The waiting ends when
    `time.monotonic()` is `end`. For the other arguments, see `meet`.
    """
    peers: dict[int, socket.socket] = {}
    port, both = int(address.rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET  # some systems have no IPv6
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=both, backlog=count
        )
    except OSError as error:
        raise UserError(
            f"--coordinator={address}: process 0 cannot listen at this port: {error.strerror}\n"
            "give the machine of process 0 and a free port"
        ) from error
    with listener:
        print_problem(f"waiting for {count - 1} of {count} processes at {address}")
        while missing := sorted(set(range(1, count)) - peers.keys()):
            listener.settimeout(max(end - time.monotonic(), 0.001))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                reason = f"process {missing[0]} of {count} has not connected to {address}"
                for peer in peers.values():
                    _refuse(peer, reason)
                raise UserError(
                    f"{reason}\nstart the same command with --process_id={missing[0]}; "
                    "to wait longer: --coordinator_timeout=SECONDS"
                ) from None
            peer.settimeout(HELLO_SECONDS)
            index, _, of = _receive(peer).partition(" of ")
            if not (index.isdecimal() and of.isdecimal()):
                peer.close()  # another program, such as a scanner of ports
            elif int(of) != count or not 0 < int(index) < count:
                _refuse(peer, f"process 0 has --num_processes={count}")
            elif int(index) in peers and _is_open(peers[int(index)]):
                _refuse(peer, f"another process has --process_id={index}")
            else:
                if dead := peers.get(int(index)):
                    dead.close()
                peers[int(index)] = peer
    for peer in peers.values():
        _send(peer, "start")
    return peers


def _reach(address: str, count: int, index: int, end: float) -> dict[int, socket.socket]:
    """Connects this process to process 0, and waits for its answer. Returns {0: connection}.

    The waiting ends when `time.monotonic()` is `end`. For the other arguments, see `meet`.
    """
    host, _, port = address.rpartition(":")
    reason, waits = "", False
    while (left := end - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
        except OSError as error:
            reason = f": {error.strerror or 'no answer'}"
        else:
            _send(peer, f"{index} of {count}")
            answer = _receive(peer)
            if answer == "start":
                return {0: peer}
            peer.close()
            reason = ": it does not answer, or waits for another process"
            if answer.startswith("refused "):
                raise UserError(
                    f"cannot join --coordinator={address}: {answer.removeprefix('refused ')}\n"
                    "start the same command in all processes, with --process_id=0, 1, and so on"
                )
        if not waits:
            print_problem(f"waiting for process 0 of {count} at {address}{reason}")
            waits = True
        time.sleep(min(RETRY_SECONDS, left))
    raise UserError(
        f"process 0 of {count} cannot be reached at {address}{reason}\n"
        "on the machine that --coordinator names, start the same command with --process_id=0; "
        "to wait longer: --coordinator_timeout=SECONDS"
    )


def _watch(index: int, count: int) -> None:
    """Waits until process `index` ends. If it has not succeeded, ends this process with code 2.

    `count` is the number of processes, for the message.
    """
    line = _receive(_peers[index])
    if line == "done":
        return
    if line == "failed":
        time.sleep(REPORT_SECONDS)  # this process may fail, too, and print the same error
    lost = line.removeprefix("lost ") if line.startswith("lost ") else index
    for peer in _peers.values():
        _send(peer, f"lost {lost}")
    if 0 not in _peers:  # this is process 0: without it, JAX would abort the other processes
        time.sleep(REPORT_SECONDS)
    if _has_failed.is_set():
        return

    def fail() -> NoReturn:
        raise UserError(
            f"process {lost} of {count} has ended, or its machine cannot be reached\n"
            "to resume the run, start the same command in every process"
        )

    code = exit_codes.run_to_exit_code(fail)
    files.remove_scratch_folders()
    os._exit(code)


def _send(peer: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # the other process has ended, which its reader finds out
        peer.sendall(f"{line}\n".encode())


def _refuse(peer: socket.socket, reason: str) -> None:
    _send(peer, f"refused {reason}")
    peer.close()


def _receive(peer: socket.socket) -> str:
    """Returns the next line of a connection, or "" if the connection is closed."""
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < LINE_BYTES:
            if not (byte := peer.recv(1)):
                return ""
            line += byte
        return line.decode(errors="replace").strip()
    return ""


def _is_open(peer: socket.socket) -> bool:
    peer.setblocking(False)
    try:
        return peer.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
