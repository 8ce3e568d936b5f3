"""Speed and memory of `vidjax extract`, on made films of moving patches.

    VIDJAX_MODELS=models python -m tests.benchmarks.extract FOLDER [--seconds=60] [--people=DIR]

A film of 25 frames a second and shots of 4 s, in H.264, is extracted in one process with one
thread, at each size: minutes of film per minute of a core. Then the most memory of the command, for
films of 3 and 30 minutes. With `--people`, a folder of photos for each person, only the fast preset
is compared with the default: names, times and CPU time of `vidjax who` for a film of these photos.
"""

import argparse
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
FAST = features_folder.ExtractionSettings(fps=2, size=448)
SHOT_S = 7


def pictures(height: int, width: int, seconds: int) -> Iterator[np.ndarray]:
    """Yields frames of shots of 4 s: a window that moves over a larger picture."""
    for shot in range(seconds // 4):
        whole = films.scene(shot, height * 5 // 4, width * 5 // 4)
        for number in range(4 * FPS):
            top, left = number * height // 400, number * width // 400
            yield np.ascontiguousarray(whole[top : top + height, left : left + width])


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


def panned(photo: Path, height: int = 720, width: int = 1280) -> Iterator[np.ndarray]:
    """Yields the frames of a shot: a photo that moves by a tenth of the picture."""
    from PIL import Image

    picture, room = Image.open(photo).convert("RGB"), height * 9 // 10
    picture = picture.resize((round(picture.width * room / picture.height), room))
    for number in range(SHOT_S * FPS):
        frame = Image.new("RGB", (width, height), (60, 70, 90))
        step = number / (SHOT_S * FPS)
        left, top = (width - picture.width) // 3 + step * width / 10, step * height / 10
        frame.paste(picture, (round(left), round(top)))
        yield np.array(frame)


def compare_presets(place: Path, people: Path, models: Path) -> Iterator[dict[str, object]]:
    """Yields the figures of the default, and of the fast preset against them.

    Every person is enrolled by the first photo of a folder, and the film shows all photos in turn.
    """
    photos = [sorted(one.iterdir()) for one in sorted(people.iterdir())]
    first = place / "first"
    for own in photos:
        (first / own[0].parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(own[0], first / own[0].parent.name)
    turns = range(max(map(len, photos)))
    shown = [own[turn % len(own)] for turn in turns for own in photos]
    path = place / "photos.mp4"
    films.write(path, (frame for photo in shown for frame in panned(photo)))
    found = []
    for settings in (features_folder.ExtractionSettings(), FAST):
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--people", type=Path)
    args = parser.parse_args()
    models = Path(os.environ["VIDJAX_MODELS"])
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.people:
        for facts in compare_presets(args.folder, args.people, models):
            sys.stdout.write(json.dumps(facts) + "\n")
        return
    nets, settings = film.load_nets(cards.load(models), 640), features_folder.ExtractionSettings()
    for name, (height, width) in SIZES.items():
        path = args.folder / f"{name}.mp4"
        films.write(path, pictures(height, width, args.seconds))
        stamp, began = features_folder.FileStamp.of(path), time.process_time()
        film.extract(path, args.folder, path.stem, nets, settings, stamp, "0" * 64)
        speed = args.seconds / (time.process_time() - began)
        sys.stdout.write(json.dumps({name: round(speed, 2)}) + "\n")
        sys.stdout.flush()
    minute = args.folder / "minute.mp4"
    films.write(minute, pictures(180, 320, 60))
    for minutes in (3, 30):
        path = repeated(args.folder / f"{minutes}.mp4", minute, minutes)
        peak_mb = peak(path, args.folder / f"out{minutes}", models) >> 20
        sys.stdout.write(json.dumps({f"{minutes} min of 180p": {"peak_mb": peak_mb}}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
