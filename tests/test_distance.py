"""Probabilities by the card of a net: densities, calibration, photos of one day, groups."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import decision
from tests.helpers.cases import quick_first
from tests.helpers.embeddings import unit
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery import grouping
from vidjax.apps.video import cards
from vidjax.models import distance

WIDTH = 128
SAME, DIFFERENT = (0.958, 0.0146), (0.8305, 0.0352)  # cosines of dlib's vectors of faces
DLIB = distance.from_cosines(SAME, DIFFERENT)
FITTED = {"same": SAME, "different": DIFFERENT, "pairs": (1, 1), "data": "made"}
CARD = cards.BackEnd(centre=[0.0] * WIDTH, **FITTED)
BACKEND = backend_lib.make_card_backend({"face": CARD})


class Population:
    """Vectors with equal variances of people, and of clips, in some directions, a third shared."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        within, between, same, different = DLIB
        # The spread of two people is the spread of B in n directions plus the spread of W.
        square = (within + between) ** 2 / different - within**2 / same
        n_within, n_between = round(2 * same), round(2 * between**2 / square)
        self.within, self.between = np.zeros((2, WIDTH))
        self.within[:n_within] = within / n_within
        first = n_within * 2 // 3
        self.between[first : first + n_between] = between / n_between
        self.mean = np.sqrt(max(1 - within - between, 0)) * np.eye(WIDTH)[-1]

    def people(self, count):
        return self.mean + self.rng.normal(size=(count, WIDTH)) * np.sqrt(self.between)

    def noise(self, *shape, share=1.0):
        return self.rng.normal(size=(*shape, WIDTH)) * np.sqrt(share * self.within)

    def photos(self, people, count, shared=0.0):
        """[N, count, D]: photos of people, of one day that they share a part of the noise of."""
        day = self.noise(len(people), 1, share=shared)
        return unit(people[:, None] + day + self.noise(len(people), count, share=1 - shared))


def log_probabilities(photos, clips):
    """Returns log probabilities [Q, 1 + N]; photos are [N, k, D]."""
    people, count = photos.shape[:2]
    names, owner = [f"{n:05}" for n in range(people)], np.repeat(np.arange(people), count)
    enrolled = BACKEND.enrol(names, photos.reshape(-1, WIDTH).astype(np.float32), owner)
    index = backend_lib.Index(BACKEND, [enrolled])
    return np.array(list(index.search([clips.astype(np.float32)])))


def test_log_odds_of_one_person_are_a_ratio_of_gamma_densities():
    rng, (within, between, same, different) = np.random.default_rng(0), DLIB
    photo = unit(rng.normal(size=WIDTH))
    clips = unit(photo + rng.normal(size=(20, WIDTH)) * 0.02)
    logs = log_probabilities(photo[None, None], clips)
    square = np.sum((clips - photo) ** 2, axis=1)
    same_person = stats.gamma.logpdf(square, same, scale=2 * within / same)
    other_person = stats.gamma.logpdf(square, different, scale=2 * (within + between) / different)
    np.testing.assert_allclose(logs[:, 1] - logs[:, 0], same_person - other_person, atol=1e-4)


def test_effective_number_of_photos_is_small_if_photos_are_alike():
    count = np.array([1, 2, 10, 10])
    free = 1 - DLIB.within * 0.9  # as different as the card says
    counted = distance.effective_count(DLIB, count, np.array([1, 1, 1, free]))
    np.testing.assert_allclose(counted, [1, 4 / 3, 1.1, 10], atol=0.02)


