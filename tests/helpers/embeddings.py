"""Random vectors of photos: as similar as vectors of dlib, or from the two-covariance model."""

import json
from pathlib import Path

import msgspec
import numpy as np

from vidjax.apps.cards import BackEnd
from vidjax.models import card_backend

# Mean and deviation of the cosine of two vectors of dlib: of one person, and of two people.
SAME, DIFFERENT = (0.958, 0.0146), (0.8305, 0.0352)
WIDTH = 128
DLIB = card_backend.from_cosines(SAME, DIFFERENT)
# The card of dlib's net, as earlier versions of `vidjax convert dlib` wrote it.
DLIB_CARD = json.loads(Path(__file__).with_name("dlib_face.json").read_text())
CARD = BackEnd(**DLIB_CARD["back_end"])
CARD_WITHOUT_MEAN = msgspec.structs.replace(CARD, mean=None)  # for people who are drawn


def unit(x):
    """Returns vectors of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Population:
    """Draws people and photos. The distances of photos are distributed as `distances` says."""

    def __init__(self, seed, distances=DLIB):
        self.rng = np.random.default_rng(seed)
        within, between, same, different = distances
        # The sum of the squared variances of all directions determines the spread of the distance
        # of two people. W and B share a third of the directions of W.
        square = (within + between) ** 2 / different - within**2 / same
        n_within = round(2 * same)
        first = n_within * 2 // 3
        shared = 2 * between * within * (n_within - first) / n_within
        n_between = round(2 * (between**2 + shared) / square)
        self.within, self.between = np.zeros((2, WIDTH))
        self.within[:n_within] = within / n_within
        self.between[first : first + n_between] = between / n_between
        self.mean = np.sqrt(max(1 - within - between, 0)) * np.eye(WIDTH)[-1]

    def people(self, count):
        return self.mean + self.rng.normal(size=(count, WIDTH)) * np.sqrt(self.between)

    def noise(self, *shape, share=1.0):
        return self.rng.normal(size=(*shape, WIDTH)) * np.sqrt(share * self.within)

    def photos(self, people, count, shared=0.0):
        """Returns photos [N, count, D] of `people` [N, D].

        `shared` is the share of the noise that is equal in all photos of a person.
        """
        day = self.noise(len(people), 1, share=shared)
        return unit(people[:, None] + day + self.noise(len(people), count, share=1 - shared))


def exact(rng, people, clips, width, within):
    """Draws unit vectors [people, clips, width] from the two-covariance model.

    The variance between clips of one person is the share `within` of the total variance.
    """
    between = np.geomspace(1, 0.1, width)  # the variance between people, for each dimension
    noise = np.geomspace(1, 0.3, width)[::-1]
    who = np.sqrt((1 - within) * between / between.sum())
    each = np.sqrt(within * noise / noise.sum())
    found = rng.normal(size=(people, 1, width)) * who
    return unit(found + rng.normal(size=(people, clips, width)) * each)
