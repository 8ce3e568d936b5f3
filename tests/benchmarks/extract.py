"""Speed and memory of `vidjax extract`, on made films.

    VIDJAX_MODELS=models python -m tests.benchmarks.extract FOLDER [--people=DIR]

DIR has a folder of photos of each person. A film in H.264 shows all of them in turn, at 25 frames a
second. It is extracted in one process with one thread, at each size, with both PRESETS. Then both
settings of `vidjax who` are compared: names, times and CPU time. Without `--people`, the most
memory of `vidjax extract` is measured, for films that show moving patches.
"""

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from tests.benchmarks import common
from tests.helpers import films, limits
from vidjax.apps.video import cards, features_folder, film, who

SIZES = {"360p": (360, 640), "1080p": (1080, 1920)}
FPS = 25
PRESETS = {
    "default": features_folder.ExtractionSettings(),
    "fast": features_folder.ExtractionSettings(fps=2, size=448),
}


def panned(picture: np.ndarray, height: int, width: int, seconds: int) -> Iterator[np.ndarray]:
    """Yields the frames of a shot: a window that moves over a larger picture."""
    room = np.subtract(picture.shape[:2], (height, width))
    for number in range(seconds * FPS):
        top, left = room * number // (seconds * FPS)
        yield np.ascontiguousarray(picture[top : top + height, left : left + width])


def repeated(path: Path, source: Path, times: int) -> Path:
    """Writes a film that shows another film several times, without coding it again."""
    with av.open(str(source)) as one, av.open(str(path), "w") as made:
        stream = one.streams.video[0]
        copy = made.add_stream_from_template(stream)
        length = 0
        for turn in range(times):
            one.seek(0)
            for packet in one.demux(stream):
                if packet.dts is None or packet.pts is None:
                    continue
                if not turn:
                    length = max(length, packet.pts + (packet.duration or 1))
                packet.pts += turn * length
                packet.dts += turn * length
                packet.stream = copy
                made.mux(packet)
    return path


def peak(path: Path, out: Path, models: Path) -> int:
    """Returns the most bytes that the command and its child hold at once."""
    words = [sys.executable, "-m", "vidjax", "extract", path, f"--out={out}", f"--models={models}"]
    done = limits.run([*words, "--workers=1"])
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.peak


def framed(photo: Path, height: int, width: int) -> np.ndarray:
    """Returns a photo on a grey wall, which is larger than a frame of the film by a tenth."""
    from PIL import Image

    picture, room = Image.open(photo).convert("RGB"), height * 9 // 10
    picture = picture.resize((round(picture.width * room / picture.height), room))
    wall = Image.new("RGB", (width * 11 // 10, height * 11 // 10), (60, 70, 90))
    wall.paste(picture, ((width - picture.width) // 3 + width // 10, height // 10))
    return np.array(wall)


def measure_memory(folder: Path, models: Path) -> Iterator[dict[str, object]]:
    minute, size = folder / "minute.mp4", (180, 320)
    shots = (panned(films.scene(shot, 225, 400), *size, seconds=4) for shot in range(15))
    films.write(minute, itertools.chain.from_iterable(shots))
    for minutes in (3, 30):
        path = repeated(folder / f"{minutes}.mp4", minute, minutes)
        peak_mb = peak(path, folder / f"out{minutes}", models) >> 20
        yield {f"{minutes} min of 180p": {"peak_mb": peak_mb}}


def measure_people(folder: Path, people: Path, models: Path) -> Iterator[dict[str, object]]:
    """Yields how many seconds of a film a core extracts per second, and `compare_presets`."""
    photos = [sorted(person.iterdir()) for person in sorted(people.iterdir())]
    for name, size in SIZES.items():
        path, speeds = folder / f"{name}.mp4", {}
        films.write(path, show_photos(photos, *size))
        stamp = features_folder.FileStamp.of(path)
        for preset, settings in PRESETS.items():
            nets, began = film.load_nets(cards.load(models), settings.size), time.process_time()
            found = film.extract(path, folder, name, nets, settings, stamp, "0" * 64)
            speeds[preset] = round(found.seconds / (time.process_time() - began), 2)
        yield {name: speeds}
    yield from compare_presets(folder, photos, models)


def show_photos(photos: list[list[Path]], height: int, width: int) -> Iterator[np.ndarray]:
    """Yields the frames of a film that shows all photos in turn. `photos` has a list a person."""
    for turn in range(max(map(len, photos))):
        for own in photos:
            wall = framed(own[turn % len(own)], height, width)
            yield from panned(wall, height, width, seconds=7)


def compare_presets(
    place: Path, photos: list[list[Path]], models: Path
) -> Iterator[dict[str, object]]:
    """Yields the figures of each of PRESETS, and their difference.

    Every person is enrolled by the first photo of a folder, and the film shows all photos in turn.
    """
    first = place / "first"
    for photo, *_ in photos:
        (first / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, first / photo.parent.name)
    path = place / "photos.mp4"
    films.write(path, show_photos(photos, 720, 1280))
    found = []
    for settings in PRESETS.values():
        began, out = common.children_seconds(), place / f"who{settings.size}"
        found.append(who.name_people([path], first, out, models, settings).decision.appearances)
        cpu = round(common.children_seconds() - began, 1)
        names = [str(one.identity) for one in found[-1]]
        yield {"fps": settings.fps, "size": settings.size, "cpu_s": cpu, "names": names}
    gaps = [
        max(abs(x.start_s - y.start_s), abs(x.end_s - y.end_s))
        for x, y in zip(*found, strict=False)
        if x.identity == y.identity
    ]
    yield {"most_seconds_apart": round(max(gaps), 2)}


def main() -> None:
    args = common.parse(__doc__, folder=Path, people="")
    models = Path(os.environ["VIDJAX_MODELS"])
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.people:
        figures = measure_people(args.folder, Path(args.people), models)
    else:
        figures = measure_memory(args.folder, models)
    for one in figures:
        common.say(json.dumps(one))


if __name__ == "__main__":
    main()
