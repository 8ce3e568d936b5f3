"""Who is named in films, and how surely: right, wrong, strangers, calibration, unknown people.

    python -m tests.benchmarks.decision --tracks=FOLDER

FOLDER holds `tracks.npz`: the vectors of faces of films and of photos, with the people in truth.
Some people are enrolled by photos, in many random draws; everybody else is a stranger.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.benchmarks import common
from tests.benchmarks.calibration import calibration_error
from tests.helpers.embeddings import unit
from vidjax.apps.gallery import backend, grouping
from vidjax.apps.video.cards import PUBLISHED, BackEnd
from vidjax.apps.video.tracks import find_changes
from vidjax.apps.video.who import STRANGER_ODDS


class Films(NamedTuple):
    """N tracks of films. `apart` are pairs of clips that are seen at the same time."""

    vectors: np.ndarray  # [N, D], of length 1
    people: np.ndarray  # [N], the truth
    clips: list[str]
    apart: list[tuple[str, str]]


CARD = BackEnd(**{"centre": [0.0] * 128, **PUBLISHED["dlib"]["back_end"]})


def split(data: dict[str, np.ndarray]) -> Films:
    """Returns the tracks of the films. Where its vectors change, a track is split."""
    vectors, people, clips, times = [], [], [], []
    for number, (low, high) in enumerate(itertools.pairwise(data["track_begin"].tolist())):
        at = find_changes(data["vector"][low:high], data["time_s"][low:high], False, CARD)
        for begin, end in itertools.pairwise([low, *(low + x for x in at), high]):
            rows = slice(begin, end)
            weight = np.maximum(data["quality"][rows], 1e-3)
            vectors.append(unit(weight @ unit(data["vector"][rows])))
            names, counts = np.unique(data["person"][rows], return_counts=True)
            people.append(int(names[counts.argmax()]))
            shot = f"{data['film'][number]}.s{data['shot'][number]:03}"
            clips.append(f"{shot}.t{len(clips)}")
            times.append((data["film"][number], *data["time_s"][rows][[0, -1]]))
    film, begin, end = map(np.array, zip(*times, strict=True))
    shared = np.minimum(end[:, None], end) > np.maximum(begin[:, None], begin)
    pairs = np.argwhere(np.triu((film[:, None] == film) & shared, 1)).tolist()
    apart = [(clips[one], clips[other]) for one, other in pairs]
    return Films(np.array(vectors, np.float32), np.array(people), clips, apart)


def measure(
    films: Films, photos: np.ndarray, *, known: int, count: int, draws: int, votes: bool = True
) -> dict[str, float]:
    """Returns means over random draws: shares of tracks, and figures of unknown people.

    `photos` are [P, K, D] vectors of K photos of P people. In each of the `draws`, `known` people
    are enrolled with `count` photos each. With `votes`, the tracks of a group get one answer.
    """
    model = backend.make_card_backend({"face": CARD}, STRANGER_ODDS)
    rng, shares, sure, correct = np.random.default_rng(0), [], [], []
    groups = grouping.group(model, films.clips, [films.vectors], films.apart, absorb=False)
    owner = groups if votes else np.arange(len(groups))
    for _ in range(draws):
        people = rng.permutation(len(photos))[:known]
        shown = photos[people][:, rng.permutation(photos.shape[1])[:count]]
        rows = np.repeat(np.arange(known), count)
        enrolled = model.enrol([*map(str, people)], shown.reshape(len(rows), -1), rows)
        nearest = [*backend.Index(model, [enrolled]).nearest([films.vectors], 1, owner)]
        best = np.array([int(nearest[group].best[0][0]) for group in owner])
        probability = np.exp([nearest[group].best[0][1] for group in owner])
        there, named = np.isin(films.people, people), probability > 0.5
        right = there & (best == films.people)
        unknown = np.flatnonzero(~named)
        names = [films.clips[row] for row in unknown]
        labels = grouping.group(model, names, [films.vectors[unknown]], films.apart)
        purest = [
            np.unique(films.people[unknown[labels == n]], return_counts=True)[1].max()
            for n in np.unique(labels)
        ]
        shares.append([
            np.sum(named & right) / np.sum(there),
            np.sum(named & there & ~right) / np.sum(there),
            np.sum(named & ~there) / np.sum(~there),
            len(purest) / len(np.unique(films.people[unknown])),
            np.sum(purest) / len(unknown),
        ])  # fmt: skip
        sure.append(probability)
        correct.append(right)
    names = ("right", "wrong", "strangers named", "groups per person", "purity")
    means = dict(zip(names, np.mean(shares, axis=0).tolist(), strict=True))
    return means | {"ECE": calibration_error(np.concatenate(sure), np.concatenate(correct))}


def load(folder: Path) -> tuple[Films, np.ndarray]:
    """Returns the tracks, and the unit vectors of photos [P, K, D] float32."""
    with np.load(folder / "tracks.npz") as file:
        data = dict(file)
    photos = unit(data["photo_vector"]).astype(np.float32)
    return split(data), photos.reshape(data["photo_person"].max() + 1, -1, photos.shape[1])


def main() -> None:
    films, photos = load(Path(common.parse(__doc__, tracks="").tracks))
    for known, count, votes in itertools.product((8, len(photos)), (1, 3), (False, True)):
        found = measure(films, photos, known=known, count=count, draws=20, votes=votes)
        cells = " | ".join(f"{name} {value:.3f}" for name, value in found.items())
        common.say(f"{known} people, {count} photos, votes {votes} | {cells}")


if __name__ == "__main__":
    main()
