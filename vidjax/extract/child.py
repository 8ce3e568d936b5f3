"""The child process that reads one video: FFmpeg is large, and the file is of unknown origin.

It has limits of memory and processor, and writes into a folder of its own. What it says, a `Film`
or an error, is one JSON object on standard output.
"""

import json
import sys
import time
from pathlib import Path

import msgspec

from vidjax.errors import UserError
from vidjax.extract import cards, film, folder
from vidjax.extract.models import Detector, Embedder

MEMORY_BYTES = 4 << 30  # of address space; half of it is reserved by libraries and never used
CPU_SECONDS, CPU_BYTES_PER_SECOND = (
    600,
    20_000,
)  # a film of 160 kbit a second takes as long as it is
REFUSED = 2


class Task(msgspec.Struct):
    """What a child is told: the file, its sha256 and stem, the folders of clips and of nets."""

    path: str
    sha256: str
    stem: str
    out: str
    models: str
    settings: folder.Settings


def limit(size: int) -> None:
    """Sets the limits of this process, for a file of `size` bytes."""
    import resource

    cpu = int(time.process_time()) + CPU_SECONDS + size // CPU_BYTES_PER_SECOND
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, MEMORY_BYTES))
    for kind, wanted in limits:
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(
            kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def main() -> int:
    """Extracts what standard input tells, and returns the exit status."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    try:
        limit(Path(task.path).stat().st_size)
        known = cards.load(Path(task.models))
        nets = film.Nets(
            Detector(known["face_detector"], task.settings.size), Embedder(known["face_embedder"])
        )
        found = film.extract(
            Path(task.path), Path(task.out), task.stem, nets, task.settings, task.sha256
        )
    except (UserError, OSError) as error:
        sys.stdout.write(json.dumps({"error": str(error)}))
        return REFUSED
    except MemoryError:
        said = f"'{task.path}' needs more memory than a video may: make it smaller"
        sys.stdout.write(json.dumps({"error": said}))
        return REFUSED
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
