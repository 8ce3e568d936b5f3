"""Computes from the distances of unit vectors how likely it is that clips show the same person.

A unit vector is x = m + y + e: m is the mean of the population, y belongs to the person, and e to
the clip. The variance of y, summed over all dimensions, is B, and the variance of e is W. Each
network that computes vectors has a card, a JSON file. The card has four numbers: the mean and the
standard deviation of the cosines of two clips of a person, and of the cosines of clips of two
people. The four numbers give W, B and two effective numbers of dimensions, n_same and n_different.
The squared distance |x - x'|^2 = 2 - 2 cosine of two clips has a gamma distribution:

    two clips of a person:    the mean is 2 W, and the shape is n_same / 2
    clips of two people:      the mean is 2 (W + B), and the shape is n_different / 2

The sum of the squares of n independent Gaussians of equal variance has such a distribution with the
shape n / 2. The density of x is the gamma density of the squared distance s, divided by
s^(n_different / 2 - 1): all directions in n_different dimensions are equally likely.

Vectors are scaled to unit length, which makes their cosines spread less. `count_shape` corrects
n_same and n_different for this effect.

The vectors of the enrolled people determine the posterior of m. The card may contain a prior mean.

Clips of the same day share a part of e. So the vectors of a person with k clips differ less from
each other than the card predicts. They count as fewer than k clips, see `effective_count`.

Source: the posteriors are from Brümmer and de Villiers 2010, The speaker partitioning problem
(two-covariance model), with a flat prior of m. The gamma densities and the counts are not from
this paper.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

PRIOR_CLIPS = 1.0  # weight, in clips, of the prior that clips share no part of e
MIN_SQUARE = 0.01  # lower limit of a squared distance, as a share of W
# The weight of the mean in a card, in enrolled people. It is low because populations differ: when
# 2 to 8 of the women in group photos were enrolled, 20 to 30 % of the other women got a name with a
# weight of 24, 9 to 15 % with a weight of 3, and 10 to 15 % without the mean.
CARD_PEOPLE = 3
LEAST_CLARITY = 0.35  # faces of lower clarity are unclear: even two people look alike


class Distances(NamedTuple):
    """The distributions of the distance between unit vectors of one person, and of two people."""

    within: float  # W, the variance of the vectors of a person, summed over the dimensions
    between: float  # B, the variance of the means of people, summed over the dimensions
    same: float  # shape of the gamma distribution of squared distances within a person
    different: float  # shape of the gamma distribution of squared distances between two people


class Population(NamedTuple):
    """The posterior of m, the mean vector of the population."""

    mean: np.ndarray  # [D] float64
    variance: float  # summed over the dimensions


def from_cosines(same: tuple[float, float], different: tuple[float, float]) -> Distances:
    """Computes the distributions of distances from statistics of cosines.

    `same` is the mean and the standard deviation of the cosine of two clips of the same person.
    `different` is the mean and the standard deviation for clips of two people.
    """
    # Distances between people do not spread less than distances within a person. So the shape for
    # a person is at most the shape for two people.
    within, total = 1 - same[0], 1 - different[0]
    shapes = count_shape(within, same[1]), count_shape(total, different[1])
    return Distances(within, total - within, min(shapes), shapes[1])


def count_shape(variance: float, deviation: float) -> float:
    """Returns the shape parameter of the gamma distribution of squared distances.

    `variance` is 1 - the mean of the cosines. `deviation` is the standard deviation of the cosines.
    """
    # Before scaling, let a vector be c + g, where |c|^2 = 1 - V, and g is Gaussian in n dimensions
    # across c, with the variance V. Then |c + g|^2 = 1 + d, where d has the variance 2 V^2 / n. To
    # first order, the cosine of c + g and c + h is (1 - V) + g.h - (1 - V) (d + d') / 2, and its
    # variance is V^2 / n + (1 - V)^2 V^2 / n.
    return (variance / deviation) ** 2 * (1 + (1 - variance) ** 2) / 2


def effective_count(distances: Distances, count: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Computes the effective number of clips of each of K people, [K] float64.

    If the clips of a person differ less than `distances.within` predicts, they count as fewer
    clips. `count` [K] is the number of clips of each person. `square` [K] is the squared length of
    the mean of each person's unit vectors.
    """
    # k clips have a share r of their variance W in common, so their mean has the variance
    # (r + (1 - r) / k) W, as the mean of the effective number of independent clips. The spread of
    # the clips about their mean gives an estimate of r.
    count = np.asarray(count, np.float64)
    free = count * (1 - square) / distances.within  # (k - 1) (1 - r), on average
    unshared = np.minimum((free + PRIOR_CLIPS) / (np.maximum(count - 1, 0) + PRIOR_CLIPS), 1.0)
    return 1 / (1 - unshared + unshared / np.maximum(count, 1))


