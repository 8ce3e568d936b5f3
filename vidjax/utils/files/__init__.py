"""Reads files that may come from a stranger, writes files atomically, and locks folders."""

from os.path import lexists as exists

from vidjax.utils.files.locks import *  # noqa: F403
from vidjax.utils.files.reading import *  # noqa: F403
from vidjax.utils.files.writing import *  # noqa: F403
