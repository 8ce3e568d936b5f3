"""Linear layers: products in one dtype, sums in float32 in both directions, and their dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.models import layers
from vidjax.models.layers import Dropout, Linear


@pytest.fixture(scope="module")
def operands():
    """Returns an input, a kernel, and weights of the output."""
    shapes = ((40, 30), (30, 50), (40, 50))
    draw = np.random.default_rng(0).normal
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def apply(module, params, x, **kwargs) -> Any:
    return module.apply(params, x, **kwargs)


def drop_out(rate, shape):
    rngs = {"dropout": jax.random.key(0)}
    return np.asarray(apply(Dropout(rate), {}, jnp.ones(shape), deterministic=False, rngs=rngs))


def matmul(x, kernel, dtype) -> Any:
    return layers.trained_matmul(x, kernel, jnp.dtype(dtype))


def wide(x):
    return np.asarray(x, np.float64)


def test_a_layer_has_the_parameters_and_the_values_of_flax(operands):
    x, kernel, _ = operands
    ours, flax = Linear(50), nn.Dense(50)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(1), x))
    for some in (x, x.reshape(8, 5, 30), x[0]):
        found, wanted = apply(ours, params, some), apply(flax, params, some)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    layer = Linear(50, use_bias=False)
    assert set(layer.init(jax.random.key(1), x)["params"]) == {"kernel"}
    y = apply(layer, {"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, wide(x) @ wide(kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_summed_up_in_float32(operands, dtype):
    x, kernel, weight = operands

    def total(x, kernel):
        return jnp.sum(matmul(x, kernel, dtype) * weight)

    value = matmul(x, kernel, dtype)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    gradients = gradient(x, kernel)
    assert {value.dtype, *(g.dtype for g in gradients)} == {jnp.dtype("float32")}
    together = jax.vmap(gradient, in_axes=(None, 0))(x, jnp.stack([kernel, 2 * kernel]))[1]
    np.testing.assert_allclose(together, [gradients[1]] * 2, rtol=1e-5, atol=1e-4)
    # Products of rounded numbers are exact; what is left is the rounding of sums in float32.
    x, kernel, weight = (wide(a.astype(dtype)) for a in operands)
    expected = (x @ kernel, weight @ kernel.T, x.T @ weight)
    for ours, oracle in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="products of other backends")
def test_no_bfloat16_product_is_widened():
    """XLA for CPUs silently multiplies as float32 whatever is not in a form that it knows."""
    x, kernel = jnp.zeros((64, 48), jnp.float32), jnp.zeros((48, 80), jnp.float32)

    def total(x, kernel):
        return jnp.sum(matmul(x, kernel, "bfloat16") ** 2)

    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, kernel).compile().as_text() or ""
    products = [line for line in program.splitlines() if " dot(" in line]
    assert len(products) == 3
    for line in products:
        for name in line.split(" dot(")[1].split(")")[0].split(", "):
            assert f"%{name.split('%')[-1]} = bf16[" in program, line


@pytest.mark.parametrize(("rate", "width"), [(0.1, 1), (0.5, 63)])
def test_dropout_keeps_the_mean_and_the_rate(rate, width):
    """It draws 8 or 16 bits for a number."""
    y = drop_out(rate, (40_000 // width, width))
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 0.012  # 4 standard errors
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-4)


def test_numbers_drop_out_independently():
    correlation = np.corrcoef((drop_out(0.5, (5000, 8)) != 0).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.06  # 4 standard errors
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(apply(Dropout(0.0), {}, x, deterministic=False), x)
    np.testing.assert_array_equal(apply(Dropout(0.5), {}, x, deterministic=True), x)
    assert not drop_out(1.0, (3, 4)).any()
