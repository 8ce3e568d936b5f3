"""Galleries of made-up vectors of two modalities ("parts"), face and audio."""

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.helpers import made_nets
from tests.helpers.embeddings import unit
from vidjax.apps.cards import BackEnd
from vidjax.apps.gallery import backend as backend_lib, store
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip, VectorOrigin
from vidjax.apps.gallery.vectors import Vectors
from vidjax.models.two_covariance import Settings

WIDTHS = {"face": 8, "audio": 5}
SETTINGS = Settings(within=0.5, between=0.5, scale=0.5, unenrolled=-1.0, stranger=2.0, centred=1.0)
RUN = VectorOrigin(workdir="somewhere", digest="0" * 64, centred=False)
CARDS = VectorOrigin(
    workdir="/models", digest="0" * 64, centred=True, cards=dict.fromkeys(WIDTHS, "0" * 64)
)
# Mean and deviation of the cosines of a person, and of two people.
COSINES = {"face": (0.86, 0.1, 0.0, 0.35), "audio": (0.86, 0.12, 0.0, 0.45)}


def make_clip(number: int, person: str | None, *, lacks: str = "") -> StoredClip:
    """Returns a random clip that is similar to other clips of the person; `number` is the seed.

    The vector of the part `lacks` is 0. If `person` is None, each number is another stranger.
    """
    rng, parts = np.random.default_rng(number), []
    centre = np.random.default_rng(int.from_bytes((person or str(number)).encode()))
    for name, width in WIDTHS.items():
        x = centre.standard_normal(width) + 0.4 * rng.standard_normal(width)
        parts.append(0 * x if name == lacks else x / np.linalg.norm(x))
    return StoredClip(person, np.concatenate(parts).astype(np.float32))


def make_clips(num_people: int = 12, strangers: int = 6) -> dict[str, StoredClip]:
    """Returns a clip of each stranger, and 1 to 4 clips of each person, some without a part.

    The clips of `person 3` are `clip 30`, `clip 31`, ...
    """
    clips = {f"stranger {n}": make_clip(5000 + n, None) for n in range(strangers)}
    for person in range(num_people):
        for turn in range(1 + person % 4):
            lacks = ("", "audio", "face")[(person + turn) % 5 % 3]
            number = 10 * person + turn
            clips[f"clip {number}"] = make_clip(number, f"person {person}", lacks=lacks)
    return clips


def make_front(settings: Settings = SETTINGS) -> backend_lib.Backend:
    """Returns a scoring back end (PLDA) that is fitted to 30 other people with 3 clips each."""
    rng, labels, vectors = np.random.default_rng(99), np.repeat(np.arange(1, 31), 3), {}
    for name, width in WIDTHS.items():
        x = rng.standard_normal((31, width))[labels] + 0.4 * rng.standard_normal((90, width))
        vectors[name] = unit(x).astype(np.float32)
    return backend_lib.fit(vectors, labels, centred=False, settings=settings)


def make(folder, clips=None, *, settings=SETTINGS, origin=RUN) -> Gallery:
    """Makes a gallery of clips, by default of `make_clips()`."""
    clips = make_clips() if clips is None else clips
    return Gallery.of_clips(folder, origin, make_front(settings), clips)


def make_with_cards(folder, clips=None, centre=0.0) -> Gallery:
    """Makes a gallery whose faces and voices are compared by distances, as `make`."""
    spreads = {x: (COSINES[x][:2], COSINES[x][2:], n) for x, n in WIDTHS.items()}
    cards: dict[str, Any] = {x: made_nets.back_end(*given) for x, given in spreads.items()}
    back_ends = {x: BackEnd(**card | {"centre": [centre] * WIDTHS[x]}) for x, card in cards.items()}
    clips = make_clips() if clips is None else clips
    return Gallery.of_clips(folder, CARDS, backend_lib.make_card_backend(back_ends), clips)


def add(gallery: Gallery, clips: Mapping[str, StoredClip]) -> int:
    """Adds clips to a gallery; returns the number of new or changed clips."""
    with gallery.change() as draft:
        return draft.add(clips)


class Answers(UserDict[tuple[int, str], float]):
    """(Number of a clip, name of a person) -> log-probability; equal up to 1e-6."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Answers) or self.keys() != other.keys():
            return False
        return np.allclose(list(self.values()), [other[key] for key in self], rtol=1e-6, atol=1e-6)


def answers(people: Gallery) -> Answers:
    """Returns the log-probabilities of all people for new clips of the persons 0 to 5."""
    shown = [make_clip(700 + n, f"person {n}", lacks=("", "face")[n % 2]) for n in range(6)]
    parts = people.backend.split(np.stack([clip.vector for clip in shown]))
    people.refresh()
    found = enumerate(people.index.nearest(parts, 10**6))
    return Answers({(n, name): log for n, one in found for name, log in one.best})


def contents(folder) -> dict[str, Any]:
    """Returns the content of a gallery, without its version and the coefficients of people."""
    state = store.Store(folder).read()
    clips = {n: (x.identity, x.vector.tobytes(), x.fitted) for n, x in state.clips.items()}
    numbers, settings = state.index.backend.numbers().tobytes(), state.index.backend.settings
    people = {*state.index.names}
    return {"run": state.origin, "backend": (numbers, settings), "person": people, "clip": clips}


def random_clips(run: Any, *lengths: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns clip -> modality of a run -> features [T, D]. Clip n has `lengths[n]` frames."""
    draw, widths = np.random.default_rng(0).normal, run.modalities.items()
    return {
        f"clip {n}": {name: draw(size=(length, d)).astype(np.float32) for name, d in widths}
        for n, length in enumerate(lengths)
    }


def vectors_of(gallery: Gallery, clips: Mapping[str, StoredClip]) -> Vectors:
    """Returns clips as `Vectors`, which `Gallery.enrol` and `Gallery.identify` take."""
    x = gallery.backend.split(np.stack([clip.vector for clip in clips.values()]))
    parts = dict(zip(gallery.backend.widths, x, strict=True))
    return Vectors(tuple(clips), parts, tuple(clip.identity for clip in clips.values()))
