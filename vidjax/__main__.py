"""Runs the command line. `python -m vidjax` is the same as `vidjax`."""

from vidjax.main import run

if __name__ == "__main__":
    run()
