"""A job of `vidjax.utils.processes` that does what a test asks for."""

import contextlib
import os
import resource
import stat
import time
from typing import Any

from vidjax.utils import processes
from vidjax.utils.errors import UserError


def find_results() -> int:
    """Returns the number of the pipe for results: the only pipe that is no standard stream."""
    for number in range(3, 100):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                return number
    raise LookupError("no pipe for results")


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    match arguments["wanted"]:
        case "memory":
            return {"zeros": len(bytearray(1 << 33))}
        case "time":
            while True:
                pass
        case "process":
            return {"process": os.getpid()}
        case "work":
            while time.process_time() < 1:
                pass
            return {"limit": resource.getrlimit(resource.RLIMIT_CPU)[0]}
        case "crash":
            os.abort()
        case "print":
            os.write(find_results(), b"no JSON\n")
        case "flood":
            pipe = find_results() if arguments["results"] else 2
            for _ in range(64):
                os.write(pipe, b"x" * (1 << 20))
            os.abort()
        case "disk":
            with open(arguments["file"], "wb") as file:
                file.truncate(1 << 40)
        case "bug":
            raise KeyError("no such key")
        case "mistake":
            raise UserError("film.mp4: give another film")
        case "missing":
            os.stat("nowhere")
    os.write(1, b"a library prints this")
    return {"arguments": arguments, "environment": dict(os.environ)}


if __name__ == "__main__":
    processes.serve(work)
