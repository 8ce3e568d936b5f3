"""Permanently drops privileges of this process, before the process reads an untrusted file.

Two parts of Linux do this. Landlock allows only listed files. seccomp, a filter of system calls,
forbids opening connections, starting programs and processes, and sending signals to other
processes. The filter also forbids changes of the priority and cores of processes, and of the
permissions, owners and times of files. `list_gaps` returns what this system cannot forbid.
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path

# Call -> its numbers on x86_64 and on aarch64, or None if it does not exist there.
Calls = dict[str, tuple[int | None, int | None]]
Step = tuple[int, int, int, int]  # of a filter: operation, jump if true, jump if false, value

FORBIDDEN: Calls = {
    # Connections, programs, and other processes. A pair of sockets can send to a socket of others.
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "execve": (59, 221), "execveat": (322, 281),
    "fork": (57, None), "vfork": (58, None), "unshare": (272, 97), "setns": (308, 268),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "kcmp": (312, 272), "get_robust_list": (274, 100),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    # Priorities and cores. Libraries that set them for their threads continue after the refusal.
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    # Memory and messages that other processes of the user share by a number or a name.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # Files. Landlock does not limit these calls, or not in every version.
    "truncate": (76, 45), "open_by_handle_at": (304, 265), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    # Keys of the user, messages of the kernel, and parts in which many faults were found.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
UNKNOWN: Calls = {"clone3": (435, 435), "openat2": (437, 437)}  # libraries then use older calls
THREADS: Calls = {"clone": (56, 220)}  # starts threads, but no processes
# The first argument is the number of a process: 0 is this process for prlimit64, and its group for
# the others.
SIGNALS: Calls = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
LIMITS: Calls = {"prlimit64": (302, 261)}
# Values of an argument that are refused: signals when a file has data, which Linux before 6.12
# sends to any process of the user; life after the end of the parent; cores for other processes.
COMMANDS: tuple[tuple[Calls, int, tuple[int, ...]], ...] = (
    ({"fcntl": (72, 25)}, 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    ({"prctl": (157, 167)}, 0, (1, 62)),  # PR_SET_PDEATHSIG, PR_SCHED_CORE
)
# The second arguments that are allowed. Others change attributes, keys and copies of read files.
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
CONTROLS: Calls = {"ioctl": (16, 29)}
ALLOWED_CONTROLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Openings that truncate the file, although they do not write, and openings for commands only:
# Linux before 6.2 does not forbid the first, and no Linux the others.
OPENINGS: tuple[tuple[Calls, int], ...] = (({"open": (2, None)}, 1), ({"openat": (257, 56)}, 2))

# Machine -> its number in the headers of Linux, and its column in the tables of calls.
# Linux 6.1 on an emulated aarch64, with version 2 of Landlock, refused all attempts of the tests.
# The rest of vidjax was never run there.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
LOAD, AND, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
ALLOW = (RETURN, 0, 0, 0x7FFF0000)
REFUSE, IS_UNKNOWN = ((RETURN, 0, 0, 0x00050000 | code) for code in (errno.EPERM, errno.ENOSYS))
CALL, MACHINE, ARGUMENTS = 0, 4, 16  # places in the data of a filter
SECOND_CALL_LIST = 0x40000000  # x86_64 numbers the same calls again from here on
NEW_THREAD, TRUNCATE, ACCESS_MODE = 0x10000, os.O_TRUNC, os.O_ACCMODE
ONLY_COMMANDS = os.O_ACCMODE  # neither reading nor writing

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the numbers are the same everywhere
GIVE_VERSION, BENEATH = 1, 1
# Version of Landlock -> the number of rights to files that it knows. Later versions know as many.
NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
WRITE_FILE, READ_FILE, READ_FOLDER, REMOVE_FILE, MAKE_FILE, TRUNCATE_FILE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 14)
)
READ = READ_FILE | READ_FOLDER
WRITE = READ | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE_FILE
TCP_VERSION, ALL_TCP = 4, 3  # bind and connect
SCOPE_VERSION, ALL_SCOPES = 6, 3  # signals, and sockets without a file

# Files that libraries read. They describe the machine and this process.
SYSTEM = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null",
    "/dev/urandom", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system",
    "/sys/fs/cgroup",
)  # fmt: skip
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: the files of root's jobs may belong to other users.
KEPT_CAPABILITIES, CAPABILITY_VERSION = 1 << 1 | 1 << 2, 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def confine(reads: Iterable[str | Path], writes: Iterable[str | Path]) -> None:
    """Drops privileges of this process. The process must not have started threads.

    Afterwards, the process can read only the files `reads`, the files in the folders `writes`, and
    the installed packages and libraries. It can write and delete files only in `writes`. If `reads`
    contains a folder, the process can list this folder and all folders in it, but cannot read their
    files.
    """
    _give_up_capabilities()
    _call(_libc.prctl, *map(ctypes.c_ulong, (NO_NEW_PRIVILEGES, 1, 0, 0, 0)))
    if version := _read_landlock_version():
        _restrict_files(version, reads, writes)
    if _has_filters():
        _forbid_calls(_make_filter(platform.machine()))


def list_gaps() -> list[str]:
    """Returns what a process can do even after `confine`, because this system cannot forbid it."""
    gaps = []
    if not _read_landlock_version():
        gaps += ["read, write and delete other files", "read the memory of other processes"]
    if not _has_filters():
        gaps += ["open connections", "start processes", "change permissions of files"]
    return gaps


def _read_landlock_version() -> int:
    """Returns the version of Landlock, or 0 if the kernel lacks it or a container forbids it."""
    return max(0, _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), GIVE_VERSION))


def _has_filters() -> bool:
    """Returns True if this system can forbid system calls.

    To find out, asks the kernel to install a filter at an invalid address. If the kernel has
    filters, it answers with the error EFAULT.
    """
    if platform.machine() not in MACHINES:
        return False
    _libc.prctl(*map(ctypes.c_ulong, (SET_SECCOMP, FILTER, 0, 0, 0)))
    return ctypes.get_errno() == errno.EFAULT


def _call(function: "ctypes._NamedFuncPointer", *arguments: object) -> int:
    """Calls a function of the C library, and returns its result. Raises OSError if it fails."""
    if (answer := function(*arguments)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


def _give_up_capabilities() -> None:
    """Takes all special rights (capabilities) from a process of root.

    Only the right to use files of other users is kept. If the process does not belong to root, it
    has no capabilities, and nothing changes.
    """
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION, 0))
    held = ctypes.create_string_buffer(24)  # effective, permitted and inheritable; twice
    _call(_libc.capget, header, held)
    _, permitted, _, *more = struct.unpack("=6I", held.raw)
    kept = permitted & KEPT_CAPABILITIES
    if permitted != kept or any(more):
        _call(_libc.capset, header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def _list_libraries() -> set[str]:
    """Returns the files and folders that Python and installed packages may read later.

    An entry of `sys.path` may be a folder of the user. So it is returned only if it contains
    installed packages, that is, folders `*.dist-info`.
    """
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    linked = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return {
        *SYSTEM,
        *(os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")),
        *(path for path in sys.path if os.path.isfile(path) or glob("*.dist-info", root_dir=path)),
        *filter(None, linked),
        str(Path(__file__).parents[1]),
    }


def _restrict_files(
    version: int, reads: Iterable[str | Path], writes: Iterable[str | Path]
) -> None:
    """Allows this process to use only libraries, the files `reads` and the folders `writes`.

    See `confine`. `version` is the version of Landlock in the kernel.

    Source: landlock(7) of Linux.
    """
    rights = (1 << NUM_RIGHTS[min(version, max(NUM_RIGHTS))]) - 1
    tcp = ALL_TCP if version >= TCP_VERSION else 0
    scopes = ALL_SCOPES if version >= SCOPE_VERSION else 0
    handled = struct.pack("=QQQ", rights, tcp, scopes)
    ruleset = _call(_libc.syscall, CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    libraries = _list_libraries()
    for paths, of_folders in ((libraries, READ), (reads, READ_FOLDER), (writes, WRITE)):
        for path in paths:
            with contextlib.suppress(OSError):  # it is missing: the later reader reports it
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                allowed = of_folders if os.path.isdir(path) else READ_FILE
                rule = struct.pack("=Qi", rights & allowed, place)
                _call(_libc.syscall, ADD_RULE, ruleset, BENEATH, rule, 0)
                os.close(place)
    _call(_libc.syscall, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _make_filter(machine: str) -> list[Step]:
    """Returns a filter of system calls as a list of steps, a program for the kernel.

    The first step that fits a call decides whether the call is allowed. `machine` is the type of
    the processor, such as `x86_64`.
    """
    number, column = MACHINES[machine]
    cases: list[tuple[Calls, list[Step]]] = [
        (FORBIDDEN, [REFUSE]),
        (UNKNOWN, [IS_UNKNOWN]),
        (THREADS, [_load_argument(0), (IF_ANY_BIT, 1, 0, NEW_THREAD), REFUSE, ALLOW]),
        (SIGNALS, [_load_argument(0), (IF_EQUAL, 1, 0, os.getpid()), REFUSE, ALLOW]),
        (LIMITS, [_load_argument(0), (IF_EQUAL, 1, 0, 0), REFUSE, ALLOW]),
    ]
    for calls, argument in OPENINGS:
        refused = [os.O_RDONLY | TRUNCATE, ONLY_COMMANDS | TRUNCATE, ONLY_COMMANDS]
        mode = (AND, 0, 0, ACCESS_MODE | TRUNCATE)
        cases.append((calls, [_load_argument(argument), mode, *_compare(refused, REFUSE, ALLOW)]))
    for calls, argument, refused in COMMANDS:
        cases.append((calls, [_load_argument(argument), *_compare(refused, REFUSE, ALLOW)]))
    cases.append((CONTROLS, [_load_argument(1), *_compare(ALLOWED_CONTROLS, ALLOW, REFUSE)]))
    steps = [
        (LOAD, 0, 0, MACHINE), (IF_EQUAL, 1, 0, number), REFUSE,
        (LOAD, 0, 0, CALL), (IF_AT_LEAST, 0, 1, SECOND_CALL_LIST), REFUSE,
    ]  # fmt: skip
    for calls, ending in cases:
        for numbers in calls.values():
            if (call := numbers[column]) is not None:
                steps += [(IF_EQUAL, 0, len(ending), call), *ending]
    return [*steps, ALLOW]


def _compare(values: Sequence[int], found: Step, other: Step) -> list[Step]:
    """Returns steps: `found` if the value that was loaded last is in `values`, else `other`."""
    numbered = enumerate(reversed(values), 1)
    checks = [(IF_EQUAL, left, 0, value) for left, value in numbered]
    return [*reversed(checks), other, found]


def _load_argument(number: int) -> Step:
    """Returns an instruction for a filter of system calls, which loads the low half of an argument.

    `number` is the position of the argument in the call, from 0 on. The low half has 32 bits.
    """
    return (LOAD, 0, 0, ARGUMENTS + 8 * number)


def _forbid_calls(steps: list[Step]) -> None:
    """Installs `steps` as a permanent filter of this process's system calls. Source: seccomp(2)."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    zero = ctypes.c_ulong(0)
    _call(_libc.prctl, SET_SECCOMP, ctypes.c_ulong(FILTER), program, zero, zero)
