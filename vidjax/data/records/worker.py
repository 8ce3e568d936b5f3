"""How a shard is written; and a child process that writes every n-th, which `engines` starts.

    python -m vidjax.data.records.worker FOLDER FIRST STEP

FOLDER holds a saved `ShardTask` for each shard.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records import tfrecord
from vidjax.data.records.staging import ShardTask

EXIT_DISK = 2


def write_shard(task: ShardTask) -> None:
    """Writes one shard: the same bytes for the same task, in whichever process and order.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    with task.path.open("wb") as file:
        tfrecord.write(file, (_record(clip, task.modalities) for _, clip in task()))


def _record(clip: Mapping[str, Any], modalities: Mapping[str, Modality]) -> bytes:
    """Returns the record of a clip; `FrameRecords` tells TFDS what it holds."""
    values: dict[str, bytes | int] = {
        "clip": clip["clip"].encode(),
        "clip_index": clip["clip_index"],
    }
    for name, frames in clip["frames"].items():
        for field, array in frames.items():
            wanted = FRAME_FIELDS[field] if field in FRAME_FIELDS else modalities[name]
            dtype = np.dtype(wanted.dtype).newbyteorder("<")
            values[f"frames/{name}/{field}"] = array.astype(dtype, copy=False).tobytes()
    return tfrecord.encode(values)


def write_saved(path: str) -> None:
    """Writes the shard of a task that was saved to a file."""
    write_shard(ShardTask.load(Path(path)))


def main(argv: Sequence[str]) -> int:
    """Writes shards and returns the exit code; prints the arguments of an OSError as JSON."""
    folder, first, step = argv
    parent = os.getppid()
    try:
        for path in sorted(Path(folder).glob("*.npz"))[int(first) :: int(step)]:
            if os.getppid() != parent:  # it was killed, and nobody waits
                break
            write_saved(str(path))
    except OSError as error:
        sys.stdout.write(json.dumps([error.errno, error.strerror, error.filename]))
        return EXIT_DISK
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
