"""The child process that reads one video or photo: its limits, and what it is told.

FFmpeg is large, and the file is of unknown origin. The child writes clips into a folder of its own.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec

from vidjax.data.processes import Children
from vidjax.data.untrusted import limits
from vidjax.extract import cards, figures, film, folder
from vidjax.run import formats

MEMORY_BYTES = 4 << 30  # of address space; libraries reserve half of it, and never use it
CPU_SECONDS = 600
CPU_BYTES_PER_SECOND = 20_000  # a film of 160 kbit a second takes as long as it is


def extract(
    path: Path,
    out: Path,
    stem: str,
    models: Path,
    settings: folder.Settings,
    sha256: str,
    children: Children,
) -> folder.Film:
    """Extracts a file in a child process, see `film.extract`; `models` is the folder of nets."""
    arguments = {
        "path": str(path.absolute()),
        "out": str(out.absolute()),
        "stem": stem,
        "models": str(models.absolute()),
        "settings": msgspec.to_builtins(settings),
        "sha256": sha256,
    }
    seconds = CPU_SECONDS + path.stat().st_size // CPU_BYTES_PER_SECOND
    found = limits.run_limited(
        __name__, path, arguments,
        memory_bytes=MEMORY_BYTES, cpu_seconds=seconds, children=children,
    )  # fmt: skip
    return formats.parse(path, found, folder.Film, "leave it out")


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Extracts the file that `arguments` name, in this process."""
    settings = msgspec.convert(arguments["settings"], folder.Settings)
    nets = figures.load(cards.load(Path(arguments["models"])), settings.size)
    found = film.extract(
        Path(arguments["path"]), Path(arguments["out"]), arguments["stem"], nets, settings,
        arguments["sha256"],
    )  # fmt: skip
    return msgspec.to_builtins(found)


if __name__ == "__main__":
    sys.exit(limits.serve(work))
