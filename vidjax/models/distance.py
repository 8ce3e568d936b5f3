"""One person or two, by the distance of unit vectors: what the card of a net says.

A unit vector is x = m + y + e: m is the mean of the population, y belongs to the person, and e to
the clip. The variance of y, summed over all dimensions, is B, and the variance of e is W. The
card of a net gives the mean and the deviation of the cosines of two clips of one person, and of
clips of two people. The four numbers give W, B and two effective numbers of directions:

    |x - x'|^2 of one person   has the mean 2 W, and spreads as the sum of n_same squares
    |x - x'|^2 of two people   has the mean 2 (W + B), and spreads as the sum of n_different squares

A sum of n equal squares of Gaussians has a gamma distribution with the shape n / 2. The difference
e has a direction that is uniform in n_different dimensions, and a squared length with a gamma
distribution. Vectors of the population are Gaussian in these dimensions. So all densities are
densities of one space, and their ratios add up to probabilities for any number N of people.

The N people who are enrolled say where m is. The posterior of m has the variance (W + B) / N for
people with one clip each. For N = 1 the ratio is the ratio of the two gamma densities.

Clips of one day share a part of e. The vectors of a person with k clips then differ less from each
other than the card says. So k clips count as `effective_count` clips.

Source: the posteriors are those of Brümmer and de Villiers 2010, The speaker partitioning problem
(two-covariance model), with a flat prior of m. The gamma densities and the counts are ours.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The prior says that clips share no part of e. It counts as one clip.
PRIOR_CLIPS = 1.0
LEAST_SQUARE = 0.01  # of W: a squared distance below it counts as this one


class Distances(NamedTuple):
    """How far unit vectors of one net are from each other.

    Attributes:
      within: W, the variance of a person's vectors, summed over the dimensions.
      between: B, the variance of the means of people.
      same: shape of the gamma distribution of squared distances in one person, n_same / 2.
      different: the same of two people, n_different / 2.
    """

    within: float
    between: float
    same: float
    different: float


class Population(NamedTuple):
    """The mean m of all people, [D] float64, and the variance of its posterior."""

    mean: np.ndarray
    variance: float


def of_cosines(same: tuple[float, float], different: tuple[float, float]) -> Distances:
    """Returns the distances of a card: mean and deviation of cosines, of one person and of two.

    The shape is (mean / deviation)^2. Two people do not spread less than one person does: the
    shape of one person is at most the shape of two.
    """
    within, total = 1 - same[0], 1 - different[0]
    shapes = (within / same[1]) ** 2, (total / different[1]) ** 2
    return Distances(within, total - within, min(shapes), shapes[1])


def effective_count(distances: Distances, count: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Returns the number of independent clips [K] that tell as much as the clips of K groups.

    Clips of one day share a part r of e. The variance of their mean is (r + (1 - r) / k) W, and the
    variance of one clip about the mean tells r.

    Args:
      distances: what the card says.
      count: [K] number k of clips.
      square: [K] squared length of the mean of the unit vectors.
    """
    count = np.asarray(count, np.float64)
    free = count * (1 - square) / distances.within  # (k - 1) (1 - r), on average
    own = np.minimum((free + PRIOR_CLIPS) / (np.maximum(count - 1, 0) + PRIOR_CLIPS), 1.0)
    return 1 / (1 - own + own / np.maximum(count, 1))


def population(
    distances: Distances,
    means: Sequence[np.ndarray],
    effective: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
) -> Population:
    """Returns the posterior of m, given people in blocks.

    Args:
      distances: what the card says.
      means: [P, D] of each block, the means of the unit vectors of people.
      effective: [P] of each block, the effective numbers of clips.
      counts: [P] of each block, the numbers of clips. People without a clip do not count.
    """
    weights = [
        np.where(count > 0, 1 / (distances.between + distances.within / k), 0)
        for k, count in zip(effective, counts, strict=True)
    ]
    total = max(float(sum(weight.sum() for weight in weights)), 1e-12)
    mean = sum(weight @ mean for weight, mean in zip(weights, means, strict=True)) / total
    return Population(np.asarray(mean), 1 / total)


class Posterior(NamedTuple):
    """What clips tell of the vectors m + y of N people.

    Attributes:
      share: [N] how far the posterior mean is on the way from m to the mean of a person's clips.
      variance: [N] of the posterior, summed over the dimensions.
    """

    share: np.ndarray
    variance: np.ndarray


def posterior(distances: Distances, known: Population, effective: np.ndarray) -> Posterior:
    """Returns what `effective` [N] clips tell of people, given the population."""
    noise = distances.within / effective
    share = distances.between / (distances.between + noise)
    return Posterior(share, share * noise + (1 - share) ** 2 * known.variance)


def same_density(distances: Distances, square: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Returns log densities at the squared distances `square` from people.

    They lack the terms that all people have in common: `new_density` lacks them, too. The mean of
    the squared distance is `variance`. Both are float arrays that broadcast.
    """
    shape = distances.same
    square = np.maximum(square, LEAST_SQUARE * distances.within)
    found = np.log(square)
    found *= shape - distances.different
    found -= square * (shape / variance)
    found += shape * np.log(shape / variance)
    return found


def new_density(distances: Distances, square: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Returns log densities of somebody new, less the terms that `same_density` leaves out.

    `square` is the squared distance from the mean m, whose expectation is `variance`.
    """
    shape = distances.different
    constant = math.lgamma(distances.same) - math.lgamma(shape)
    return constant + shape * np.log(shape / variance) - shape * square / variance


def pair_log_ratios(distances: Distances, square: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns log(p(d | one person) / p(d | two people)) of the distance d of two groups.

    `square` is the squared distance of their means. `noise` is 1 / k + 1 / k' for groups of k and
    k' effective clips.
    """
    own = distances.within * noise
    other = own + 2 * distances.between
    square = np.maximum(square, LEAST_SQUARE * distances.within)
    return same_density(distances, square, own) - new_density(distances, square, other)
