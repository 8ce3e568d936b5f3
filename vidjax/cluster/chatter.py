"""Keeps what C++ libraries print off the terminal, while several processes work together.

`[Gloo] Rank 0 is connected` would go to the standard output, where a program may read JSON, and
libraries abort with a stack trace where the coordinator is gone. A child process, which outlives
this one, reads and filters what they print.
"""

import io
import os
import re
import subprocess
import sys

# Lines of libraries, not of Python: of gloo, of glog, of an abort and of the coordination service.
NOISE = re.compile(
    r".*\[Gloo\] |.* peer ranks|[IWEF]\d{4} \d\d:|\*\*\* Check failure|    @ +0x|RPC: /"
    r"|Additional GRPC error|:?UNKNOWN:|.*grpc_status|\s*$"
)
LOST = "Terminating process because the JAX distributed service detected fatal errors"


def divert(lost: str) -> None:
    """Lets a child filter what C++ libraries print, not Python; `lost` replaces lines with LOST."""
    reader, writer = os.pipe()
    # In a session of its own, so that Ctrl-C does not end it before this process has.
    command = [sys.executable, "-I", __file__, lost]
    subprocess.Popen(command, stdin=reader, stdout=2, stderr=2, start_new_session=True)
    os.close(reader)
    for name in ("stdout", "stderr"):
        output = getattr(sys, name)
        output.flush()
        number = output.fileno()
        terminal = os.fdopen(os.dup(number), "w", 1, output.encoding, output.errors)
        setattr(sys, name, terminal)
        os.dup2(writer, number)
    os.close(writer)


def main() -> None:
    """Prints the lines of standard input that are no NOISE; invalid UTF-8 passes unchanged."""
    for stream in (sys.stdin, sys.stdout):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    for line in sys.stdin:
        if LOST in line:
            sys.stdout.write(sys.argv[1] + "\n")
        elif not NOISE.match(line):
            sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
