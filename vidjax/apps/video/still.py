"""Decodes a single picture of a film, or a photo, from a file that may be malicious.

`read_still` starts this module as a child process with limits of memory and computing time. The
picture is not written to the disk.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidjax.apps.video import decode, pictures
from vidjax.apps.video.media import Jump
from vidjax.utils import processes
from vidjax.utils.errors import UserError

MOST_SIDE = 1280  # pixels of the longer side
MEMORY_BYTES, CPU_SECONDS = 4 << 30, 30


def read_still(path: Path, seconds: float, jumps: Sequence[Jump] = ()) -> bytes:
    """Returns the content of a JPEG file: the picture of a film at `seconds`, or a whole photo.

    The picture is turned upright. `jumps` are jumps in the time stamps of the film, as
    `MediaFile.jumps` contains them. Raises UserError if the file cannot be decoded.
    """
    arguments = {"path": str(path.absolute()), "seconds": seconds, "jumps": jumps}
    return processes.run_limited(
        __name__, path, arguments, bytes, memory_bytes=MEMORY_BYTES, cpu_seconds=CPU_SECONDS
    )


def work(arguments: dict[str, Any]) -> bytes:
    """Decodes a picture in a child process; returns it as a JPEG file.

    `arguments` are the arguments of `read_still` as JSON values.
    """
    from PIL import Image

    path = Path(arguments["path"])
    rgb = pictures.read_photo(path)
    if rgb is None:
        with decode.open_video(path) as video:
            rgb = video.still(arguments["seconds"], arguments["jumps"])
    if rgb is None:
        raise UserError(f"'{path}' has no picture at {arguments['seconds']:.1f} s")
    picture, file = Image.fromarray(rgb), io.BytesIO()
    picture.thumbnail((MOST_SIDE, MOST_SIDE))
    picture.save(file, "jpeg", quality=85)
    return file.getvalue()


if __name__ == "__main__":
    processes.serve(work)
