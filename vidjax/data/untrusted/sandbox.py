"""The child process that reads one pickle of unknown origin.

`pickles.unpack` starts it; this module and all that it imports know neither jax nor TensorFlow.
Three barriers stand around the file:

1. No code runs from it: `unpickle` resolves only the few globals that numpy writes.
2. Its cost is bounded: address space, CPU time and output grow with the size of the file, so a few
   bytes that ask for much end in a clear error. (The limit on address space needs Linux.)
3. Its structure is checked: `entries` tests every field before it is written to flat arrays.
"""

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vidjax.data.frame_fields import STORED
from vidjax.data.untrusted.entries import MB, ClipWriter, clips_of, refuse_empty
from vidjax.data.untrusted.unpickle import UnpickleError, load

EXIT_REFUSED = 2
# Honest files load at tens of MB per CPU second, so a machine may be 30 times slower.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
READ_BYTES = MB // 16


def convert(path: Path, modality: str, out_dir: Path, *, drop: bool) -> dict[str, Any]:
    """Writes the clips of one pickle to flat files and returns their summary.

    Args:
      path: the pickle.
      modality: name of the modality; an official one fixes the fields of an entry.
      out_dir: an existing folder.
      drop: True leaves out frames with a non-finite feature; False refuses the file.

    Returns:
      A dict that JSON can hold: `names`, `lengths`, `width` and `dtype` of the features, and the
      counts `seen`, `skipped`, `skipped_clips` and `warnings` of PackedClips.

    Raises:
      UnpickleError: the file is damaged, or has another structure than feature pickles have.
      MemoryError: the file asks for more memory than the limit.
    """
    with path.open("rb", buffering=READ_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        content = load(file, size)
    refuse_empty(content, size)
    clips = clips_of(content)
    with contextlib.ExitStack() as stack:
        files = {
            field: stack.enter_context((out_dir / f"{field}.bin").open("wb")) for field in STORED
        }
        writer = ClipWriter(clips, modality, files, size=size, drop=drop)
        for clip, name in enumerate(writer.names):
            writer.add(clip, clips.pop(name))
        return writer.finish()


def memory_limit(size: int) -> int:
    """Returns the address space, in bytes, of the child that reads a file of `size` bytes."""
    return 512 * MB + 4 * size


def cpu_limit(size: int) -> int:
    """Returns the CPU seconds of the child that reads a file of `size` bytes."""
    return CPU_SECONDS + size // CPU_BYTES_PER_SECOND


def _limit_resources(size: int) -> None:
    """Sets the limits of this process, for a file of `size` bytes."""
    import resource

    cpu = int(time.process_time()) + cpu_limit(size)
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, memory_limit(size)))
    for kind, wanted in limits:
        _, hard = resource.getrlimit(kind)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (soft, hard))


def main(argv: list[str]) -> int:
    """Prints the summary or the error as one JSON object and returns the exit status.

    Args:
      argv: path, modality, out_dir, and 'drop' or 'error' for non-finite features.
    """
    path, modality, out_dir, non_finite = argv
    # Nothing here forms reference cycles, and collecting among millions of lists costs a third.
    gc.disable()
    try:
        _limit_resources(Path(path).stat().st_size)
        answer = convert(Path(path), modality, Path(out_dir), drop=non_finite == "drop")
    except UnpickleError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "the pickle asks for more memory than a file of its size may: refused"}
    except OSError as error:
        answer = {"os_error": error.strerror or str(error)}
    sys.stdout.write(json.dumps(answer))
    return EXIT_REFUSED if "error" in answer or "os_error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
