"""The parts of an evaluation: `parts/SPLIT/K-of-N/` in the folder of a run.

A part is a folder with some `.npz` files and a `manifest.json`, which is written last and holds
their sha256 and its own. A part that does not match its manifest is never used. The manifest also
says what the part was made of: parts are joined only if they agree on it.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from msgspec import Meta, Struct

from vidjax import files
from vidjax.errors import UserError
from vidjax.run import formats

FOLDER, MANIFEST = "parts", "manifest.json"
MANIFEST_BYTES = 4 * files.MB  # there may be thousands
_NAME = re.compile(r"([1-9]\d{0,5})-of-([1-9]\d{0,5})")


class _Data(Struct):
    digest: formats.Text


class _Facts(Struct):
    """The manifest of a part."""

    number: formats.Size
    total: formats.Size
    num_clips: formats.Size
    split: formats.Text
    step: formats.Count
    checkpoint: formats.Text
    config: Annotated[dict[str, Any], formats.TABLE]
    data: _Data
    observed: bool
    poor: Annotated[list[formats.Count], Meta(max_length=2)]
    seconds: float
    eval_seconds: float
    versions: Annotated[dict[str, formats.Text], formats.FEW]
    files: Annotated[dict[str, formats.Text], formats.MANY]


class Shard(NamedTuple):
    """Which part of how many.

    Attributes:
      number: from 1 to `total`.
      total: number of parts.
    """

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the shard of a text such as `2/7`.

        Raises:
          ValueError: it is none.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, total = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= total:
            first = f"--shard=1/{total}" if total else "--shard=1/7"
            last = f"--shard={total}/{total}" if total else "--shard=7/7"
            raise UserError(
                f"--shard={text[:40]}: want k/n, where k counts the parts from 1 to n:\n"
                f"{first} is the first, {last} the last"
            )
        return cls(number, total)

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def remedy(self) -> str:
        """How to replace a part that cannot be used."""
        return f"make it again: --mode=evaluate --shard={self} with the same --workdir"


class Part(NamedTuple):
    """A part whose manifest is intact.

    Attributes:
      folder: `parts/SPLIT/K-of-N`.
      manifest: what `write` was given as `facts`, and `files`.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def shard(self) -> Shard:
        """Which part it is."""
        return Shard(self.manifest["number"], self.manifest["total"])


def most_bytes(num_identities: int, num_clips: int) -> int:
    """Returns a size in bytes that no file of a part exceeds.

    Args:
      num_identities: lists of at most 100 clips.
      num_clips: clips of the part.
    """
    return formats.most_bytes({"": f"float32[{100 * num_identities + num_clips}]"})


def folder_of(workdir: Path, split: str, shard: Shard) -> Path:
    """Returns the folder of a part.

    Raises:
      ValueError: it, or a folder above it, is a link: something else may lie there.
    """
    folder = workdir / FOLDER / split / f"{shard.number}-of-{shard.total}"
    with contextlib.suppress(OSError), files.open_folder(folder, workdir):
        pass
    return folder


def write(
    folder: Path, facts: Mapping[str, Any], archives: Mapping[str, Mapping[str, np.ndarray]]
) -> Part:
    """Writes a part into its folder, which must exist and be locked; replaces an earlier one.

    Args:
      folder: of the part.
      facts: entries of the manifest, in types of JSON.
      archives: name of a file without `.npz` -> name -> array.

    Raises:
      OSError: a file cannot be written; no part is there then.
    """
    clear(folder)
    written = {}
    for name, arrays in archives.items():
        path, content = folder / f"{name}.npz", dict[str, Any](arrays)
        with files.atomic_file(path) as file:
            np.savez(file, **content)  # packing would take ten times as long, and save little
        written[path.name] = files.sha256_file(path)
    manifest = json.loads(files.to_json({**facts, "files": written}))  # as a reader sees it
    digest = files.sha256_json(manifest)
    files.write_json(folder / MANIFEST, {**manifest, "sha256": digest})
    return Part(folder, manifest)


