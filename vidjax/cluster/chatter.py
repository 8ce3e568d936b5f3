"""Keeps what C++ libraries print off the terminal, while several processes work together.

They print lines such as `[Gloo] Rank 0 is connected` to the standard output, where a program may
read JSON. And where the coordinator is gone, they abort this process with a stack trace that no
handler in Python can prevent. A child process, which outlives this one, reads what they print.
"""

import os
import re
import subprocess
import sys

# Lines of libraries, not of Python: of glog, of an abort, of gloo and of the coordination service.
NOISE = re.compile(
    r"\[Gloo\] |[IWEF]\d{4} \d\d:|\*\*\* Check failure|    @ +0x|RPC: /|terminate called|  what\(\): "
    r"|Additional GRPC error|:\{.*grpc|\s*$"
)
LOST = "Terminating process because the JAX distributed service detected fatal errors"


def divert(lost: str) -> None:
    """Lets a child read what C++ libraries print from now on; Python still prints as before.

    Args:
      lost: the line that the child prints where this process is aborted, because the coordinator
        is gone.
    """
    outputs = {1: sys.stdout, 2: sys.stderr}
    for output in outputs.values():
        output.flush()
    kept = {number: os.dup(number) for number in outputs}
    reader, writer = os.pipe()
    # In a session of its own, so that Ctrl-C does not end it before this process has.
    subprocess.Popen(
        [sys.executable, "-I", __file__, lost],
        stdin=reader, stdout=kept[2], stderr=kept[2], start_new_session=True,
    )  # fmt: skip
    os.close(reader)
    for number, output in outputs.items():
        os.dup2(writer, number)
        encoding, errors = output.encoding, output.errors
        setattr(
            sys, output.name.strip("<>"),
            open(kept[number], "w", encoding=encoding, errors=errors, buffering=1),
        )  # fmt: skip
    os.close(writer)


def main() -> None:
    """Prints the lines of the standard input that are no noise."""
    for line in sys.stdin:
        if LOST in line:
            print(sys.argv[1], flush=True)
        elif not NOISE.match(line):
            print(line, end="", flush=True)


if __name__ == "__main__":
    main()
