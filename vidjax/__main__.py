"""`python -m vidjax`, the same as the command `vidjax`."""

from vidjax import main

if __name__ == "__main__":
    main.run()
