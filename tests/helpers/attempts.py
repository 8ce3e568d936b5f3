"""What a child process tries after it has taken the rights from itself, instead of its work.

`sitecustomize`, which Python imports at the start of a process, calls `install`. The result of the
attempts is JSON in an error, because every caller of a child process passes errors on.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

from vidjax.utils import processes

OTHER = Path(os.environ.get("VIDJAX_TEST_OTHER", ""))  # a file that is not given to the child
PARENT = os.getppid()


def call(name, *arguments):
    """Calls a function of the C library."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def read_memory():
    """Asks the system for a byte of the parent's memory: the error comes before the address."""
    zero = ctypes.c_ulong(0)
    call("process_vm_readv", PARENT, None, zero, None, zero, zero)


def signal_by_file():
    """Asks the system to signal the parent when a pipe has data."""
    fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PARENT)


def raise_limits():
    """Returns the limits of memory, CPU time and written files that this process can raise."""
    raised, none = [], resource.RLIM_INFINITY
    for kind in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"):
        with contextlib.suppress(ValueError):
            resource.setrlimit(getattr(resource, kind), (none, none))
            raised.append(kind)
    return raised


def fork():
    if not os.fork():
        os._exit(0)


given = ""  # the path of the file that this process may read
# Attempts that Landlock refuses, and attempts that the filter of system calls refuses.
LANDLOCK = {
    "read": OTHER.read_bytes,
    "list a folder": lambda: os.listdir(OTHER.parent),
    "open the parent's memory": lambda: os.open(f"/proc/{PARENT}/mem", os.O_RDWR),
    "read the parent's environment": lambda: os.open(f"/proc/{PARENT}/environ", os.O_RDONLY),
    "write": lambda: os.open(OTHER, os.O_WRONLY),
    "write a new file": lambda: OTHER.with_name("new").write_bytes(b""),
    "make a folder": lambda: OTHER.with_name("folder").mkdir(),
    "make a link": lambda: OTHER.with_name("link").symlink_to(OTHER),
    "make a hard link": lambda: os.link(OTHER, OTHER.with_name("link")),
    "rename": lambda: os.rename(OTHER, OTHER.with_name("renamed")),
    "delete": OTHER.unlink,
    "change the given file": lambda: os.open(given, os.O_RDWR),
    "delete the given file": lambda: os.unlink(given),
}
FILTER = {
    "truncate": lambda: os.truncate(OTHER, 0),
    "truncate while reading": lambda: os.open(OTHER, os.O_RDONLY | os.O_TRUNC),
    "change permissions": lambda: os.chmod(OTHER, 0o700),
    "change an owner": lambda: os.chown(OTHER, 1, 1),
    "change times": lambda: os.utime(OTHER),
    "fork": fork,
    "spawn": lambda: os.posix_spawn(sys.executable, [sys.executable, "-V"], {}),
    "start a program": lambda: subprocess.run([sys.executable, "-V"], check=True),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "open a local socket": lambda: socket.socket(socket.AF_UNIX),
    "open a pair of local sockets": socket.socketpair,
    "share memory with others": lambda: call("shmget", 0, 4096, 0o1600),
    "delete shared memory of others": lambda: call("shmctl", 0, 0, None),
    "delete messages of others": lambda: call("mq_unlink", b"/vidjax-test"),
    "watch a folder": lambda: call("inotify_add_watch", 0, bytes(OTHER.parent), 1),
    "open for commands only": lambda: os.open(given, os.O_ACCMODE),
    "change attributes": lambda: fcntl.ioctl(os.open(given, os.O_RDONLY), 0x40086602, bytes(4)),
    "signal the parent by a file": signal_by_file,
    "lower the priority of others": lambda: os.setpriority(os.PRIO_PROCESS, PARENT, 19),
    "copy the parent's memory": read_memory,
    "signal the parent": lambda: os.kill(PARENT, 0),
    "limit the parent": lambda: resource.prlimit(PARENT, resource.RLIMIT_CPU),
}


def describe(call):
    """Returns why a call was refused, or "" if it was not."""
    try:
        call()
    except PermissionError as error:
        return str(error)
    except OSError:  # it was not refused, but nobody listens, or an earlier attempt was successful
        return ""
    return ""


def read_status(key):
    """Returns a field of the state of this process."""
    return Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]


def install():
    """Replaces the work of this process by the attempts."""

    def answer(work, path, arguments, limit):
        global given
        given = path
        # Rights are taken only from the thread that calls `confine`, and from its later threads.
        found = {"threads": read_status("Threads"), "rights of root": read_status("CapPrm")}
        thread = threading.Thread(target=Path(given).read_bytes)  # allowed
        thread.start()
        thread.join()
        tried = {name: describe(call) for name, call in (FILTER | LANDLOCK).items()}
        found |= tried
        return {"error": f"ATTEMPTS{json.dumps({**found, 'raised': raise_limits()})}"}

    processes._answer = answer
