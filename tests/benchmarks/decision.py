"""Measures the names of people and the groups of unknown people in films.

    python -m tests.benchmarks.decision --tracks=FOLDER [--pictures=P]

With `--pictures=P`, a track has one vector for P pictures, see `film.choose_best`.
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
from tests.helpers.embeddings import CARD, unit
from vidjax.apps.gallery import answers, backend, grouping
from vidjax.apps.gallery.index import Index
from vidjax.apps.video import align, film
from vidjax.apps.video.tracks import find_changes
from vidjax.models.card_backend import LEAST_CLARITY

RULE = answers.Rule("new", np.log(0.5), True, None, "")  # a probability above 0.5


def split_tracks(data: dict[str, np.ndarray], pictures: int) -> SimpleNamespace:
    """Returns N tracks. A track of `tracks.npz` is split where its face changes.

    `vectors` [N, D] have the length 1. `people` [N] are the true people, and `clips` are N names.
    `clarity` [N] is of the best face. `apart` are pairs of clips that are visible at the same time.
    """
    vectors, people, clips, times, clarity = [], [], [], [], []
    for track, (low, high) in enumerate(itertools.pairwise(data["track_begin"].tolist())):
        changes = find_changes(data["vector"][low:high], data["time_s"][low:high], False, CARD)
        for begin, end in itertools.pairwise([low, *(low + x for x in changes), high]):
            faces: Any = [(data["quality"][row], row) for row in range(begin, end)]
            chosen: Any = film.choose_best(faces, max(2, round(len(faces) / pictures)))
            rows, few = slice(begin, end), [row for _, row in chosen]
            weight = np.maximum(data["quality"][few], 1e-3)
            vectors.append(unit(weight @ unit(data["vector"][few])))
            names, counts = np.unique(data["person"][rows], return_counts=True)
            people.append(int(names[counts.argmax()]))
            shot = f"{data['film'][track]}.s{data['shot'][track]:03}"
            clips.append(f"{shot}.t{len(clips)}")
            times.append((data["film"][track], *data["time_s"][rows][[0, -1]]))
            best = float(data["quality"][rows].max())
            clarity.append(align.measure_clarity(best, CARD.clear_quality))
    of, begin, end = map(np.array, zip(*times, strict=True))
    overlap = np.minimum(end[:, None], end) > np.maximum(begin[:, None], begin)
    pairs = np.argwhere(np.triu((of[:, None] == of) & overlap, 1)).tolist()
    apart = [(clips[a], clips[b]) for a, b in pairs]
    return SimpleNamespace(
        vectors=np.array(vectors, np.float32), people=np.array(people), clips=clips, apart=apart,
        clarity=np.array(clarity),
    )  # fmt: skip


def group_for_votes(model: backend.Backend, films: Any) -> np.ndarray:
    """Returns the group of each track, [N] int. All tracks of a group vote on its name."""
    clear = dict(zip(films.clips, films.clarity >= LEAST_CLARITY, strict=True))
    return grouping.group(
        model, films.clips, [films.vectors], films.apart, clarity=clear, for_votes=True
    )


def decide(
    model: backend.Backend, films: Any, people: np.ndarray, chosen: np.ndarray, owner: np.ndarray
) -> SimpleNamespace:
    """Enrols photos, and names tracks.

    `people` [P] are the people, and `chosen` [P, K, D] the vectors of their photos. Tracks with the
    same `owner` [N] vote on one name. Returns `named` [N] bool, `best` [N], the most likely person,
    `low` [N] bool, True for a name below one half, and `singly`, N answers without votes.
    """
    rows = np.repeat(np.arange(len(people)), chosen.shape[1])
    enrolled = model.enrol([*map(str, people)], chosen.reshape(len(rows), -1), rows)
    index, known = Index(model, [enrolled]), len(people)
    by_group = [RULE.answer(x, cards=True) for x in index.nearest([films.vectors], known, owner)]
    singly = [RULE.answer(x, cards=True) for x in index.nearest([films.vectors], known)]
    decided = dict[int, answers.Answer]()
    for group, vote in enumerate(by_group):
        rows = np.flatnonzero(owner == group).tolist()
        joined = answers.join_answers(vote, [singly[row] for row in rows])
        decided |= zip(rows, joined, strict=True)
    decided = [decided[row] for row in range(len(owner))]
    named = np.array([answer.identity is not None for answer in decided])
    best = np.array([int(answer.best[0][0]) for answer in decided])
    low = named & np.array([x.probability < answers.MIN_NAMED_PROBABILITY for x in decided])
    return SimpleNamespace(named=named, best=best, low=low, singly=singly)


def measure(films: Any, photos: Any, *, known: int, count: int, draws: int, votes=True) -> Any:
    """Returns name -> mean over `draws` random draws, of the figures that README.md explains.

    A draw enrols `known` people with `count` photos each. `photos` [P, K, D] are vectors of K
    photos of P people. If `votes` is True, all tracks of a group get the same name.
    """
    model = backend.make_card_backend({"face": CARD})
    rng, figures, probabilities, rights = np.random.default_rng(0), [], [], []
    clear = films.clarity >= LEAST_CLARITY
    groups = group_for_votes(model, films)
    owner = groups if votes else np.arange(len(groups))
    for _ in range(draws):
        people = rng.permutation(len(photos))[:known]
        chosen = photos[people][:, rng.permutation(photos.shape[1])[:count]]
        decided = decide(model, films, people, chosen, owner)
        is_known, named, singly = np.isin(films.people, people), decided.named, decided.singly
        right = is_known & (decided.best == films.people)
        unknown = np.flatnonzero(~named & clear)
        names, truth = [films.clips[row] for row in unknown], films.people[unknown]
        clarity = dict(zip(names, films.clarity[unknown], strict=True))
        vectors = [films.vectors[unknown]]
        labels = grouping.group(model, names, vectors, films.apart, clarity=clarity)
        figures.append({
            "right": np.mean(named[is_known] & right[is_known]),
            "wrong": np.mean(named[is_known] & ~right[is_known]),
            "strangers named": np.mean(named[~is_known]),
            "right below 0.5": np.mean(decided.low[is_known] & right[is_known]),
            "strangers below 0.5": np.mean(decided.low[~is_known]),
            **measure_groups(labels, truth),
        })  # fmt: skip
        probabilities.append([own.probability for own in singly])
        rights.append(is_known & (films.people == [int(own.best[0][0]) for own in singly]))
    means = {name: float(np.mean([x[name] for x in figures])) for name in figures[0]}
    error = compute_calibration_error(np.concatenate(probabilities), np.concatenate(rights))
    return means | {"ECE": error}


def measure_groups(labels: np.ndarray, people: np.ndarray) -> dict[str, float]:
    """Returns two figures of N clips in the groups `labels` [N]. `people` [N] is the truth."""
    groups = [people[labels == label] for label in np.unique(labels)]
    main_people = [np.unique(group, return_counts=True)[1].max() for group in groups]
    return {
        "groups per person": len(main_people) / len(np.unique(people)),
        "purity": np.sum(main_people) / len(people),
    }


def group_few(films: Any, photos: Any, *, each: int, draws: int) -> dict[str, float]:
    """Groups `each` photos of people, and as many clear tracks of others; as `measure_groups`."""
    model, rng, figures = backend.make_card_backend({"face": CARD}), np.random.default_rng(0), []
    clear = films.clarity >= LEAST_CLARITY
    strangers = set(films.people[films.people < 0])
    others = [np.flatnonzero(clear & (films.people == x)) for x in strangers]
    for _ in range(draws):
        tracks = np.concatenate([rng.permutation(rows)[:each] for rows in others])
        chosen = photos[:, rng.permutation(photos.shape[1])[:each]]
        vectors = np.concatenate([films.vectors[tracks], chosen.reshape(-1, photos.shape[2])])
        people = np.append(films.people[tracks], np.repeat(np.arange(len(photos)), each))
        names = [f"{n:03}" for n in range(len(people))]
        figures.append(measure_groups(grouping.group(model, names, [vectors]), people))
    return {name: float(np.mean([x[name] for x in figures])) for name in figures[0]}


def load(folder: Path, pictures: int = 1) -> tuple[SimpleNamespace, np.ndarray]:
    """Returns the tracks, and the unit vectors [P, K, D] float32 of K photos of P people."""
    with np.load(folder / "tracks.npz") as file:
        data = dict(file)
    photos = unit(data["photo_vector"]).astype(np.float32)
    photos = photos.reshape(data["photo_person"].max() + 1, -1, photos.shape[1])
    return split_tracks(data, pictures), photos


if __name__ == "__main__":
    args = common.parse(__doc__, tracks="", pictures=1)
    films, photos = load(Path(args.tracks), args.pictures)
    for known, count, votes in itertools.product((8, len(photos)), (1, 2, 3), (False, True)):
        figures = measure(films, photos, known=known, count=count, draws=20, votes=votes)
        cells = " | ".join(f"{name} {value:.3f}" for name, value in figures.items())
        common.print_text(f"{known} people, {count} photos, votes {votes} | {cells}")
    for each in (3, 8):
        figures = group_few(films, photos, each=each, draws=20)
        cells = " | ".join(f"{name} {value:.3f}" for name, value in figures.items())
        common.print_text(f"{each} clips each | {cells}")
