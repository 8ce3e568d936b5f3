"""Names in a folder of data that are there but would not be read."""

import os
from collections.abc import Collection
from pathlib import Path

from vidjax.data.clips import SPLITS
from vidjax.errors import NoFileError, UserError, closest


def list_entries(directory: str | os.PathLike[str]) -> list[Path]:
    """Returns everything in a directory but hidden files, sorted.

    Raises:
      OSError: there is no such directory.
    """
    directory = Path(directory)
    if not directory.exists():
        raise NoFileError(f"{directory}: no such directory; is config.data.dir right?")
    if not directory.is_dir():
        raise NoFileError(f"{directory}: not a directory; name the folder that holds the files")
    return sorted(path for path in directory.iterdir() if path.name[0] != ".")


def check_file(path: Path) -> None:
    """Raises ValueError for a folder, a link to nothing or a device that bears a file's name."""
    if path.is_file() or not os.path.lexists(path):
        return
    kind = "a folder" if path.is_dir() else "not a regular file"
    if not path.exists():
        kind = f"a link to '{path.readlink()}', which is not there"
    raise UserError(f"{path}: {kind}, where a file is wanted: put the file there, or rename it")


def meant_split(word: str, present: Collection[str]) -> str | None:
    """Returns the split that a word such as `valid` or `training` was meant to be.

    Args:
      word: part of the name of a file or folder.
      present: the splits that have files of their own; the word means none of them.

    Returns:
      A split, or None for a split's own name and for a word that is unlike all of them.
    """
    word = word.lower() if word not in SPLITS else ""
    longer = [split for split in SPLITS if word.startswith(split)]
    split = next(iter(longer), None) or closest(word, SPLITS, cutoff=0.75)
    return split if split not in present else None


def refuse_split(path: Path, word: str, present: Collection[str]) -> None:
    """Raises ValueError for a file or folder that is named after a misspelt split.

    Args:
      path: the file or folder.
      word: the part of its name that stands for the split.
      present: the splits that have files of their own.
    """
    if split := meant_split(word, present):
        head, _, tail = path.name.rpartition(word)
        raise UserError(
            f"{path}: '{word}' is no split and would not be read\n"
            f"rename it to {head}{split}{tail}, or move it away; splits are {', '.join(SPLITS)}"
        )
