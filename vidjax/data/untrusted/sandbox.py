"""Feature pickles as flat arrays, read by a child process in a sandbox.

`unpack` starts the child, which runs this module without jax and TensorFlow. Three barriers:

1. No code runs from the file: `unpickle` resolves only the few globals that numpy writes.
2. Its cost is bounded: address space (on Linux), CPU time and output grow with the size of the
   file, so a few bytes that ask for much end in a clear error.
3. Its structure is checked: `entries` tests every field before it is written to flat arrays.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidjax.data.frame_fields import STORED, NonFinite, PackedClips
from vidjax.data.packing import FlatWriter
from vidjax.data.processes import Children
from vidjax.data.untrusted import limits
from vidjax.data.untrusted.entries import MB, ClipWriter, clips_of, refuse_empty
from vidjax.data.untrusted.unpickle import UnpickleError, load
from vidjax.errors import DiskError, NoFileError, UserError

# Honest files load at tens of MB per CPU second, so a machine may be 30 times slower.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
READ_BYTES = MB // 16


def convert(path: Path, modality: str, out_dir: Path, *, drop: bool) -> dict[str, Any]:
    """Writes the clips of one pickle to flat files in a folder and returns their summary.

    The summary is a dict for JSON: `names`, `lengths`, `width` and `dtype` of the features, and the
    counts of PackedClips. With `drop`, frames with a non-finite feature are left out; without it,
    one of them refuses the file.
    """
    with path.open("rb", buffering=READ_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        content = load(file, size)
    refuse_empty(content, size)
    clips = clips_of(content)
    with FlatWriter(out_dir) as files:
        writer = ClipWriter(clips, modality, files, size=size, drop=drop)
        for name in list(clips):
            writer.add(name, clips.pop(name))
        return writer.finish().summary()


def memory_limit(size: int) -> int:
    """Returns the address space, in bytes, of the child that reads a file of `size` bytes."""
    return 512 * MB + 4 * size


def cpu_limit(size: int) -> int:
    """Returns the CPU seconds of the child that reads a file of `size` bytes."""
    return CPU_SECONDS + size // CPU_BYTES_PER_SECOND


def main(argv: list[str]) -> int:
    """Prints the summary or the error as one JSON object and returns the exit status."""
    path, modality, out_dir, non_finite = argv
    # Nothing here forms reference cycles, and collecting among millions of lists costs a third.
    gc.disable()
    try:
        size = Path(path).stat().st_size
        limits.limit_resources(memory_limit(size), cpu_limit(size))
        answer = convert(Path(path), modality, Path(out_dir), drop=non_finite == "drop")
    except UnpickleError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "the pickle asks for more memory than a file of its size may: refused"}
    except OSError as error:
        answer = {"os_error": error.strerror or str(error)}
    sys.stdout.write(json.dumps(answer))
    return limits.EXIT_REFUSED if "error" in answer or "os_error" in answer else 0


# Wall-clock limit of the child: long enough for a slow disk, and an end for a hung one.
_WALL_SECONDS = 60
_WALL_BYTES_PER_SECOND = 1 << 20


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
    with cleared_on_error(out_dir):
        arguments = (path.absolute(), modality, out_dir.absolute(), non_finite)
        limit = _WALL_SECONDS + path.stat().st_size / _WALL_BYTES_PER_SECOND
        try:
            child = (children or Children()).run(__name__, *arguments, timeout=limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"{path}: refused: reading it needs more than {limit:.0f} s") from None
        return load_flat_files(path, out_dir, child)


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


def load_flat_files(
    path: Path, out_dir: Path, child: subprocess.CompletedProcess[bytes]
) -> PackedClips:
    """Returns the clips that an ended child wrote to `out_dir`; raises its error, as `unpack`."""
    answer = limits.answer_of(path, child, cpu_limit(path.stat().st_size))
    if "os_error" in answer:
        raise DiskError(
            f"{path}: cannot be read, or not written to {out_dir}: {answer['os_error']}"
        )
    if "error" in answer:
        raise UserError(f"{path}: {answer['error']}")
    return PackedClips.of_flat_files(out_dir, answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