@pytest.mark.parametrize("people", [1, 7])
def test_log_odds_of_gaussian_vectors_equal_ratios_of_joint_densities(people):
    """Shapes D / 2 give Gaussian distances. The joint densities integrate the mean out."""
    rng, width, wide = np.random.default_rng(people), 6, 1e6
    card = distance.Distances(0.3, 0.9, width / 2, width / 2)
    counts = rng.integers(1, 5, people)
    owner = np.repeat(np.arange(people), counts)
    photos, clip = rng.normal(size=(len(owner), width)), rng.normal(size=width)
    means = np.stack([photos[owner == n].mean(axis=0) for n in range(people)])

    known = distance.population(card, [means], [counts.astype(float)], [counts])
    share, variance = distance.posterior(card, known, counts.astype(float))
    centres = known.mean + share[:, None] * (means - known.mean)
    square, far = (np.sum((clip - x) ** 2, axis=-1) for x in (centres, known.mean))
    new = distance.stranger_log_density(
        card, np.array(far), np.array(card.within + card.between + known.variance)
    )
    ratios = distance.person_log_density(card, square, variance + card.within) - new

    def density(of):
        """The log density of all photos and the clip, where the clip shows the person `of`."""
        who, both = np.append(owner, of), np.vstack([photos, clip])
        own = card.between * (who[:, None] == who) + card.within * np.eye(len(who))
        return sum(stats.multivariate_normal.logpdf(x, cov=wide + own / width) for x in both.T)

    wanted = [density(n) - density(people) for n in range(people)]
    np.testing.assert_allclose(ratios, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("people", "count"), quick_first([(50, 3), (5, 1), (500, 10)], mark=pytest.mark.nightly)
)
def test_mean_probability_of_a_stranger_equals_the_share_of_strangers(people, count):
    """Half of the clips show strangers. Photos of a person may share the noise of one day."""
    for shared, most in ((0.0, 0.05), (0.5, 0.1)):
        probabilities = []
        for seed in range(2):
            made = Population(seed)
            known, strangers = made.people(people), made.people(150)
            person = made.rng.integers(0, people, 150)
            clips = unit(np.concatenate([known[person], strangers]) + made.noise(300))
            logs = log_probabilities(made.photos(known, count, shared), clips)
            probabilities.append(np.exp(logs[:, 0]).mean())
        assert abs(np.mean(probabilities) - 0.5) < most


def groups(people, count):
    """Returns the number of groups of clips of people, and the share of their main people."""
    made = Population(0)
    clips, truth = made.photos(made.people(people), count), np.repeat(np.arange(people), count)
    names = [f"film{n % 7}.s{n:03}.t00" for n in range(people * count)]
    labels = grouping.group(BACKEND, names, [clips.reshape(-1, WIDTH).astype(np.float32)])
    parts = [np.bincount(truth[labels == n]).max() for n in {*labels.tolist()}]
    return len(parts), sum(parts) / len(truth)


def test_grouping_makes_one_group_per_person(monkeypatch):
    count, purity = groups(20, 10)
    assert count <= 22 and purity > 0.99
    # More clips than are compared at once are grouped film by film.
    monkeypatch.setattr(grouping, "MAX_GROUPED_CLIPS", 50)
    count, purity = groups(12, 20)
    assert count <= 14 and purity > 0.99
    assert groups(120, 1)[0] >= 110  # nobody twice


def test_clips_seen_at_the_same_time_are_in_different_groups():
    made = Population(2)
    clips = [made.photos(made.people(1), 4)[0].astype(np.float32)]
    assert grouping.group(BACKEND, [*"abcd"], clips).tolist() == [0, 0, 0, 0]
    labels = grouping.group(BACKEND, [*"abcd"], clips, [("a", "c")])
    assert labels[0] != labels[2]
    assert grouping.group(BACKEND, [], [clips[0][:0]]).shape == (0,)
    assert answers_lib.name_groups(["b", "a", "c"], np.array([4, 2, 4])) == {
        "b": "unknown 1", "a": "unknown 2", "c": "unknown 1",
    }  # fmt: skip


def test_real_people_are_identified_and_strangers_are_grouped():
    folder = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks"
    if not folder.exists():
        pytest.skip("no folder tracks beside VIDJAX_REAL_DATA")
    films, photos = decision.load(folder)
    for count, right in ((1, 0.88), (3, 0.9)):
        measured = decision.measure(films, photos, known=8, count=count, draws=2)
        assert measured["right"] >= right and measured["wrong"] <= 0.01
        assert measured["strangers named"] <= 0.05 and measured["ECE"] <= 0.06
        assert measured["groups per person"] <= 1.3 and measured["purity"] >= 0.95
