"""Two-covariance PLDA scores whether vectors of clips belong to the same identity.

A vector is x = m + y + e: m is the mean of all vectors, y ~ N(0, B) belongs to the identity, and e
~ N(0, W) to the clip. The model is computed from three sums over the clips, see `Sums`. An enrolled
clip is added to the sums, and a removed clip is subtracted. The fit takes three eigendecompositions
of [D, D] in float64. This file uses only numpy, so that a gallery of enrolled people does not have
to load JAX. `plda_fit` uses JAX on the device.

Clips of the same day share a part of e. If all clips of each person are from one day, this part is
attributed to y, and W is too small. So galleries set a lower limit for W, see `covariances`. They
also count similar clips of a person as fewer clips, see `count_independent`.

Source: Brümmer and de Villiers 2010, The speaker partitioning problem (two-covariance model). The
shrinkage of both covariances towards a multiple of the identity matrix, and the counts of clips
that are not independent, are not from this paper.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import numpy as np

from vidjax.core.batch import Array

# The typical share of the variance that belongs to the clip and not to the person. It is 0.25 for
# the face vectors of dlib (distances of 0.42 within and 0.85 between people), and 0.54, 0.69 and
# 0.60 for faces, heads and voices of the small real dataset.
WITHIN = 0.5
PRIOR = 10.0  # weight of these typical covariances, in clips and in people
# The clips of a person count as dependent if a log-likelihood ratio exceeds EVIDENCE. Embeddings
# vary as in about DIRECTIONS dimensions, see `plda_fit`.
EVIDENCE, DIRECTIONS = 3.0, 32
SMALLEST_VARIANCE = 1e-6  # of the between-class covariance, in squares of unit vectors


class Sums(NamedTuple):
    """Statistics for the fit of PLDA: number, sum and scatter of the vectors x [D] of clips."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  ([K], clips of each class)
    total: Array  # [K, D], sum of x over the clips of each class
    scatter: Array  # [D, D], sum of x x^T over all clips


class Space(NamedTuple):
    """The coordinates z = (x - mean) @ transform of vectors x, in which PLDA is simple.

    In these coordinates, the covariance within classes is the identity matrix, and the covariance
    between classes is diagonal.
    """

    mean: Array  # [D] float, estimated mean m of all vectors
    transform: Array  # [D, D] float
    ratio: Array  # [D] float, 0 or more: the variances between classes (those within are 1)


class Enrolled(NamedTuple):
    """The coefficients that score clips against K enrolled classes (identities).

    A clip has coordinates z [D], see `Space`. Its log-likelihood ratio of a class against a
    stranger is linear . z + curve . z^2 + constant.
    """

    linear: Array  # [K, D] float, coefficients of z
    constant: Array  # [K] float
    curve: Array  # [U, D] float, coefficients of squares of z, for U different numbers of clips
    kind: Array  # [K] int32, the row of `curve` for each class
    known: Array  # [K] bool, False for classes without a clip


def make_sums(vectors: np.ndarray, labels: np.ndarray, num_classes: int) -> Sums:
    """Computes the sums from which PLDA is fitted, see `Sums`, in float64.

    `vectors` [N, D] are the vectors of clips. `labels` [N] int are the classes of the clips, from
    0 to K - 1, where K is `num_classes`.
    """
    vectors = np.asarray(vectors, np.float64)
    return Sums(*make_totals(vectors, labels, num_classes), vectors.T @ vectors)


