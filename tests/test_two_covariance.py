"""Two-covariance PLDA against the densities of normal vectors, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vidjax.models import plda_fit, two_covariance
from vidjax.models.two_covariance import Sums

CLASSES, WIDTH = 7, 5


def made_up():
    """Returns 60 vectors [N, D], labels [N] of 1..6, and their sums."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, CLASSES, 60)
    centres = rng.normal(size=(CLASSES, WIDTH)) * np.linspace(0.5, 2, WIDTH)
    vectors = centres[labels] + rng.normal(size=(60, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH))
    return vectors, labels, two_covariance.make_sums(vectors, labels, CLASSES)


def joint_log_density(vectors, mean, within, between):
    """Returns log p of all clips of one identity: each pair shares the same y."""
    n = len(vectors)
    covariance = np.kron(np.eye(n), within) + np.kron(np.ones((n, n)), between)
    return stats.multivariate_normal.logpdf(np.concatenate(vectors), np.tile(mean, n), covariance)


def shrunk(covariance, share):
    return (1 - share) * covariance + share * np.trace(covariance) / WIDTH * np.eye(WIDTH)


@pytest.mark.parametrize(("within", "between"), [(0.8, 0.5), (0.0, 0.0)])
def test_log_ratios_equal_ratios_of_joint_densities(within, between):
    vectors, labels, sums = made_up()
    fit = two_covariance.covariances(sums)
    space = two_covariance.make_space(fit, within=within, between=between)
    enrolled = two_covariance.enrol(space, sums.count, sums.total)
    noise, people = (fit.axes @ x @ fit.axes.T for x in (np.diag(fit.within), fit.between))
    normal = (fit.mean, shrunk(noise, within), shrunk(people, between))
    new = np.random.default_rng(1).normal(size=(4, WIDTH))
    with jax.enable_x64(True):
        ratios = np.asarray(plda_fit.log_ratios(space, enrolled, jnp.asarray(new)))
    for clip, label in itertools.product(range(len(new)), range(1, CLASSES)):
        own = list(vectors[labels == label])
        wanted = joint_log_density([*own, new[clip]], *normal)
        wanted -= joint_log_density(own, *normal) + joint_log_density([new[clip]], *normal)
        assert abs(ratios[clip, label] - wanted) < 1e-9 * max(1, abs(wanted)), (clip, label)
    assert not enrolled.known[0] and np.abs(ratios[:, 0]).max() < 1e-9  # a class without a clip


def test_covariances_equal_their_definitions():
    """The prior counts as 10 clips and as 10 people."""
    vectors, labels, sums = made_up()
    fit = two_covariance.covariances(sums)
    people, clips = len(np.unique(labels)), len(vectors)
    typical = np.mean(vectors**2) * np.eye(WIDTH) / 2
    gaps = vectors - np.stack([vectors[labels == label].mean(axis=0) for label in labels])
    within = (gaps.T @ gaps + 10 * typical) / (clips - people + 10)
    np.testing.assert_allclose(fit.axes * fit.within @ fit.axes.T, within, atol=1e-10)
    np.testing.assert_allclose(fit.mean, people / (people + 0.5) * vectors.mean(axis=0))
    spread = (vectors - fit.mean).T @ (vectors - fit.mean) / clips
    between = ((people - 1) * (spread - within) + 10 * typical) / (people - 1 + 10)
    values, axes = np.linalg.eigh(between)
    between = axes * np.maximum(values, two_covariance.SMALLEST_VARIANCE) @ axes.T
    np.testing.assert_allclose(fit.axes @ fit.between @ fit.axes.T, between, atol=1e-10)


def test_sums_of_parts_add_up_to_the_sums_of_all_clips():
    vectors, labels, sums = made_up()
    gone = labels == 3
    parts = (two_covariance.make_sums(vectors[x], labels[x], CLASSES) for x in (gone, ~gone))
    for name, whole, removed, left in zip(Sums._fields, sums, *parts, strict=True):
        np.testing.assert_allclose(removed + left, whole, rtol=1e-12, atol=1e-12, err_msg=name)


def test_degenerate_data_give_finite_log_ratios():
    vectors = np.random.default_rng(2).normal(size=(6, WIDTH))
    vectors[:, -1] = 0  # no variance at all along one axis
    for labels in (np.arange(1, 7), np.ones(6, int)):  # one clip each, and one identity
        sums = two_covariance.make_sums(vectors, labels, CLASSES)
        space = two_covariance.make_space(two_covariance.covariances(sums), within=0.0, between=0.0)
        enrolled = two_covariance.enrol(space, sums.count, sums.total)
        assert (space.ratio >= 0).all()
        assert np.isfinite(plda_fit.log_ratios(space, enrolled, jnp.asarray(vectors))).all()


def test_pair_log_ratios_equal_ratios_of_joint_densities():
    """The oracle is the joint normal density of all clips of both groups."""
    rng, counts = np.random.default_rng(0), np.array([1, 2, 4])
    ratio, noise = np.array([0.5, 2.0, 0.1]), np.eye(3)
    groups = [rng.normal(size=(count, 3)) * 1.5 for count in counts]

    def density(*groups):
        return joint_log_density(np.concatenate(groups), np.zeros(3), noise, np.diag(ratio))

    space = two_covariance.Space(np.zeros(3), np.eye(3), ratio)
    mean = np.stack([clips.mean(axis=0) for clips in groups])
    for row, own in enumerate(groups):
        wanted = [density(own, other) - density(own) - density(other) for other in groups]
        ratios = two_covariance.pair_log_ratios(space, 1 / counts, mean, row)
        np.testing.assert_allclose(np.delete(ratios, row), np.delete(wanted, row), atol=1e-9)
