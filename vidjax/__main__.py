"""The command `python -m vidjax`, which is the same as `vidjax`."""

from vidjax.main import run

if __name__ == "__main__":
    run()
