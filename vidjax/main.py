"""The command `python -m vidjax.main --config=FILE [--mode=COMMAND]`. `vidjax` is the same."""

from vidjax.cli.program import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
