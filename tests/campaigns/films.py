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
    two = [(1, 20, faces), (1, 60, faces[:1])]
    drawn_people.write_film(place / "a.mkv", *two, codec="libx264")
    drawn_people.write_film(place / "a.avi", *two, codec="mpeg4")
    coded = {"sound": drawn_people.tone(440, 3), "codec": "libx264"}
    drawn_people.write_film(place / "sound.mp4", (3, 20, faces[:1]), **coded)
    found = {path.name: path.read_bytes() for path in sorted(place.glob("*.*"))}
    for name, codec in {"a.png": "png", "a.jpg": "mjpeg", "a.webp": "libwebp"}.items():
        found[name] = films.photo(drawn_people.picture(faces), codec, orientation=6)
    return found


def trial(path: Path, nets: film.Nets) -> tuple[str, str]:
    """Returns what became of a file, and what is wrong with that."""
    began, wrong = time.process_time(), ""
    settings, stamp = features_folder.ExtractionSettings(), features_folder.FileStamp.of(path)
    try:
        found = film.extract(path, path.parent, "x", nets, settings, stamp, "0" * 64)
        lost = found.corrupt or found.refused or found.lost_sound
        became = "damaged" if found.damaged or lost else "whole"
    except MemoryError:  # a size that a mutation made: the child would tell
        became = "refused"
    except UserError as error:
        became = "refused"
        wrong = "more than three lines" if len(str(error).splitlines()) > 3 else ""
    except Exception as error:
        became, wrong = "error", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - began
    return became, wrong + (f" took {seconds:.0f} s" if seconds > SECONDS else "")


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
            (folder / name).write_bytes(content)
            mutation = rng.choice(MUTATIONS)
            mutation(folder / name, rng)
            became, fault = trial(folder / name, nets)
            counts[name][became] += 1
            wrong += [f"{name} {number} {mutation.__name__}: {fault}"] if fault else []
    return counts, wrong
