"""The command `vidjax`, and `python -m vidjax`, which is the same."""

import sys
from typing import NoReturn

from vidjax import machine, messages, rooms


def main() -> int:
    """Runs the command line of this process; returns its exit code."""
    code = rooms.run(sys.argv[1:])
    if code is None:
        from vidjax import main as main_lib  # which imports the commands of runs

        code = main_lib.main()
    return code


def run() -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    machine.keep_freed_memory()
    messages.run(main)


if __name__ == "__main__":
    run()
