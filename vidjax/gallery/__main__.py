"""`python -m vidjax.gallery`, see `commands`."""

from vidjax import messages
from vidjax.gallery import commands

if __name__ == "__main__":
    messages.run(commands.main)
