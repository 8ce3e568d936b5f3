"""Random mutations of films and photos: each is decoded, and its faces are extracted.

Everything runs in this process, without the limits of a child. What is wrong is any exception but a
UserError, and more than SECONDS of processor time.
"""

import random
import time
from collections import Counter
from pathlib import Path

from tests.campaigns.mutations import cut, flip, insert, repeat
from tests.helpers import drawn_people, films
from vidjax.apps.video import cards, features_folder, film
from vidjax.utils.errors import UserError

SECONDS = 10
MUTATIONS = (flip, cut, insert, repeat)


def originals(place: Path) -> dict[str, bytes]:
    """Returns the bytes of a file of each kind: drawn people, and pictures of patches."""
    faces = [("Ada", 20, 30), ("Bob", 80, 50)]
    found = {}
    for name, codec in {"a.mp4": "libx264", "a.mkv": "libx264", "a.avi": "mpeg4"}.items():
        drawn_people.write_film(place / name, (1, 20, faces), (1, 60, faces[:1]), codec=codec)
        found[name] = (place / name).read_bytes()
    spoken = place / "sound.mp4"
    shot, sound = (3, 20, faces[:1]), drawn_people.tone(440, 3)
    drawn_people.write_film(spoken, shot, codec="libx264", sound=sound)
    found[spoken.name] = spoken.read_bytes()
    for name, codec in {"a.png": "png", "a.jpg": "mjpeg", "a.webp": "libwebp"}.items():
        found[name] = films.photo(drawn_people.picture(faces), codec, orientation=6)
    return found


def trial(path: Path, nets: film.Nets) -> tuple[str, str]:
    """Returns what became of a file, and what is wrong with that."""
    began = time.process_time()
    wrong = ""
    try:
        found = film.extract(
            path,
            path.parent,
            "x",
            nets,
            features_folder.ExtractionSettings(),
            features_folder.FileStamp.of(path),
            "0" * 64,
        )
        lost = found.corrupt or found.refused or found.lost_sound
        became = "damaged" if found.damaged or lost else "whole"
    except MemoryError:  # a size that a mutation made: the child would tell
        became = "refused"
    except UserError as error:
        became = "refused"
        if len(str(error).splitlines()) > 3:
            wrong = "more than three lines"
    except Exception as error:
        became, wrong = "error", f"{type(error).__name__}: {error}"
    if time.process_time() - began > SECONDS:
        wrong += f" took {time.process_time() - began:.0f} s"
    return became, wrong


def run(folder: Path, count: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Returns file -> how often it was read whole, as damaged, and refused; and what is wrong."""
    models = drawn_people.write_voices(drawn_people.write_models(folder / "models"))
    nets = film.load_nets(cards.load(models), 640)
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for name, content in originals(folder).items():
        counts[name] = Counter()
        for number in range(count):
            rng = random.Random(f"{seed} {name} {number}")
            path = folder / name
            path.write_bytes(content)
            mutation = rng.choice(MUTATIONS)
            mutation(path, rng)
            became, fault = trial(path, nets)
            counts[name][became] += 1
            if fault:
                wrong.append(f"{name} {number} {mutation.__name__}: {fault}")
    return counts, wrong
