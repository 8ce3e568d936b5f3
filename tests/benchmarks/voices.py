"""Measures how often speakers are named correctly by their voices.

    VIDJAX_MODELS=models VIDJAX_SPEECH=FOLDER python -m tests.benchmarks.voices

FOLDER contains SPEAKER/*.flac. README.md explains the measurement. The output is JSON:

    cosines         mean, deviation and number of pairs of utterances, as in the card
    first           number of utterances whose most probable person is right, and of all utterances
    by_card         shares of right names and wrong names, and of strangers with a name
    at_1_percent    the same shares, with a threshold that at most 1 % of strangers reach
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.benchmarks import common
from tests.helpers.embeddings import unit
from vidjax.apps import cards
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.vectors import Vectors
from vidjax.apps.video import voices
from vidjax.core import metrics

ENROLLED = 3  # utterances of each speaker
FPIR = 1 / 91  # the lowest rate that 90 utterances of strangers can measure


def read_sound(path: Path) -> np.ndarray:
    """Returns the samples of a file, at the rate of the nets."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", voices.RATE)
        frames = [*container.decode(audio=0), None]
        parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts)


def embed(speech: Path, models: Path, gallery: Gallery) -> Vectors:
    """Returns the vectors of all utterances with speech, labelled by their speakers."""
    listener, clips = voices.Listener(cards.load(models)), {}
    for path in sorted(speech.glob("*/*.flac")):
        voice = listener(read_sound(path))
        if len(voice.begin):  # features as in `vidjax extract`
            features = {"features": voice.vectors, "quality": voice.quality}
            clips[f"{path.parent.name}/{path.stem}"] = {"audio": features}
    vectors = gallery.embed(clips)
    return vectors._replace(labels=tuple(name.partition("/")[0] for name in vectors.names))


def measure_cosines(vectors: Vectors) -> dict[str, list[float]]:
    """Returns [mean, deviation, number] of the cosines in pairs of one speaker, and of two."""
    x, speakers = unit(vectors.parts["audio"]), np.array(vectors.labels)
    pairs = np.triu_indices(len(x), 1)
    cosines, same = (x @ x.T)[pairs], (speakers[:, None] == speakers)[pairs]
    return {
        kind: [round(float(some.mean()), 4), round(float(some.std()), 4), len(some)]
        for kind, some in (("same", cosines[same]), ("different", cosines[~same]))
    }


def measure(speech: Path, models: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        vectors = embed(speech, models, Gallery.of_models(f"{folder}/none", models))
        names, speakers = np.array(vectors.names), np.array(vectors.labels)
        enrolled = np.zeros(len(names), bool)
        for speaker in np.unique(speakers):
            enrolled[np.flatnonzero(speakers == speaker)[:ENROLLED]] = True

        def identify(name: str, known: np.ndarray, asked: np.ndarray) -> list[Any]:
            gallery = Gallery.of_models(f"{folder}/{name}", models)
            gallery.enrol(vectors.only({*names[known]}))
            return [*gallery.identify(vectors.only({*names[asked]}), 1).values()]

        answers = identify("all", enrolled, ~enrolled)
        strangers = {}  # speaker -> answers for all utterances of the speaker, who is not enrolled
        for speaker in np.unique(speakers):
            own = speakers == speaker
            strangers[speaker] = identify(f"without {speaker}", enrolled & ~own, own)

    truth = speakers[~enrolled]
    right = np.array([answer.best[0][0] for answer in answers]) == truth
    scores = np.array([answer.score for answer in answers])
    stranger_scores = {k: np.array([x.score for x in some]) for k, some in strangers.items()}
    accepted, accepted_strangers = np.zeros(len(truth), bool), []
    for speaker, own in stranger_scores.items():
        others = np.concatenate([x for other, x in stranger_scores.items() if other != speaker])
        threshold = metrics.find_threshold(others, fpir=FPIR)
        accepted[truth == speaker] = scores[truth == speaker] >= threshold
        accepted_strangers += (own >= threshold).tolist()

    def compute_shares(named: Any, strangers_named: Any) -> dict[str, float]:
        shares = {"right": right & named, "wrong": ~right & named, "strangers": strangers_named}
        return {name: round(float(np.mean(share)), 3) for name, share in shares.items()}

    named = np.array([answer.identity is not None for answer in answers])
    strangers_named = [answer.identity is not None for x in strangers.values() for answer in x]
    return {
        "cosines": measure_cosines(vectors),
        "first": [int(right.sum()), len(right)],
        "by_card": compute_shares(named, strangers_named),
        "at_1_percent": compute_shares(accepted, accepted_strangers),
    }


if __name__ == "__main__":
    common.parse(__doc__)
    figures = measure(Path(os.environ["VIDJAX_SPEECH"]), Path(os.environ["VIDJAX_MODELS"]))
    common.print_text(json.dumps(figures, indent=1))
