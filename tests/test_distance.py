"""Probabilities by the card of a net: densities, calibration, photos of one day, groups."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import decision
from tests.helpers.cases import quick_first
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery import grouping
from vidjax.apps.video import cards
from vidjax.models import distance

WIDTH = 128
SAME, DIFFERENT = (0.958, 0.0146), (0.8305, 0.0352)  # cosines of dlib's vectors of faces


DLIB = distance.of_cosines(SAME, DIFFERENT)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def made_backend(same=SAME, different=DIFFERENT):
    card = cards.BackEnd(
        centre=[0.0] * WIDTH, same=same, different=different, pairs=(1, 1), data="made"
    )
    return backend_lib.make_card_backend({"face": card})


class Population:
    """Vectors with equal variances of people, and of clips, in some directions, a third shared."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        within, between, same, different = DLIB
        # The spread of two people is the spread of B in n directions plus the spread of W.
        square = (within + between) ** 2 / different - within**2 / same
        n_within, n_between = round(2 * same), round(2 * between**2 / square)
        self.within = np.where(np.arange(WIDTH) < n_within, within / n_within, 0)
        first = n_within * 2 // 3
        places = (np.arange(WIDTH) >= first) & (np.arange(WIDTH) < first + n_between)
        self.between = np.where(places, between / n_between, 0)
        self.mean = np.sqrt(max(1 - within - between, 0)) * np.eye(WIDTH)[-1]

    def people(self, count):
        return self.mean + self.rng.normal(size=(count, WIDTH)) * np.sqrt(self.between)

    def noise(self, *shape, share=1.0):
        return self.rng.normal(size=(*shape, WIDTH)) * np.sqrt(share * self.within)

    def photos(self, people, count, shared=0.0):
        """[N, count, D]: photos of people, of one day that they share a part of the noise of."""
        day = self.noise(len(people), 1, share=shared)
        return unit(people[:, None] + day + self.noise(len(people), count, share=1 - shared))


def log_probabilities(backend, photos, clips):
    """Returns log probabilities [Q, 1 + N]; photos are [N, k, D]."""
    people, count = photos.shape[:2]
    names = [f"{number:05}" for number in range(people)]
    owner = np.repeat(np.arange(people), count)
    enrolled = backend.enrol(names, photos.reshape(-1, WIDTH).astype(np.float32), owner)
    index = backend_lib.Index(backend, [enrolled])
    return np.array(list(index.search([clips.astype(np.float32)])))


def trial(people, count, shared=0.0, clips=150, seed=0):
    """Returns the mean of P(new), and the share of known named; half of the clips are strangers."""
    backend = made_backend()
    made = Population(seed)
    known, strangers = made.people(people), made.people(clips)
    shown = made.rng.integers(0, people, clips)
    asked = unit(np.concatenate([known[shown], strangers]) + made.noise(2 * clips))
    logs = log_probabilities(backend, made.photos(known, count, shared), asked)
    best, sure = logs[:clips, 1:].argmax(axis=1), np.exp(logs[:clips, 1:].max(axis=1))
    return np.exp(logs[:, 0]).mean(), np.mean((best == shown) & (sure > 0.5))


def test_one_person_is_compared_by_two_gamma_densities():
    backend, rng = made_backend(), np.random.default_rng(0)
    within, between, same, different = DLIB
    photo = unit(rng.normal(size=WIDTH))
    clips = unit(photo + rng.normal(size=(20, WIDTH)) * 0.02)
    logs = log_probabilities(backend, photo[None, None], clips)
    square = np.sum((clips - photo) ** 2, axis=1)
    one = stats.gamma.logpdf(square, same, scale=2 * within / same)
    two = stats.gamma.logpdf(square, different, scale=2 * (within + between) / different)
    np.testing.assert_allclose(logs[:, 1] - logs[:, 0], one - two, atol=1e-4)


@pytest.mark.parametrize("people", [1, 2, 7])
def test_gaussian_vectors_have_the_probabilities_of_a_joint_density(people):
    """All is Gaussian where both shapes are D / 2: against joint densities, m integrated out."""
    rng, width, wide = np.random.default_rng(people), 6, 1e6
    found = distance.Distances(0.3, 0.9, width / 2, width / 2)
    counts = rng.integers(1, 5, people)
    owner = np.repeat(np.arange(people), counts)
    photos = rng.normal(size=(len(owner), width))
    clip = rng.normal(size=width)
    means = np.stack([photos[owner == n].mean(axis=0) for n in range(people)])

    known = distance.population(found, [means], [counts.astype(float)], [counts])
    share, variance = distance.posterior(found, known, counts.astype(float))
    centres = known.mean + share[:, None] * (means - known.mean)
    square = np.sum((clip - centres) ** 2, axis=1)
    ratios = distance.same_density(found, square, variance + found.within) - distance.new_density(
        found,
        np.array(np.sum((clip - known.mean) ** 2)),
        np.array(found.within + found.between + known.variance),
    )

    def density(of):
        """The log density of all photos and the clip, where the clip shows the person `of`."""
        who = np.append(owner, of)
        covariance = (
            wide + (found.between * (who[:, None] == who) + found.within * np.eye(len(who))) / width
        )
        both = np.vstack([photos, clip])
        return sum(stats.multivariate_normal.logpdf(x, cov=covariance) for x in both.T)

    wanted = [density(n) - density(people) for n in range(people)]
    np.testing.assert_allclose(ratios, wanted, atol=1e-3)


