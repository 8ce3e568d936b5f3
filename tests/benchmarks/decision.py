"""Measures the names of people and the groups of unknown people in films.

    python -m tests.benchmarks.decision --tracks=FOLDER

FOLDER contains `tracks.npz`, with vectors of faces in films and in photos, and the true people. In
each of several random draws, some people are enrolled by photos. All other people are strangers.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.benchmarks import common
from tests.benchmarks.calibration import compute_calibration_error
from tests.helpers.embeddings import unit
from vidjax.apps.gallery import backend, grouping
from vidjax.apps.video.cards import PUBLISHED, BackEnd
from vidjax.apps.video.tracks import find_changes

CARD = BackEnd(**{"centre": [0.0] * 128, **PUBLISHED["dlib"]["back_end"]})


def split_tracks(data: dict[str, np.ndarray]) -> SimpleNamespace:
    """Returns N tracks. A track of `tracks.npz` is split where its face changes.

    `vectors` [N, D] have the length 1. `people` [N] are the true people, and `clips` are N names.
    `apart` are pairs of clips that are visible at the same time.
    """
    vectors, people, clips, times = [], [], [], []
    for track, (low, high) in enumerate(itertools.pairwise(data["track_begin"].tolist())):
        changes = find_changes(data["vector"][low:high], data["time_s"][low:high], False, CARD)
        for begin, end in itertools.pairwise([low, *(low + x for x in changes), high]):
            rows = slice(begin, end)
            weight = np.maximum(data["quality"][rows], 1e-3)
            vectors.append(unit(weight @ unit(data["vector"][rows])))
            names, counts = np.unique(data["person"][rows], return_counts=True)
            people.append(int(names[counts.argmax()]))
            shot = f"{data['film'][track]}.s{data['shot'][track]:03}"
            clips.append(f"{shot}.t{len(clips)}")
            times.append((data["film"][track], *data["time_s"][rows][[0, -1]]))
    film, begin, end = map(np.array, zip(*times, strict=True))
    overlap = np.minimum(end[:, None], end) > np.maximum(begin[:, None], begin)
    pairs = np.argwhere(np.triu((film[:, None] == film) & overlap, 1)).tolist()
    apart = [(clips[a], clips[b]) for a, b in pairs]
    x = np.array(vectors, np.float32)
    return SimpleNamespace(vectors=x, people=np.array(people), clips=clips, apart=apart)


def measure(films: Any, photos: Any, *, known: int, count: int, draws: int, votes=True) -> Any:
    """Returns name -> mean over `draws` random draws, of the figures that README.md explains.

    A draw enrols `known` people with `count` photos each. `photos` [P, K, D] are vectors of K
    photos of P people. If `votes` is True, all tracks of a group get the same name.
    """
    model = backend.make_card_backend({"face": CARD})
    rng, figures, probabilities, rights = np.random.default_rng(0), [], [], []
    groups = grouping.group(model, films.clips, [films.vectors], films.apart, absorb=False)
    owner = groups if votes else np.arange(len(groups))
    for _ in range(draws):
        people = rng.permutation(len(photos))[:known]
        chosen = photos[people][:, rng.permutation(photos.shape[1])[:count]]
        rows = np.repeat(np.arange(known), count)
        enrolled = model.enrol([*map(str, people)], chosen.reshape(len(rows), -1), rows)
        answers = [*backend.Index(model, [enrolled]).nearest([films.vectors], 1, owner)]
        best = np.array([int(answers[group].best[0][0]) for group in owner])
        probability = np.exp([answers[group].best[0][1] for group in owner])
        is_known, named = np.isin(films.people, people), probability > 0.5
        right = is_known & (best == films.people)
        unknown = np.flatnonzero(~named)
        names, truth = [films.clips[row] for row in unknown], films.people[unknown]
        labels = grouping.group(model, names, [films.vectors[unknown]], films.apart)
        main_people = [
            np.unique(truth[labels == label], return_counts=True)[1].max()
            for label in np.unique(labels)
        ]
        figures.append({
            "right": np.mean(named[is_known] & right[is_known]),
            "wrong": np.mean(named[is_known] & ~right[is_known]),
            "strangers named": np.mean(named[~is_known]),
            "groups per person": len(main_people) / len(np.unique(truth)),
            "purity": np.sum(main_people) / len(truth),
        })  # fmt: skip
        probabilities.append(probability)
        rights.append(right)
    means = {name: float(np.mean([x[name] for x in figures])) for name in figures[0]}
    error = compute_calibration_error(np.concatenate(probabilities), np.concatenate(rights))
    return means | {"ECE": error}


def load(folder: Path) -> tuple[SimpleNamespace, np.ndarray]:
    """Returns the tracks, and the unit vectors [P, K, D] float32 of K photos of P people."""
    with np.load(folder / "tracks.npz") as file:
        data = dict(file)
    photos = unit(data["photo_vector"]).astype(np.float32)
    photos = photos.reshape(data["photo_person"].max() + 1, -1, photos.shape[1])
    return split_tracks(data), photos


if __name__ == "__main__":
    films, photos = load(Path(common.parse(__doc__, tracks="").tracks))
    for known, count, votes in itertools.product((8, len(photos)), (1, 3), (False, True)):
        figures = measure(films, photos, known=known, count=count, draws=20, votes=votes)
        cells = " | ".join(f"{name} {value:.3f}" for name, value in figures.items())
        common.print_text(f"{known} people, {count} photos, votes {votes} | {cells}")
