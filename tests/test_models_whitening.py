"""Whitening against its equations, and what may not reach the running sums."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.models.whitening import LEAST, MOMENTUM, Whitening

DIM = 5


def clips(seed, *shape):
    """Returns correlated vectors with a mean, and a mask that leaves some out."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(0).normal(size=(DIM, DIM))
    mask = rng.random(shape) < 0.8
    return rng.normal(size=(*shape, DIM)) @ mix + 3.0, mask


def whitened(model, variables, x, mask) -> Any:
    """Returns the vectors as an evaluation whitens them."""
    return model.apply(variables, x, mask, train=False)


def trained(model, batches):
    """Returns the variables after some batches."""
    variables = model.init(jax.random.key(0), *batches[0], train=True)
    for x, mask in batches:
        _, variables = model.apply(variables, x, mask, train=True, mutable=["batch_stats"])
    return variables


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_it_is_that_of_the_equations(share):
    batches = [clips(seed, 40, 3) for seed in range(4)]
    with jax.enable_x64(True):
        model = Whitening(share)
        found = whitened(model, trained(model, batches), *batches[1])
    powers = MOMENTUM ** np.arange(len(batches))[::-1]
    rows = [x[mask] for x, mask in batches]
    count = sum(p * len(x) for p, x in zip(powers, rows, strict=True))
    mean = sum(p * x.sum(0) for p, x in zip(powers, rows, strict=True)) / count
    moment = sum(p * x.T @ x for p, x in zip(powers, rows, strict=True)) / count
    covariance = moment - np.outer(mean, mean)
    variance = np.trace(covariance) / DIM
    rest = 1 - share + LEAST * np.trace(moment) / DIM / variance
    wanted = share * covariance / variance + rest * np.eye(DIM)
    root = np.linalg.inv(np.linalg.cholesky(wanted))
    np.testing.assert_allclose(found, (batches[1][0] - mean) @ root.T, rtol=1e-9)


def test_whole_covariance_becomes_round():
    x, mask = clips(0, 3000)
    with jax.enable_x64(True):
        model = Whitening(1.0)
        found = np.asarray(whitened(model, trained(model, [(x, mask)]), x, mask))[mask]
    variance = np.trace(np.cov(x[mask].T)) / DIM
    np.testing.assert_allclose(np.cov(found.T), variance * np.eye(DIM), atol=1e-3 * variance)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)


def test_masked_vectors_and_evaluation_leave_the_sums_alone():
    x, mask = clips(0, 30, 2)
    x = x.astype(np.float32)
    model = Whitening(0.5)
    variables = trained(model, [(x, mask)])
    others = np.where(mask[..., None], x, np.float32(1e3))
    jax.tree.map(np.testing.assert_array_equal, trained(model, [(others, mask)]), variables)
    _, same = model.apply(variables, x, mask, train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, same, variables)


@pytest.mark.parametrize("mask", [np.ones(4, bool), np.zeros(4, bool), np.arange(4) == 0])
def test_few_vectors_are_no_trouble(mask):
    """Fewer than dimensions, one alone, and none: values and gradients are finite."""
    x = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    model = Whitening(1.0)
    variables = trained(model, [(x, mask)])

    def total(x):
        found, _ = model.apply(variables, x, mask, train=True, mutable=["batch_stats"])
        return jnp.sum(found**2)

    value, slope = jax.value_and_grad(total)(x)
    assert np.isfinite(value) and np.isfinite(slope).all()
    if mask.sum() < 2:
        np.testing.assert_allclose(whitened(model, variables, x, mask), x, rtol=1e-5)


def test_no_gradient_passes_through_the_sums():
    x, mask = clips(0, 50)
    x = jnp.asarray(x, jnp.float32)
    model = Whitening(1.0)
    variables = trained(model, [(x, mask)])
    weights = np.random.default_rng(1).normal(size=x.shape)

    def training(x):
        found, _ = model.apply(variables, x, mask, train=True, mutable=["batch_stats"])
        return jnp.sum(found * weights)

    _, later = model.apply(variables, x, mask, train=True, mutable=["batch_stats"])
    slope = jax.grad(lambda x: jnp.sum(whitened(model, later, x, mask) * weights))(x)
    np.testing.assert_allclose(jax.grad(training)(x), slope, rtol=1e-4, atol=1e-6)
