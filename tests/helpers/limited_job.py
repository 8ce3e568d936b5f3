"""A job of `vidjax.data.processes` that does what a test asks for."""

import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np

from vidjax.data import processes
from vidjax.utils.errors import UserError


def refused(name: str) -> bool:
    """Returns whether this process may not open a socket, or not start a program."""
    try:
        if name == "socket":
            socket.socket()
        else:
            subprocess.run([sys.executable, "-V"], check=True)
    except PermissionError:
        return True
    return False


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    match arguments["wanted"]:
        case "memory":
            return {"sum": float(np.ones(1 << 30).sum())}
        case "time":
            while True:
                np.sort(np.arange(10000.0))
        case "connections":
            return {name: refused(name) for name in ("socket", "program")}
        case "crash":
            os.abort()
        case "bug":
            raise KeyError("no such key")
        case "mistake":
            raise UserError("film.mp4: give another film")
        case "missing":
            os.stat(arguments["path"])
    os.write(1, b"a library prints this")
    return {"arguments": arguments}


if __name__ == "__main__":
    sys.exit(processes.serve(work))
