"""Removes checkpoints that need not be kept, and nothing that a user has added to them."""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path


def remove(folder: Path, listed: Collection[str]) -> None:
    """Removes the files of a checkpoint; files that a user has added stay.

    Args:
      folder: `checkpoints/.dropped/<step>`.
      listed: the files below `state` that are its own.
    """
    parts = sorted((folder / "state").rglob("*"), reverse=True)  # files before their folders
    for path in [*parts, folder / "state"]:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif str(path.relative_to(folder / "state")) in listed:
                path.unlink()
    for path in [*folder.glob(".manifest.json.*.partial"), folder / "manifest.json"]:
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        os.rename(folder, free_name(folder.parents[1] / folder.name, "kept"))


def free_name(folder: Path, word: str) -> Path:
    """Returns `<step>.<word>`, or `<step>.<word>-<number>` where that exists."""
    names = (f"{folder.name}.{word}", *(f"{folder.name}.{word}-{i}" for i in range(2, 1000)))
    return next(path for name in names if not (path := folder.with_name(name)).exists())