def clear(folder: Path) -> None:
    """Removes a part, and what a killed process left of one; the folder and its lock stay."""
    with files.open_folder(folder, _workdir(folder)) as opened:
        own = [name for name in os.listdir(opened) if re.fullmatch(r".+\.npz|\..+\.partial", name)]
        for name in (MANIFEST, *own):  # without the first there is no part
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=opened)


def _workdir(folder: Path) -> Path:
    return folder.parents[2]


def read(folder: Path, split: str, shard: Shard) -> Part:
    """Reads the manifest of a part.

    Args:
      folder: of the part.
      split: the split and ...
      shard: ... the shard that its name promises.

    Raises:
      FileNotFoundError: there is no part.
      ValueError: the manifest is damaged, or that of another part.
    """
    path = folder / MANIFEST
    try:
        manifest = files.read_json(path, limit=MANIFEST_BYTES, below=_workdir(folder))
        digest = manifest.pop("sha256", None)
        if digest != files.sha256_json(manifest):
            raise UserError(f"'{path}' is damaged (its own sha256 differs)")
    except ValueError as error:
        raise UserError(f"{_first_line(error)}\n{shard.remedy}") from error
    formats.parse(path, manifest, _Facts, shard.remedy)
    own = (manifest["split"], manifest["number"], manifest["total"])
    if own != (split, *shard):
        name = f"{own[1]}/{own[2]} of {own[0][:40]}"
        raise UserError(f"'{path}' is that of part {name}\n{shard.remedy}")
    return Part(folder, manifest)


def find(workdir: Path, split: str) -> dict[Shard, Part | ValueError]:
    """Returns the parts of a split, or the errors that reading their manifests raised."""
    found: dict[Shard, Part | ValueError] = {}
    parent = workdir / FOLDER / split
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError), files.open_folder(parent, workdir) as opened:
        names = sorted(os.listdir(opened))
    for text in names:
        name = _NAME.fullmatch(text)
        shard = Shard(*map(int, name.groups())) if name else None
        if not shard or shard.number > shard.total:
            continue
        try:
            found[shard] = read(parent / text, split, shard)
        except ValueError as error:
            found[shard] = error
        except (FileNotFoundError, NotADirectoryError):
            continue  # it is being made, or was stopped
    return found


def verify(part: Part, limit: int) -> None:
    """Compares every file of a part with its sha256.

    Args:
      part: the part.
      limit: the largest size of a file, in bytes.

    Raises:
      ValueError: a file is missing, damaged or too large.
    """
    for name in part.manifest["files"]:
        with _open(part, name, limit):
            pass


def load(part: Part, name: str, limit: int) -> dict[str, np.ndarray]:
    """Returns the arrays of one file of a part, after it was compared with its sha256.

    Args:
      part: the part.
      name: of the file, without `.npz`.
      limit: the largest size of the file, in bytes.

    Raises:
      ValueError: the file is missing, damaged or too large.
    """
    with _open(part, f"{name}.npz", limit) as file:
        return files.load_npz(file, limit)


@contextlib.contextmanager
def _open(part: Part, name: str, limit: int) -> Iterator[io.FileIO]:
    """Opens a file of a part whose sha256 is that of the manifest."""
    path = part.folder / name
    if Path(name).name != name:
        manifest = part.folder / MANIFEST
        raise UserError(f"'{manifest}' names a file outside of its folder\n{part.shard.remedy}")
    with (
        _with_remedy(part.shard),
        files.open_regular(path, limit=limit, below=_workdir(part.folder)) as file,
    ):
        if files.sha256_opened(file) != part.manifest["files"].get(name):
            raise UserError(f"'{path}' is damaged (sha256 differs)")
        file.seek(0)
        yield file


@contextlib.contextmanager
def _with_remedy(shard: Shard) -> Iterator[None]:
    """Adds the remedy to the errors of a file that is missing or damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"'{error.filename}' is missing\n{shard.remedy}") from error
    except ValueError as error:
        raise UserError(f"{_first_line(error)}\n{shard.remedy}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