@pytest.mark.parametrize("count", quick_first([3, 1, 10]))
@pytest.mark.parametrize("people", quick_first([50, 5, 500]))
def test_somebody_new_is_as_probable_as_strangers_are_frequent(people, count):
    new = np.mean([trial(people, count, seed=seed)[0] for seed in range(2)])
    assert abs(new - 0.5) < 0.05


@pytest.mark.parametrize("people", quick_first([5, 500]))
@pytest.mark.parametrize("count", quick_first([3, 10]))
def test_photos_of_one_day_do_not_make_the_known_strangers(people, count):
    new = np.mean([trial(people, count, shared=0.5, seed=seed)[0] for seed in range(2)])
    assert abs(new - 0.5) < 0.1


@pytest.mark.slow
def test_more_photos_never_name_fewer():
    for shared in (0.0, 0.7):
        named = [
            np.mean([trial(100, count, shared, seed=seed)[1] for seed in range(2)])
            for count in (1, 3, 10)
        ]
        assert named[0] <= named[1] + 0.01 and named[1] <= named[2] + 0.01


def test_equal_photos_count_as_one():
    found = DLIB
    count = np.array([1, 2, 10, 10])
    free = 1 - found.within * (count[3] - 1) / count[3]  # as different as the card says
    counted = distance.effective_count(found, count, np.array([1, 1, 1, free]))
    np.testing.assert_allclose(counted, [1, 4 / 3, 1.1, 10], atol=0.02)


def test_groups_are_people():
    backend = made_backend()
    made = Population(0)
    clips, truth = made.photos(made.people(30), 20).reshape(-1, WIDTH), np.repeat(np.arange(30), 20)
    names = [f"film{n % 7}.s{n:03}.t00" for n in range(len(clips))]
    labels = grouping.group(backend, names, [clips.astype(np.float32)])
    assert len({*labels.tolist()}) <= 33
    assert purity(labels, truth) > 0.99


def purity(labels, truth):
    parts = [np.unique(truth[labels == n], return_counts=True)[1].max() for n in {*labels.tolist()}]
    return sum(parts) / len(truth)


@pytest.mark.slow
def test_more_clips_than_are_compared_at_once_are_grouped_film_by_film(monkeypatch):
    monkeypatch.setattr(grouping, "MAX_GROUPED_CLIPS", 50)
    backend = made_backend()
    made = Population(1)
    people = made.people(12)
    clips, truth = made.photos(people, 40).reshape(-1, WIDTH), np.repeat(np.arange(12), 40)
    names = [f"film{n % 9}.s{n:03}.t00" for n in range(len(clips))]
    labels = grouping.group(backend, names, [clips.astype(np.float32)])
    assert len({*labels.tolist()}) <= 14
    assert purity(labels, truth) > 0.99
    alone = made.photos(made.people(120), 1)[:, 0].astype(np.float32)  # nobody twice
    found = grouping.group(backend, [f"photo{n}" for n in range(120)], [alone])
    assert len({*found.tolist()}) >= 110


def test_clips_that_are_seen_at_one_time_are_two_people():
    backend = made_backend()
    made = Population(2)
    clips = made.photos(made.people(1), 4)[0].astype(np.float32)
    names = ["a", "b", "c", "d"]
    assert grouping.group(backend, names, [clips]).tolist() == [0, 0, 0, 0]
    labels = grouping.group(backend, names, [clips], [("a", "c")])
    assert labels[0] != labels[2]


def test_no_clip_is_in_no_group():
    assert grouping.group(made_backend(), [], [np.zeros((0, WIDTH), np.float32)]).shape == (0,)
    assert answers_lib.name_groups(["b", "a", "c"], np.array([4, 2, 4])) == {
        "b": "unknown 1", "a": "unknown 2", "c": "unknown 1",
    }  # fmt: skip


def test_people_of_films_are_named_and_strangers_are_grouped():
    folder = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks"
    if not folder.exists():
        pytest.skip("no folder tracks beside VIDJAX_REAL_DATA")
    films, photos = decision.load(folder)
    for count, right in ((1, 0.88), (3, 0.9)):
        found = decision.measure(films, photos, known=8, count=count, draws=5)
        assert found["right"] >= right and found["wrong"] <= 0.01
        assert found["strangers named"] <= 0.05 and found["ECE"] <= 0.06
        assert found["groups per person"] <= 1.3 and found["purity"] >= 0.95
