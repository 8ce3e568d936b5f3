"""Feature pickles as flat arrays, read by a child process in a sandbox.

`unpack` starts the child, which runs this module without jax and TensorFlow. Three barriers:

1. No code runs from the file: `unpickle` resolves only the few globals that numpy writes.
2. Its cost is bounded: address space (on Linux), CPU time and output grow with the size of the
   file, so a few bytes that ask for much end in a clear error.
3. Its structure is checked: `entries` tests every field, and `packing` the clips, before they are
   written to flat arrays.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidjax.data.frame_fields import STORED, NonFinite, PackedClips
from vidjax.data.packing import FlatWriter, Packer
from vidjax.data.processes import Children
from vidjax.data.untrusted import limits
from vidjax.data.untrusted.entries import MB, read_clips
from vidjax.data.untrusted.unpickle import UnpickleError, load
from vidjax.errors import DiskError, NoFileError, UserError

# Honest files load at tens of MB per CPU second, so a machine may be 30 times slower.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
READ_BYTES = MB // 16


def convert(path: Path, modality: str, out_dir: Path, non_finite: NonFinite) -> dict[str, Any]:
    """Writes the clips of one pickle to flat files in a folder and returns their summary.

    The summary is a dict for JSON, see `PackedClips.summary`.
    """
    with path.open("rb", buffering=READ_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        content = load(file, size)
    with FlatWriter(out_dir) as files:
        packer = Packer(modality, files, non_finite)
        for clip in read_clips(content, modality, str(path), size):
            packer.add(clip, clip.modalities[modality])
        return packer.finish().summary()


def memory_limit(size: int) -> int:
    """Returns the address space, in bytes, of the child that reads a file of `size` bytes."""
    return 512 * MB + 4 * size


def cpu_limit(size: int) -> int:
    """Returns the CPU seconds of the child that reads a file of `size` bytes."""
    return CPU_SECONDS + size // CPU_BYTES_PER_SECOND


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Converts the pickle that `arguments` of `convert` name, in this process."""
    path, out_dir = Path(arguments["path"]), Path(arguments["out_dir"])
    # Nothing here forms reference cycles, and collecting among millions of lists costs a third.
    gc.disable()
    try:
        return convert(path, arguments["modality"], out_dir, arguments["non_finite"])
    except UnpickleError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror or str(error)
        raise DiskError(f"{path}: cannot be read, or not written to {out_dir}: {reason}") from None


def unpack(
    path: str | os.PathLike[str],
    modality: str,
    out_dir: str | os.PathLike[str],
    *,
    non_finite: NonFinite = "drop",
    children: Children | None = None,
) -> PackedClips:
    """Reads one feature pickle in a sandbox into flat files; returns them as memory-mapped arrays.

    Args:
      path: the pickle: clip name -> list of entries, or -> array [D] or [T, D].
      modality: `face`, `head`, `body`, `audio` and `scene` have the entries of the official files;
        for any other name, the entries of most clips decide which fields all must have.
      out_dir: a folder for this call alone, made if missing. Its files must outlive the arrays.
      non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
        refuses the file.
      children: the group that the child joins, so that another thread can kill it.

    Raises:
      ValueError: the file is refused, damaged, truncated or of another structure than its
        modality; names file, clip and field.
    """
    path, out_dir = Path(path), Path(out_dir)
    if not path.exists():
        raise NoFileError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file: put the file there, or rename what is there")
    out_dir.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    arguments = {
        "path": str(path),
        "modality": modality,
        "out_dir": str(out_dir),
        "non_finite": non_finite,
    }
    with cleared_on_error(out_dir):
        summary = limits.run_limited(
            __name__, path, arguments,
            memory_bytes=memory_limit(size), cpu_seconds=cpu_limit(size), children=children,
        )  # fmt: skip
        return PackedClips.of_flat_files(out_dir, summary)


@contextlib.contextmanager
def cleared_on_error(out_dir: Path) -> Iterator[None]:
    """Removes the flat files of a folder when the block under it raises."""
    try:
        yield
    except BaseException:
        for field in STORED:
            with contextlib.suppress(OSError):
                (out_dir / f"{field}.bin").unlink()
        raise


if __name__ == "__main__":
    sys.exit(limits.serve(work))
