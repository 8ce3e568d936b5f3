"""Speakers named by their voices, with nets and cards as they ship and nothing trained.

    VIDJAX_MODELS=models VIDJAX_SPEECH=FOLDER python -m tests.benchmarks.voices

The folder has SPEAKER/*.flac. README.md describes the measurement. The figures, as JSON:

    cosines         mean, deviation and number of pairs of utterances, as in the card
    first           utterances whose most probable identity is right, and their number
    by_card         shares with the right name, a wrong name, and strangers with a name
    at_1_percent    the same by a threshold that at most 1 % of strangers reach
"""

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.benchmarks import common
from tests.helpers.embeddings import unit
from vidjax.apps.gallery.gallery import Gallery, Vectors
from vidjax.apps.video import cards, voices
from vidjax.core import metrics

ENROLLED = 3
FPIR = 1 / 91  # the lowest rate that the 90 utterances of all other speakers can show


def read(path: Path) -> np.ndarray:
    """Returns the samples of a file of sound, at the rate of the nets."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", voices.RATE)
        frames = [*container.decode(audio=0), None]
        parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts)


def embed(speech: Path, models: Path, gallery: Gallery) -> Vectors:
    """Returns the vectors of all utterances, SPEAKER/FILE, labelled with their speakers."""
    hear, clips = voices.Listener(cards.load(models)), {}
    for path in sorted(speech.glob("*/*.flac")):
        voice = hear(read(path))
        if len(voice.begin):  # features as `vidjax extract` makes them
            features = {"features": voice.vectors, "quality": voice.quality}
            clips[f"{path.parent.name}/{path.stem}"] = {"audio": features}
    vectors = gallery.embed(clips)
    return vectors._replace(labels=tuple(name.partition("/")[0] for name in vectors.names))


def cosines(vectors: Vectors) -> dict[str, list[float]]:
    """Returns mean, deviation and number of the cosines of pairs: of one and of two speakers."""
    x, speakers = unit(vectors.parts["audio"]), np.array(vectors.labels)
    pairs = np.triu_indices(len(x), 1)
    found, same = (x @ x.T)[pairs], (speakers[:, None] == speakers)[pairs]
    kinds = {"same": found[same], "different": found[~same]}
    return {
        kind: [round(float(some.mean()), 4), round(float(some.std()), 4), len(some)]
        for kind, some in kinds.items()
    }


def measure(speech: Path, models: Path) -> dict[str, Any]:
    """Returns the figures of the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = embed(speech, models, Gallery.of_models(f"{folder}/none", models))
        speaker = dict(zip(vectors.names, vectors.labels, strict=True))
        of_each: dict[str, list[str]] = {}
        for name, one in speaker.items():
            of_each.setdefault(str(one), []).append(name)
        first = {name for names in of_each.values() for name in names[:ENROLLED]}
        asked = vectors.only({*speaker} - first)

        def enrolled(name: str, chosen: set[str]) -> Gallery:
            gallery = Gallery.of_models(f"{folder}/{name}", models)
            gallery.enrol(vectors.only(chosen))
            return gallery

        answers = [*enrolled("all", first).identify(asked, 1).values()]
        strangers = {}
        for one, names in of_each.items():
            gallery = enrolled(f"without {one}", first - {*names})
            strangers[one] = [*gallery.identify(vectors.only({*names}), 1).values()]

    truth = np.array([speaker[name] for name in asked.names])
    right = np.array([answer.best[0][0] for answer in answers]) == truth
    score = np.array([answer.score for answer in answers])
    reached, alarms = np.zeros(len(truth), bool), []
    for one, own in strangers.items():
        others = [x.score for other, some in strangers.items() if other != one for x in some]
        threshold = metrics.find_threshold(np.array(others), fpir=FPIR)
        reached[truth == one] = score[truth == one] >= threshold
        alarms += [answer.score >= threshold for answer in own]
    named, strangers_named = (
        np.array([answer.identity is not None for answer in some])
        for some in (answers, itertools.chain(*strangers.values()))
    )

    def shares(named: np.ndarray, alarms: Any) -> dict[str, float]:
        found = {"right": right & named, "wrong": ~right & named, "strangers": alarms}
        return {name: round(float(np.mean(share)), 3) for name, share in found.items()}

    return {
        "speakers": len(of_each),
        "utterances": len(speaker),
        "cosines": cosines(vectors),
        "first": [int(right.sum()), len(right)],
        "by_card": shares(named, strangers_named),
        "at_1_percent": shares(reached, alarms),
    }


def main() -> None:
    common.parse(__doc__)
    found = measure(Path(os.environ["VIDJAX_SPEECH"]), Path(os.environ["VIDJAX_MODELS"]))
    common.say(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
