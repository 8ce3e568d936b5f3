"""Linear layers: products in one dtype, sums in float32 in both directions, and their dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from vidjax.models import layers
from vidjax.models.layers import Dropout, Linear


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((40, 30), (30, 50), (40, 50))  # x, kernel, weight of the output
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def apply(module, params, x, **kwargs) -> Any:
    return module.apply(params, x, **kwargs)


def drop_out(module, x, seed):
    rngs = {"dropout": jax.random.key(seed)}
    return np.asarray(apply(module, {}, x, deterministic=False, rngs=rngs))


def matmul(x, kernel, dtype) -> Any:
    return layers.trained_matmul(x, kernel, jnp.dtype(dtype))


def wide(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("shape", [(40, 30), (8, 5, 30), (30,)])
def test_a_layer_has_the_parameters_and_the_values_of_flax(operands, shape):
    x = operands[0].reshape(-1)[: int(np.prod(shape))].reshape(shape)
    ours, flax = Linear(50), nn.Dense(50)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(1), x))
    np.testing.assert_allclose(apply(ours, params, x), apply(flax, params, x), rtol=1e-6, atol=1e-6)


def test_a_layer_without_bias(operands):
    x, kernel, *_ = operands
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
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(x, kernel)
    assert {value.dtype, *(g.dtype for g in gradients)} == {jnp.dtype("float32")}
    # Products of rounded numbers are exact; what is left is the rounding of sums in float32.
    x, kernel, weight = (wide(a.astype(dtype)) for a in (x, kernel, weight))
    expected = (x @ kernel, weight @ kernel.T, x.T @ weight)
    for ours, oracle in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_members_go_through_vmap(operands, dtype):
    x, kernel, _ = operands

    def total(kernel):
        return jnp.sum(matmul(x, kernel, dtype) ** 2)

    kernels = jnp.stack([kernel, 2 * kernel])
    together = jax.vmap(jax.grad(total))(kernels)
    for one, of_one in zip(kernels, together, strict=True):
        np.testing.assert_allclose(of_one, jax.grad(total)(one), rtol=1e-5, atol=1e-4)


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
        operands = line.split(" dot(")[1].split(")")[0].split(", ")
        for name in operands:
            name = name.split("%")[-1]
            assert any(f"%{name} = bf16[" in other for other in program.splitlines()), line


@pytest.mark.parametrize(  # in 8 bits a number and in 16
    ("rate", "width"),
    quick_first([(0.5, 64), (0.1, 1), (0.25, 63), (0.7, 63)], 2),
)
def test_dropout_keeps_the_mean_and_the_rate(rate, width):
    x = jnp.ones((40_000 // width, width))
    y = drop_out(Dropout(rate), x, 0)
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 0.012  # 4 standard errors
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-4)


def test_numbers_drop_out_independently():
    y = drop_out(Dropout(0.5), jnp.ones((5000, 8)), 1)
    correlation = np.corrcoef((y != 0).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.06  # 4 standard errors


def test_dropout_of_nothing_and_of_all():
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(apply(Dropout(0.0), {}, x, deterministic=False), x)
    np.testing.assert_array_equal(apply(Dropout(0.5), {}, x, deterministic=True), x)
    assert not drop_out(Dropout(1.0), x, 0).any()
