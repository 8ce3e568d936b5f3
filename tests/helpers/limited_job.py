"""A job of `vidjax.data.untrusted.limits` that does what a test asks for."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.untrusted import limits
from vidjax.errors import UserError


def count_frames(path: str) -> dict[str, Any]:
    from vidjax.extract import decode

    with decode.open_video(Path(path)) as video:
        sampled = sum(frame.rgb is not None for frame in video.frames(5))
        return {"frames": video.found.frames, "sampled": sampled}


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
        case "frames":
            return count_frames(arguments["path"])
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
    sys.exit(limits.serve(work))
