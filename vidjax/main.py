"""Runs the command line. `python -m vidjax.main` is the same as `vidjax`."""

from vidjax.cli.program import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