def weigh(distances: Distances, effective: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the weights of K people in the estimate of m, the mean of the population, [K] float.

    `distances` has the variances. `effective` [K] are the effective numbers of clips, see
    `effective_count`. If the number of clips in `counts` [K] is 0, the weight is 0.
    """
    return np.where(counts > 0, 1 / (distances.between + distances.within / effective), 0)


def population(
    distances: Distances, mean: np.ndarray | None, weighed: Iterable[tuple[np.ndarray, float]]
) -> Population:
    """Computes the posterior of the mean vector of the population.

    `mean` [D] is the prior mean from the card of the net (a JSON file), or None. `weighed` has a
    pair for each block of enrolled people: the weighted sum of their mean vectors, [D], and the sum
    of the weights, see `weigh`.
    """
    sums, totals = map(list, zip(*weighed, strict=True))
    if mean is not None:
        prior = CARD_PEOPLE / (distances.between + distances.within)
        sums, totals = [*sums, prior * mean], [*totals, prior]
    total = max(sum(totals), 1e-12)
    return Population(np.asarray(sum(sums) / total), 1 / total)


class Posterior(NamedTuple):
    """The posterior of the mean vectors of N people, given their clips."""

    share: np.ndarray  # [N] posterior mean = share x mean of clips + (1 - share) x mean of people
    variance: np.ndarray  # [N] variance of the posterior, summed over the dimensions


def posterior(distances: Distances, known: Population, effective: np.ndarray) -> Posterior:
    """Computes the posterior of the mean vector of each of N people.

    `distances` has the variances. `known` is the result of `population`. `effective` [N] are the
    effective numbers of clips of the people, see `effective_count`.
    """
    noise = distances.within / effective
    share = distances.between / (distances.between + noise)
    return Posterior(share, share * noise + (1 - share) ** 2 * known.variance)


def person_log_density(
    distances: Distances, square: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """Computes the log density of clips, each under the hypothesis that it shows a given person.

    `square` is the squared distance between the clip and the posterior mean of the person.
    `variance` is the expected value of `square` under the hypothesis. `square` and `variance` are
    float arrays that broadcast. Only the difference from `stranger_log_density` has a meaning,
    because the two functions leave out the same terms.
    """
    shape = distances.same
    square = np.maximum(square, MIN_SQUARE * distances.within)
    density = np.log(square)
    density *= shape - distances.different
    density -= square * (shape / variance)
    density += shape * np.log(shape / variance)
    return density


def stranger_log_density(
    distances: Distances, square: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """Computes the log density of clips, each under the hypothesis that it shows a stranger.

    `square` is the squared distance between the clip and the mean of the population. `variance` is
    the expected value of `square` under the hypothesis. For the rest, see `person_log_density`.
    """
    shape = distances.different
    constant = math.lgamma(distances.same) - math.lgamma(shape)
    return constant + shape * np.log(shape / variance) - shape * square / variance


def pair_log_ratios(
    distances: Distances, square: np.ndarray, noise: np.ndarray, clarity: np.ndarray | float = 1.0
) -> np.ndarray:
    """Computes log(p(clips | one person) / p(clips | two people)) for pairs of groups of clips.

    Args:
      distances: the distributions of distances between clips of one person, and of two people.
      square: the squared distance between the means of the two groups.
      noise: 1 / k + 1 / k' for groups of k and k' clips; more if the clips of a group are alike.
      clarity: factor on the variance between people, 0 to 1: people differ less in unclear clips.
    """
    # The distances of the groups from the mean m of people are not used. People in a film may all
    # differ from m in the same direction, and would look like one person.
    same = distances.within * noise
    different = same + 2 * distances.between * clarity
    square = np.maximum(square, MIN_SQUARE * distances.within)
    log_density = person_log_density(distances, square, same)
    return log_density - stranger_log_density(distances, square, different)
