"""Speakers named by their voices, with nets and cards as they ship and nothing trained.

    VIDJAX_MODELS=models VIDJAX_SPEECH=FOLDER python -m tests.benchmarks.voices

The folder has SPEAKER/*.flac. The first three utterances of each speaker are enrolled in a gallery
of the models, and the others are identified. Strangers are all utterances of a speaker who is not
enrolled, each speaker in turn.

    cosines         mean and deviation of pairs of utterances, as in the card
    first           utterances whose most probable identity is right, and their number
    by_card         shares with the right name, a wrong name, and strangers with a name
    at_1_percent    the same by a threshold that at most 1 % of strangers reach: for the utterances
                    of each speaker, it is set on all other speakers
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidjax.apps.gallery.gallery import Gallery, Vectors
from vidjax.apps.video import cards, voices
from vidjax.core import metrics

ENROLLED = 3
FPIR = 1 / 91  # the lowest rate that the 90 utterances of all other speakers can show


def read(path: Path) -> np.ndarray:
    """Returns the sound of a file, float32 [N] of 16 kHz."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", voices.RATE)
        frames = [*container.decode(audio=0), None]
        parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts)


def listen(speech: Path, models: Path) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Returns SPEAKER/NAME -> the features of an utterance, as `vidjax extract` makes them."""
    hear = voices.Listener(cards.load(models))
    found = {}
    for path in sorted(speech.glob("*/*.flac")):
        voice = hear(read(path))
        if len(voice.begin):
            own = {"features": voice.vectors, "quality": voice.quality}
            found[f"{path.parent.name}/{path.stem}"] = {"audio": own}
    return found


def measure(speech: Path, models: Path) -> dict[str, Any]:
    """Returns the figures of the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        known = Gallery.of_models(f"{folder}/all", models)
        vectors = known.embed(listen(speech, models))
        owner = np.array([name.partition("/")[0] for name in vectors.names])
        people = sorted({*owner.tolist()})
        places = [np.flatnonzero(owner == person) for person in people]
        first = {vectors.names[row] for own in places for row in own[:ENROLLED]}
        _enrol(known, vectors, first)
        asked = vectors.only({*vectors.names} - first)
        truth = np.array([name.partition("/")[0] for name in asked.names])
        answers = [*known.identify(asked, 1).values()]
        strangers = []
        for person in people:
            gallery = Gallery.of_models(f"{folder}/without {person}", models)
            _enrol(gallery, vectors, {name for name in first if not name.startswith(f"{person}/")})
            own = vectors.only({name for name in vectors.names if name.startswith(f"{person}/")})
            strangers.append([*gallery.identify(own, 1).values()])
    best = np.array([answer.best[0][0] for answer in answers])
    right, score = best == truth, np.array([answer.score for answer in answers])
    named = np.array([answer.identity is not None for answer in answers])
    reached, alarms = np.zeros(len(asked.names), bool), []
    scores = [np.array([answer.score for answer in some]) for some in strangers]
    for number, person in enumerate(people):
        others = np.concatenate(scores[:number] + scores[number + 1 :])
        threshold = metrics.find_threshold(others, fpir=FPIR)
        reached[truth == person] = score[truth == person] >= threshold
        alarms += (scores[number] >= threshold).tolist()
    return {
        "speakers": len(people),
        "utterances": len(vectors.names),
        "cosines": _cosines(vectors, owner),
        "first": [int(right.sum()), len(right)],
        "by_card": _shares(
            right, named, [answer.identity is not None for some in strangers for answer in some]
        ),
        "at_1_percent": _shares(right, reached, alarms),
    }


def _enrol(gallery: Gallery, vectors: Vectors, names: set[str]) -> None:
    some = vectors.only(names)
    labels = tuple(name.partition("/")[0] for name in some.names)
    gallery.enrol(some._replace(labels=labels))


def _shares(right: np.ndarray, named: np.ndarray, alarms: list[bool]) -> dict[str, float]:
    shares = {"right": right & named, "wrong": ~right & named, "strangers": alarms}
    return {name: round(float(np.mean(share)), 3) for name, share in shares.items()}


def _cosines(vectors: Vectors, owner: np.ndarray) -> dict[str, list[float]]:
    """Returns kind of pair -> mean, deviation and number of its cosines."""
    x = vectors.parts["audio"]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    one, two = np.triu_indices(len(x), 1)
    cosines, same = (x @ x.T)[one, two], owner[one] == owner[two]
    return {
        name: [round(float(some.mean()), 4), round(float(some.std()), 4), len(some)]
        for name, some in (("same", cosines[same]), ("different", cosines[~same]))
    }


def main() -> None:
    """Prints the figures as JSON."""
    found = measure(Path(os.environ["VIDJAX_SPEECH"]), Path(os.environ["VIDJAX_MODELS"]))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
