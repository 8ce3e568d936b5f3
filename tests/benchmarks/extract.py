"""Measures the speed and the memory of `vidjax extract`.

    VIDJAX_MODELS=models python -m tests.benchmarks.extract FOLDER [--people=PHOTOS]

PHOTOS has a folder of photos of each person. A film shows all photos in turn. For each size and
each preset, the script prints how many seconds of film a core extracts per second. Then it compares
the names, times and CPU time of `vidjax who`. Without `--people`, the script prints the memory of
`vidjax extract` for films of random patches.
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
from PIL import Image

from tests.benchmarks import common
from tests.helpers import films, limits
from vidjax.apps.video import film, media, who

SIZES = {"360p": (360, 640), "1080p": (1080, 1920)}
FPS = 25
PRESETS = {
    "default": media.ExtractionSettings(),
    "fast": media.ExtractionSettings(fps=1),
}


def pan(picture: np.ndarray, height: int, width: int, seconds: int) -> Iterator[np.ndarray]:
    """Yields pictures [height, width, 3] of a window that moves over a larger picture."""
    room = np.subtract(picture.shape[:2], (height, width))
    for number in range(seconds * FPS):
        top, left = room * number // (seconds * FPS)
        yield np.ascontiguousarray(picture[top : top + height, left : left + width])


def repeated(path: Path, source: Path, times: int) -> Path:
    """Writes the film `path`, which shows the film `source` several times; returns its path."""
    playlist = path.with_suffix(".ffconcat")
    playlist.write_text("ffconcat version 1.0\n" + f"file {source.name}\n" * times)
    with av.open(str(playlist)) as film, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    playlist.unlink()
    return path


def peak(path: Path, out: Path, models: Path) -> int:
    """Returns the most memory of `vidjax extract` and its child processes, in bytes."""
    words = [sys.executable, "-m", "vidjax", "extract", path, f"--out={out}", f"--models={models}"]
    env, most = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(common.ROOT)}, 0
    with limits.running([*words, "--workers=1"], env=env, stdout=None, stderr=None) as child:
        while child.poll() is None:
            most = max(most, limits.held_by(child.pid))
            time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"vidjax extract ends with {child.returncode}")
    return most


def measure_memory(folder: Path, models: Path) -> Iterator[object]:
    minute, size = folder / "minute.mp4", (180, 320)
    shots = (pan(films.scene(seed, 225, 400), *size, seconds=4) for seed in range(15))
    films.write(minute, itertools.chain.from_iterable(shots))
    for minutes in (3, 30):
        path = repeated(folder / f"{minutes}.mp4", minute, minutes)
        yield {"minutes": minutes, "peak_mb": peak(path, folder / f"out{minutes}", models) >> 20}


def show_photos(photos: list[list[Path]], height: int, width: int) -> Iterator[np.ndarray]:
    """Yields the pictures of a film: a photo of each person, another photo of each, and so on."""
    # A photo hangs on a grey wall, which is larger than a picture of the film by a tenth.
    for turn in range(max(map(len, photos))):
        for of_person in photos:
            photo = Image.open(of_person[turn % len(of_person)]).convert("RGB")
            room = height * 9 // 10
            photo = photo.resize((round(photo.width * room / photo.height), room))
            wall = Image.new("RGB", (width * 11 // 10, height * 11 // 10), (60, 70, 90))
            wall.paste(photo, ((width - photo.width) // 3 + width // 10, height // 10))
            yield from pan(np.array(wall), height, width, seconds=7)


def measure_speed(folder: Path, photos: list[list[Path]], models: Path) -> Iterator[object]:
    """Yields, for each size, preset -> seconds of film that a core extracts per second."""
    for name, size in SIZES.items():
        path, speeds = folder / f"{name}.mp4", {}
        films.write(path, show_photos(photos, *size))
        for preset, settings in PRESETS.items():
            task = film.Task(
                models=str(models), settings=settings, path=str(path), out=str(folder), stem=name,
                source=media.FileStamp.of(path),
            )  # fmt: skip
            nets, start = film.load_nets(task.models, settings.size), time.process_time()
            report = film.extract(task, *film.identify(task), nets)
            speeds[preset] = round(report.seconds / (time.process_time() - start), 2)
        yield {name: speeds}


def compare_presets(folder: Path, photos: list[list[Path]], models: Path) -> Iterator[object]:
    """Yields the results of `vidjax who` with each preset, and the largest difference in times."""
    first = folder / "first"  # has the first photo of each person, by which `who` enrols people
    for photo, *_ in photos:
        (first / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, first / photo.parent.name)
    path = folder / "photos.mp4"
    films.write(path, show_photos(photos, 720, 1280))
    appearances = []
    for settings in PRESETS.values():
        start, out = common.children_seconds(), folder / f"who{settings.fps}"
        named = who.name_people([path], first, out, models, settings)
        appearances.append(named.decision.appearances)
        cpu = round(common.children_seconds() - start, 1)
        names = [str(appearance.identity) for appearance in appearances[-1]]
        yield {"fps": settings.fps, "size": settings.size, "cpu_s": cpu, "names": names}
    differences = [
        max(abs(x.start_s - y.start_s), abs(x.end_s - y.end_s))
        for x, y in zip(*appearances, strict=False)
        if x.identity == y.identity
    ]
    yield {"most_seconds_apart": round(max(differences), 2)}


if __name__ == "__main__":
    args = common.parse(__doc__, folder=Path, people="")
    models = Path(os.environ["VIDJAX_MODELS"])
    args.folder.mkdir(parents=True, exist_ok=True)
    figures = [measure_memory(args.folder, models)]
    if args.people:
        photos = [sorted(person.iterdir()) for person in sorted(Path(args.people).iterdir())]
        figures = [x(args.folder, photos, models) for x in (measure_speed, compare_presets)]
    for row in itertools.chain(*figures):
        common.print_text(json.dumps(row))
