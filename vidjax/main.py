"""Runs the command line. `python -m vidjax.main` is the same as `vidjax`."""

import os
from collections.abc import Sequence
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command line of this process, and ends the process with its exit code."""
    try:
        from vidjax.cli import program
    except KeyboardInterrupt:  # `exit_codes.run_main` handles signals, but is not imported yet
        os.write(2, b"vidjax: stopped\n")
        os._exit(130)
    program.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the words `argv` of a command line, see `program.main`. Returns the exit code."""
    from vidjax.cli import program

    return program.main(argv)


if __name__ == "__main__":
    run()