def make_totals(
    vectors: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the number of clips [K] and the sum of the vectors [K, D] of each of K classes.

    `vectors` are [N, D]. `labels` [N] int are the classes of the clips, from 0 to K - 1.
    """
    total = np.zeros((num_classes, vectors.shape[1]))
    np.add.at(total, labels, vectors)
    return np.bincount(labels, minlength=num_classes).astype(np.float64), total


def unit_vectors_from(centre: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Computes unit vectors that point from the centre [D] to x [N, D]. Rows of zeros stay 0.

    If a row almost equals the centre, its result is shorter than a unit vector.
    """
    # A power of 2 scales x without rounding, so that the squares of tiny numbers are not 0.
    exponent = np.frexp(np.max(np.abs(x), axis=-1, keepdims=True, initial=0))[1]
    gap = (x - centre) * np.ldexp(1.0, -exponent)
    unit = gap / np.maximum(np.linalg.norm(gap, axis=-1, keepdims=True), 1e-12)
    return np.where(np.any(x != 0, axis=1, keepdims=True), unit, 0.0)


def split_embeddings(values: np.ndarray, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Splits joined embeddings [N, sum of D] into parts, and scales the parts to length 1.

    `widths` is name -> width D of each part, in order. Returns name -> [N, D] float32. Rows of
    zeros stay 0.
    """
    parts, at = {}, 0
    for name, width in widths.items():
        x = values[:, at : at + width].astype(np.float64)
        norm = np.sqrt(np.vecdot(x, x))[:, None]
        parts[name] = (x / np.where(norm > 0, norm, 1.0)).astype(np.float32)
        at += width
    return parts


class Covariances(NamedTuple):
    """The covariances of a modality's vectors, W within and B between classes, before shrinkage."""

    mean: Array  # [D] float, estimated mean of all vectors
    within: Array  # [D] float, eigenvalues of W
    axes: Array  # [D, D] float, eigenvectors of W in the columns
    between: Array  # [D, D] float, B in these axes, with eigenvalues of at least SMALLEST_VARIANCE
    shared: float = 0.0  # share of W that clips of a person are assumed to have in common


def covariances(sums: Sums, least_within: float = 0.0) -> Covariances:
    """Estimates the covariances W within classes and B between classes from at least one clip.

    The estimates are shrunk towards typical covariances, which have the weight of 10 clips in W and
    of 10 people in B. `least_within` is the smallest trace of W, as a share of the mean squared
    length of the vectors. A smaller W is scaled up, at the expense of B.
    """
    # A single photo of each person gives no information about W, and a single person none about B.
    # So typical covariances are added. W is pooled over N - C degrees of freedom, for N clips and C
    # classes. B is the second moment minus W.
    count, total, scatter = (np.asarray(part, np.float64) for part in sums)
    num_clips, num_people = float(np.sum(count)), int(np.sum(count > 0))
    plain, moment = np.sum(total, axis=0) / num_clips, scatter / num_clips
    mean = centre_share(num_people) * plain
    typical = np.trace(moment) / len(moment) * np.eye(len(moment))
    offset = np.outer(plain, mean)
    spread = moment - offset - offset.T + np.outer(mean, mean)
    scaled = total / np.sqrt(np.maximum(count, 1))[:, None]  # [K, D]
    within = scatter - scaled.T @ scaled + PRIOR * WITHIN * typical
    within = within / (num_clips - num_people + PRIOR)
    seen = min(np.trace(within) / max(least_within * np.trace(typical), 1e-12), 1.0)
    within = within / seen
    between = (num_people - 1) * (spread - within) + PRIOR * (1 - WITHIN) * typical
    between = between / (num_people - 1 + PRIOR)
    values, axes = np.linalg.eigh(within)
    floored, turned = np.linalg.eigh(axes.T @ between @ axes)
    between = (turned * np.maximum(floored, SMALLEST_VARIANCE)) @ turned.T
    return Covariances(mean, np.maximum(values, 0.0), axes, between, float(1 - seen))


def centre_share(num_people: float) -> float:
    """Returns the share of the mean that is subtracted from vectors: C / (C + 1/2) for C people."""
    return num_people / (num_people + 0.5)


def make_space(covariances: Covariances, *, within: float | Array, between: float | Array) -> Space:
    """Computes coordinates in which both covariances are diagonal, see `Space`.

    First, both covariances are shrunk towards multiples of the identity matrix: the covariance
    within classes by the share `within`, the covariance between classes by the share `between`. The
    share 0 changes nothing.
    """
    mean_variance = np.maximum(np.mean(covariances.within), SMALLEST_VARIANCE)
    values = (1 - within) * covariances.within + within * mean_variance
    values = np.maximum(values, 1e-6 * mean_variance)  # W may have no variance along some axes
    shrunk = (1 - between) * covariances.between
    mean_between = np.trace(covariances.between) / len(values)
    shrunk = shrunk + between * mean_between * np.eye(len(values), dtype=values.dtype)
    scale = 1 / np.sqrt(values)
    ratio, turned = np.linalg.eigh(scale[:, None] * shrunk * scale)
    return Space(covariances.mean, (covariances.axes * scale) @ turned, np.maximum(ratio, 0.0))


def compute_within(space: Space) -> float:
    """Returns the variance of the vectors of a person's clips, summed over the dimensions."""
    return float(np.sum(np.square(np.linalg.inv(np.asarray(space.transform, np.float64)))))


def count_independent(
    within: float, count: np.ndarray, total: np.ndarray, most: np.ndarray | None = None
) -> np.ndarray:
    """Returns the effective number of independent clips of each of K people, [K] int.

    Args:
      within: the variance of the clips of a person, see `compute_within`.
      count: [K], the number of clips of each person.
      total: [K, D], the sum of the unit vectors of each person's clips.
      most: [K], the upper limit of the result, for example the number of films that show each
        person. The default is `count`.
    """
    # If k clips have a share r of their variance in common, the mean of the clips has the variance
    # r + (1 - r) / k. The spread of the clips about their mean gives an estimate of 1 - r, with
    # DIRECTIONS x (k - 1) degrees of freedom. `evidence` is the log-likelihood ratio against r = 0.
    num = np.maximum(count, 1)
    spread = num * (1 - np.sum(np.square(total / num[:, None]), axis=1)) / within
    unshared = np.clip(spread / np.maximum(num - 1, 1), 1e-12, 1.0)
    freedom = min(DIRECTIONS, total.shape[1]) * (num - 1)
    evidence = freedom / 2 * (unshared - 1 - np.log(unshared))
    effective = np.maximum(np.rint(1 / (1 - unshared + unshared / num)), 1)
    effective = np.where(evidence > EVIDENCE, effective, count)
    most = count if most is None else most
    return np.where(count > 0, np.minimum(effective, most), 0).astype(int)


def enrol(space: Space, count: Array, total: Array) -> Enrolled:
    """Computes the coefficients that score clips against K classes (identities).

    Each class has `count` [K] clips, whose vectors add up to `total` [K, D].
    """
    count = np.asarray(count, np.float64)
    space = Space(*(np.asarray(part, np.float64) for part in space))
    sums = (np.asarray(total) - count[:, None] * space.mean) @ space.transform  # [K, D]
    return compute_coefficients(space, count, sums)


def compute_coefficients(space: Space, count: np.ndarray, sums: np.ndarray) -> Enrolled:
    """Computes the coefficients that `enrol` returns, from coordinates instead of vectors.

    Each class has `count` [K] clips, whose coordinates (see `Space`) add up to `sums` [K, D].
    """
    # After k clips with the mean z, the posterior of the vector of the class has the mean
    # k psi z / (k psi + 1) and the variance psi / (k psi + 1), where psi is `space.ratio`. A new
    # clip adds the variance within classes, which is 1.
    kinds, kind = np.unique(count, return_inverse=True)  # [U], the different numbers of clips
    weight = space.ratio / (kinds[:, None] * space.ratio + 1)  # [U, D]
    variance = 1 + weight
    mean = weight[kind] * sums
    linear = mean / variance[kind]
    spread = np.sum(np.log1p(space.ratio) - np.log(variance), axis=1)  # [U]
    return Enrolled(
        linear=linear,
        constant=(spread[kind] - np.sum(mean * linear, axis=1)) / 2,
        curve=(1 / (1 + space.ratio) - 1 / variance) / 2,
        kind=kind.astype(np.int32),
        known=count > 0,
    )


def pair_log_ratios(
    space: Space, x: np.ndarray, noise: np.ndarray, y: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """Computes log-likelihood ratios [...] that two groups of clips show the same person.

    A ratio is log(p(clips | the same person) / p(clips | two people)). `x` and `y` [..., D] are the
    mean coordinates (see `Space`) of the first and the second group. `noise` and `other` [...] are
    1 / the number of clips of the first and the second group. All arguments broadcast.
    """
    noise, other = noise[..., None], other[..., None]
    share = space.ratio / (space.ratio + noise)
    variance = share * noise + other  # [..., D], of the mean of a group of the same class
    full = space.ratio + other
    gap = y - share * x
    return np.sum(y**2 / full - gap**2 / variance + np.log(full / variance), axis=-1) / 2


def all_log_ratios(ratio: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Computes log-likelihood ratios [n, m] that two clips show the same person.

    `x` [n, D] and `y` [m, D] are the coordinates of clips, see `Space`. Each clip of `x` is
    compared with each clip of `y`. `ratio` [D] is `Space.ratio`.
    """
    # `pair_log_ratios` for groups of one clip, in a form that is exactly symmetric.
    share = ratio / (1 + ratio)
    slope = share / (1 + share)
    curve, constant = slope * share / 2, np.sum(np.log1p(ratio) - np.log1p(share)) / 2
    return constant + (slope * x) @ y.T - (x**2 @ curve)[:, None] - y**2 @ curve


class Settings(NamedTuple):
    """The parameters of a PLDA model.

    Attributes:
      within: share of the covariance within classes that is replaced by a multiple of the identity
        matrix.
      between: share of the covariance between classes that is replaced in the same way.
      scale: factor on the log-likelihood ratios. Without it, the ratios are too confident.
      unenrolled: value that replaces scale x ratio if no clip of an identity has the modality.
      stranger: logarithm of the prior odds of a stranger against all known people together.
      centred: share of the mean of all vectors that is subtracted from each vector.
    """

    within: float | Array
    between: float | Array
    scale: float | Array
    unenrolled: float | Array
    stranger: float | Array
    centred: float | Array


def fit(part: Mapping[str, Array], settings: Settings, least_within: float = 0.0) -> Space:
    """Fits PLDA to the clips of a modality.

    `part` contains the fields of `Sums`, name -> array. Only `within` and `between` of `settings`
    are used. For `least_within`, see `covariances`.
    """
    sums = Sums(part["count"], part["total"], part["scatter"])
    fitted = covariances(sums, least_within)
    return make_space(fitted, within=settings.within, between=settings.between)


def make_blank_space(width: int) -> Space:
    """Returns PLDA parameters that score every clip as 0, for a modality without training clips."""
    return Space(np.zeros(width), np.eye(width), np.zeros(width))


def compute_stranger_logit(
    settings: Settings, num_known: Array | int, xp: ModuleType = np
) -> Array:
    """Returns the logit of a stranger: `settings.stranger` + log(number of known people).

    `xp` is the module that computes the logarithm, numpy or jax.numpy.
    """
    return settings.stranger + xp.log(xp.maximum(num_known, 1))
