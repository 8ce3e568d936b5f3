"""What losses do with logits: values and derivatives against plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax import logit_ops

LOGITS = np.random.default_rng(0).normal(0, 6, (7, 33))
LOGITS[0, :6] = (-200.0, -90.0, -1e-6, 0.0, 90.0, 200.0)
LABELS = np.arange(7) * 4


def sigmoid(z):
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def focal(z, gamma):
    """-p^gamma log(1 - p), and its derivative."""
    p, rest = sigmoid(z), np.logaddexp(0, z)
    value = p**gamma * rest
    return value, gamma * p**gamma * (1 - p) * rest + p ** (gamma + 1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_sum_of_focal_negatives(gamma):
    logits = jnp.asarray(LOGITS, jnp.float32)
    values, slopes = focal(np.asarray(logits, np.float64), gamma)
    found = jax.jit(logit_ops.sum_of_focal_negatives, static_argnums=1)(logits, gamma)
    np.testing.assert_allclose(found, values.sum(axis=1), rtol=3e-6)
    weight = np.arange(1.0, 8)
    gradient = jax.grad(lambda z: jnp.sum(weight * logit_ops.sum_of_focal_negatives(z, gamma)))
    np.testing.assert_allclose(gradient(logits), weight[:, None] * slopes, rtol=2e-5, atol=1e-30)
    each = logit_ops.focal_negative(logits, gamma)
    np.testing.assert_allclose(each, values, rtol=3e-5, atol=1e-37)


def test_columns_that_are_left_out_add_nothing():
    logits, mask = jnp.asarray(LOGITS, jnp.float32), np.arange(33) % 5 != 0
    seen = logit_ops.leave_out(logits, mask)
    found = logit_ops.sum_of_focal_negatives(seen, 2.0)
    np.testing.assert_allclose(found, focal(LOGITS[:, mask], 2.0)[0].sum(axis=1), rtol=3e-6)
    nothing = logit_ops.sum_of_focal_negatives(logit_ops.leave_out(logits, mask & False), 2.0)
    np.testing.assert_array_equal(nothing, 0)


def test_a_value_is_put_into_the_column_of_the_label():
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    put = logit_ops.put_at_label(logits, labels, jnp.full(7, 1e3))
    expected = np.array(logits)
    expected[np.arange(7), LABELS] = 1e3
    np.testing.assert_array_equal(put, expected)
    np.testing.assert_array_equal(logit_ops.at_label(put, labels), 1e3)
