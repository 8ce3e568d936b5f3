"""Folders of own features, read by several processes: each packs some of the clips of a split.

    python -m vidjax.data.parts OUT_DIR NON_FINITE QUALITY < PATHS

is such a process. PATHS are separated by a zero byte.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from vidjax.data import parquet
from vidjax.data.frame_fields import NonFinite, PackedClips, Quality
from vidjax.data.npz import read_npz
from vidjax.data.processes import Children, map_children
from vidjax.data.untrusted.packing import Clip, pack
from vidjax.errors import UserError
from vidjax.machine import num_cores

# Less than this is read before another process has started.
READER_BYTES = 64 << 20
OPEN_BYTES = 32 << 10  # to open a file takes as long as to read about as much


class Options(TypedDict):
    """How clips are packed, see `pack`."""

    non_finite: NonFinite
    quality: Quality


def read_clips(paths: Sequence[Path]) -> Iterator[Clip]:
    """Yields the clips of a split: of one parquet table, or of `.npz` files."""
    return parquet.read_clips(paths[0]) if paths[0].suffix == ".parquet" else read_npz(paths)


def num_readers(files: Mapping[str, Sequence[Path]]) -> int:
    """Returns the number of processes that are worth their start for the files of all splits."""
    paths = [path for split in files.values() for path in split]
    size = sum(OPEN_BYTES + path.stat().st_size for path in paths)
    return max(1, min(num_cores(), size // READER_BYTES))


def read_at_once(
    files: Mapping[str, Sequence[Path]], scratch: Path, workers: int, options: Options
) -> dict[str, list[dict[str, PackedClips]]] | None:
    """Returns split -> what `pack` returns for each part of its clips, read by several processes.

    It is None where one process must read: where a process fails, or finds what its part alone does
    not tell, such as a name that comes twice. Reading in one process then tells what is wrong.

    Args:
      files: split -> its files.
      scratch: a folder for flat files, which must outlive the arrays.
      workers: number of processes.
      options: how to pack.
    """
    # Some parts take longer: twice as many as processes.
    length = -(-sum(map(len, files.values())) // (2 * workers))
    parts = [
        (split, paths[first : first + length])
        for split, paths in files.items()
        for first in range(0, len(paths), length)
    ]

    def read(children: Children, number: int) -> dict[str, PackedClips]:
        folder = scratch / str(number)
        paths = b"\0".join(map(os.fsencode, parts[number][1]))
        words = (folder, options["non_finite"], options["quality"])
        child = children.run(__name__, *words, given=paths)
        if child.returncode:
            raise _OneProcess
        summaries = json.loads(child.stdout).items()
        return {name: PackedClips.of_flat_files(folder / name, one) for name, one in summaries}

    try:
        read_parts = map_children(read, range(len(parts)), workers)
        found: dict[str, list[dict[str, PackedClips]]] = {split: [] for split in files}
        for (split, _), packed in zip(parts, read_parts, strict=True):
            found[split].append(packed)
        for packed in found.values():
            _check(packed)
    except _OneProcess:
        shutil.rmtree(scratch, ignore_errors=True)
        return None
    return found


class _OneProcess(Exception):
    """One process must read all clips."""


def _check(parts: Sequence[Mapping[str, PackedClips]]) -> None:
    """Raises _OneProcess where the parts of a split share a clip, or differ in width or dtype."""
    names = [{name for flat in part.values() for name in flat.names} for part in parts]
    if sum(map(len, names)) != len(set().union(*names)):
        raise _OneProcess
    kinds: dict[str, set[tuple[np.dtype, int]]] = {}
    for part in parts:
        for name, flat in part.items():
            if len(flat.features):
                kinds.setdefault(name, set()).add((flat.features.dtype, flat.features.shape[1]))
    if any(len(found) > 1 for found in kinds.values()):
        raise _OneProcess


def main(argv: Sequence[str]) -> int:
    """Packs some clips and prints modality -> their summary as JSON; returns the exit code."""
    folder, non_finite, quality = argv
    paths = [Path(os.fsdecode(path)) for path in sys.stdin.buffer.read().split(b"\0")]

    def clips() -> Iterator[Clip]:
        for clip in read_clips(paths):
            if not clip.modalities:
                raise UserError("which modality it counts for, the other parts decide")
            yield clip

    try:
        packed = pack(
            clips(),
            Path(folder),
            non_finite="drop" if non_finite == "drop" else "error",
            quality="norm" if quality == "norm" else "given",
        )
    except (ValueError, OSError):
        return 1
    sys.stdout.write(json.dumps({name: flat.summary() for name, flat in packed.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
