"""Removes checkpoints that need not be kept, and nothing that a user has added to them."""

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from vidjax import files
from vidjax.errors import UserError

OWN = re.compile(r"manifest\.json|\.manifest\.json\..*\.partial")


def remove(folder: Path, listed: Collection[str]) -> None:
    """Removes the files of a checkpoint; files that a user has added stay, and all behind a link.

    Args:
      folder: `checkpoints/.dropped/<step>`.
      listed: the files below `state` that are its own.
    """
    checkpoints = folder.parents[1]
    with contextlib.suppress(OSError, UserError), files.open_folder(folder, checkpoints) as opened:
        own = [name for name in os.listdir(opened) if OWN.fullmatch(name)]
        files.remove_listed(opened, {*own, *(f"state/{name}" for name in listed)})
    try:
        folder.rmdir()
    except OSError:
        os.rename(folder, free_name(checkpoints / folder.name, "kept"))


def free_name(folder: Path, word: str) -> Path:
    """Returns `<step>.<word>`, or `<step>.<word>-<number>` where that exists."""
    names = (f"{folder.name}.{word}", *(f"{folder.name}.{word}-{i}" for i in range(2, 1000)))
    return next(path for name in names if not files.exists(path := folder.with_name(name)))
