"""Feature pickles as flat arrays, read by a child process in the sandbox."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from vidjax.data.frame_fields import STORED, NonFinite, PackedClips
from vidjax.data.processes import Children
from vidjax.data.untrusted import sandbox
from vidjax.data.untrusted.names import show
from vidjax.errors import DiskError, NoFileError, UserError

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
    """Reads one feature pickle into flat files and returns them as memory-mapped arrays.

    A child process reads the pickle. It runs no code from the file, and its address space is
    limited to 512 MB + 4 x file size (see `sandbox`).

    Args:
      path: the pickle: clip name -> list of entries, or -> array [D] or [T, D].
      modality: `face`, `head`, `body`, `audio` and `scene` have the entries of the official files;
        for any other name, the entries of most clips decide which fields all must have.
      out_dir: a folder for this call alone, made if missing. Its files must outlive the arrays.
      non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
        refuses the file.
      children: the child becomes one of them, which another thread can kill.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is refused, damaged, truncated or of another structure than its
        modality; names file, clip and field.
      OSError: the file cannot be read, or out_dir cannot be written.
    """
    path, out_dir = Path(path), Path(out_dir)
    if not path.exists():
        raise NoFileError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    out_dir.mkdir(parents=True, exist_ok=True)
    with cleared_on_error(out_dir):
        child = _run_sandbox(path, modality, out_dir, non_finite, children or Children())
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
    """Returns the flat files of a child that has ended; raises its error, as `unpack` does.

    Args:
      path: the pickle that it read.
      out_dir: its folder.
      child: its exit status, stdout and stderr.
    """
    return PackedClips.of_flat_files(out_dir, _summary_of(path, out_dir, child))


def _run_sandbox(
    path: Path, modality: str, out_dir: Path, non_finite: str, children: Children
) -> subprocess.CompletedProcess[bytes]:
    """Runs the sandbox on a pickle and returns the ended child, whatever its exit status."""
    arguments = (path.absolute(), modality, out_dir.absolute(), non_finite)
    limit = _WALL_SECONDS + path.stat().st_size / _WALL_BYTES_PER_SECOND
    try:
        return children.run(sandbox.__name__, *arguments, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: refused: reading it needs more than {limit:.0f} s") from None


def _summary_of(path: Path, out_dir: Path, child: subprocess.CompletedProcess[bytes]) -> dict:
    """Returns the child's summary, or raises its error with the name of the file."""
    if child.returncode == -signal.SIGXCPU:
        seconds = sandbox.cpu_limit(path.stat().st_size)
        raise UserError(f"{path}: refused: reading it needs more than {seconds} s of CPU time")
    if child.returncode == -signal.SIGKILL:
        raise UserError(f"{path}: its reader was killed from outside: is memory short?")
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise UserError(f"{path}: damaged or hostile: its reader ended with {name}")
    if child.returncode not in (0, sandbox.EXIT_REFUSED):
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(f"{path}: its reader failed: {show(last)}")
    answer = json.loads(child.stdout)
    if "os_error" in answer:
        raise DiskError(
            f"{path}: cannot be read, or not written to {out_dir}: {answer['os_error']}"
        )
    if "error" in answer:
        raise UserError(f"{path}: {answer['error']}")
    return answer
