"""Speakers named by their voices, with nets and cards as they ship and nothing trained.

    VIDJAX_MODELS=models VIDJAX_SPEECH=FOLDER python -m tests.benchmarks.voices

The folder has SPEAKER/*.flac. The first three utterances of each speaker are enrolled in a gallery
of the models, and the others are identified. Each speaker in turn is a stranger: not enrolled.

    cosines         mean and deviation of pairs of utterances, as in the card
    first           utterances whose most probable identity is right, and their number
    by_card         shares with the right name, a wrong name, and strangers with a name
    at_1_percent    the same by a threshold that at most 1 % of strangers reach: for the utterances
                    of each speaker, it is set on all other speakers

The figures are printed as JSON.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.benchmarks import common
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import cards, voices
from vidjax.core import metrics

ENROLLED = 3
FPIR = 1 / 91  # the lowest rate that the 90 utterances of all other speakers can show


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", voices.RATE)
        frames = [*container.decode(audio=0), None]
        parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts)


def speaker(name: str) -> str:
    return name.partition("/")[0]


def measure(speech: Path, models: Path) -> dict[str, Any]:
    """Returns the figures of the module's docstring."""

    def enrolled(name: str, chosen: set[str]) -> Gallery:
        gallery, some = Gallery.of_models(f"{folder}/{name}", models), vectors.only(chosen)
        gallery.enrol(some._replace(labels=tuple(map(speaker, some.names))))
        return gallery

    def shares(right: np.ndarray, named: np.ndarray, alarms: Sequence[Any]) -> dict[str, float]:
        found = {"right": right & named, "wrong": ~right & named, "strangers": alarms}
        return {name: round(float(np.mean(share)), 3) for name, share in found.items()}

    with tempfile.TemporaryDirectory() as folder:
        hear, clips = voices.Listener(cards.load(models)), {}
        for path in sorted(speech.glob("*/*.flac")):
            voice = hear(read(path))
            if len(voice.begin):  # features as `vidjax extract` makes them
                own = {"features": voice.vectors, "quality": voice.quality}
                clips[f"{path.parent.name}/{path.stem}"] = {"audio": own}
        vectors = Gallery.of_models(f"{folder}/none", models).embed(clips)
        people = sorted({*map(speaker, vectors.names)})
        of_each = {one: [x for x in vectors.names if speaker(x) == one] for one in people}
        first = {name for names in of_each.values() for name in names[:ENROLLED]}
        asked = vectors.only({*vectors.names} - first)
        answers = [*enrolled("all", first).identify(asked, 1).values()]
        strangers = {}
        for one, names in of_each.items():
            gallery = enrolled(f"without {one}", first - {*names})
            strangers[one] = [*gallery.identify(vectors.only({*names}), 1).values()]
    owner, truth = (np.array([*map(speaker, x.names)]) for x in (vectors, asked))
    right = np.array([answer.best[0][0] for answer in answers]) == truth
    score = np.array([answer.score for answer in answers])
    reached, alarms = np.zeros(len(truth), bool), []
    for one, own in strangers.items():
        others = [x.score for other, some in strangers.items() if other != one for x in some]
        threshold = metrics.find_threshold(np.array(others), fpir=FPIR)
        reached[truth == one] = score[truth == one] >= threshold
        alarms += [answer.score >= threshold for answer in own]
    named, by_card = (
        [answer.identity is not None for answer in some]
        for some in (answers, itertools.chain(*strangers.values()))
    )
    x = vectors.parts["audio"] / np.linalg.norm(vectors.parts["audio"], axis=1, keepdims=True)
    pairs = np.triu_indices(len(x), 1)
    cosines, same = (x @ x.T)[pairs], (owner[:, None] == owner)[pairs]
    return {
        "speakers": len(people),
        "utterances": len(owner),
        "cosines": {
            kind: [round(float(some.mean()), 4), round(float(some.std()), 4), len(some)]
            for kind, some in (("same", cosines[same]), ("different", cosines[~same]))
        },
        "first": [int(right.sum()), len(right)],
        "by_card": shares(right, np.array(named), by_card),
        "at_1_percent": shares(right, reached, alarms),
    }


def main() -> None:
    common.parse(__doc__)
    found = measure(Path(os.environ["VIDJAX_SPEECH"]), Path(os.environ["VIDJAX_MODELS"]))
    common.say(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
