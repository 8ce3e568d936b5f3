"""`python -m vidjax.extract`."""

from vidjax import messages
from vidjax.extract import commands

if __name__ == "__main__":
    messages.run(commands.main)
