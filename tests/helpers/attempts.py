"""What a child process tries after it has taken the rights from itself, instead of its work.

`sitecustomize`, which Python imports at the start of a process, calls `install`. The result of the
attempts is JSON in an error, because every caller of a child process passes errors on.
"""

import contextlib
import ctypes
import encodings.idna  # noqa: F401 (`socket` imports it late, when nobody may not read it)
import fcntl
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

from vidjax.utils import confinement, processes

FOLDER = Path(os.environ.get("VIDJAX_TEST_FOLDER", ""))
OTHER = FOLDER / "other" / "secret.txt"  # a file that is not given to the child
INNER = FOLDER / "models" / "private" / "key"  # a file below the folder of nets
VICTIM = int(os.environ.get("VIDJAX_TEST_VICTIM", "0"))  # another process of the same user
NOBODY = 65534
NO_SIGNAL, CORES, KEEP_DUMPABLE = 0, 62, 4  # PR_SCHED_CORE, PR_SET_DUMPABLE


def call(name, *arguments):
    """Calls a function of the C library."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def raw(name, *arguments):
    """Makes a system call that is forbidden, or partly forbidden."""
    c = confinement
    numbers = {**c.FORBIDDEN, **c.SIGNALS}[name]
    call("syscall", numbers[c.MACHINES[platform.machine()][1]], *arguments)


def raise_limits():
    """Returns the limits of memory, CPU time and written files that this process can raise."""
    raised, none = [], resource.RLIM_INFINITY
    for kind in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"):
        with contextlib.suppress(ValueError):
            resource.setrlimit(getattr(resource, kind), (none, none))
            raised.append(kind)
    return raised


given = ""  # the path of the file that this process may read
# Attempts that Landlock refuses, and attempts that the filter of system calls refuses.
LANDLOCK = {
    "read": OTHER.read_bytes,
    "read below the nets": INNER.read_bytes,
    "list a folder": lambda: os.listdir(OTHER.parent),
    "open the memory of others": lambda: os.open(f"/proc/{VICTIM}/mem", os.O_RDWR),
    "read by a link of the system": lambda: os.open(f"/proc/self/root{OTHER}", os.O_RDONLY),
    "open the terminal": lambda: os.open("/dev/tty", os.O_RDWR),
    "write": lambda: os.open(OTHER, os.O_WRONLY),
    "write a new file": lambda: OTHER.with_name("new").write_bytes(b""),
    "make a link": lambda: OTHER.with_name("link").symlink_to(OTHER),
    "make a hard link": lambda: os.link(OTHER, OTHER.with_name("link")),
    "delete": OTHER.unlink,
    "change the given file": lambda: os.open(given, os.O_RDWR),
    "delete the given file": lambda: os.unlink(given),
}
# Calls that are refused with any arguments; zeros would cause other errors.
CALLS = """
    socketpair unshare setns ptrace process_vm_readv process_vm_writev move_pages migrate_pages kcmp
    get_robust_list pidfd_open rt_sigqueueinfo setpriority ioprio_set sched_setparam sched_setattr
    sched_setscheduler sched_setaffinity shmget shmctl semget msgget mq_open mq_unlink truncate
    fchmodat fchownat utimensat setxattr removexattr inotify_add_watch keyctl syslog io_uring_setup
"""
FILTER = {name: lambda name=name: raw(name, *6 * [0]) for name in CALLS.split()} | {
    "truncate while reading": lambda: os.open(OTHER, os.O_RDONLY | os.O_TRUNC),
    "fork": lambda: os.fork() or os._exit(0),
    "start a program": lambda: subprocess.run([sys.executable, "-V"], check=True),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "open a local socket": lambda: socket.socket(socket.AF_UNIX),
    "open for commands only": lambda: os.open(given, os.O_ACCMODE),
    "change attributes": lambda: fcntl.ioctl(os.open(given, os.O_RDONLY), 0x40086602, bytes(4)),
    "signal others by a file": lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, VICTIM),
    "signal others": lambda: os.kill(VICTIM, NO_SIGNAL),
    "signal all others": lambda: os.kill(-1, NO_SIGNAL),
    "signal a thread of others": lambda: raw("tgkill", VICTIM, VICTIM, NO_SIGNAL),
    "signal others by a thread": lambda: raw("tkill", VICTIM, NO_SIGNAL),
    "share cores with others": lambda: call("prctl", CORES, 1, VICTIM, 0, None),
    "outlive the parent": lambda: call("prctl", 1, 0, 0, 0, 0),
    "limit others": lambda: resource.prlimit(VICTIM, resource.RLIMIT_CPU),
}


def describe(call):
    """Returns why a call was refused, or "" if it was not."""
    try:
        call()
    except OSError as error:  # of another kind if nobody listens, or an earlier attempt succeeded
        return str(error) if isinstance(error, PermissionError) else ""
    return ""


def read_status(key):
    """Returns a field of the state of this process."""
    return Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]


def install(nobody=False, landlock=9):
    """Replaces the work of this process by the attempts, of an ordinary user if `nobody` is True.

    `landlock` is the highest version of Landlock that is used.
    """
    confine, read_version = confinement.confine, confinement._read_landlock_version

    def become_nobody(*paths):
        for path in (FOLDER, *FOLDER.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        libraries = confinement._list_libraries()
        confinement._list_libraries = lambda: libraries  # the folder of Python may be of root
        os.setgroups([])
        os.setresgid(*[NOBODY] * 3)
        os.setresuid(*[NOBODY] * 3)
        call("prctl", KEEP_DUMPABLE, 1, 0, 0, 0)  # as after the start of a program
        confine(*paths)

    def answer(work, path, arguments, limit):
        global given
        given = path
        # Rights are taken only from the thread that calls `confine`, and from its later threads.
        found = {"threads": read_status("Threads"), "rights of root": read_status("CapPrm")}
        read = []
        reader = threading.Thread(target=lambda: read.append(Path(given).read_bytes()))
        reader.start()
        reader.join()
        found |= {"reads": len(read), "user": os.getuid()}
        found |= {name: describe(call) for name, call in (LANDLOCK | FILTER).items()}
        return {"error": f"ATTEMPTS{json.dumps({**found, 'raised': raise_limits()})}"}

    processes._answer = answer
    confinement._read_landlock_version = lambda: min(landlock, read_version())
    if nobody:
        confinement.confine = become_nobody
