"""Products of narrow numbers: sums of float32 in both directions; wider ones are left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.models import dense_general

AXES = (((1,), (0,)), ((), ()))


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((40, 30), (30, 50), (40, 50)), strict=True)
    ]


def test_float32_is_the_plain_product(operands):
    x, kernel, _ = operands
    plain = jax.jit(lambda x, kernel: jax.lax.dot_general(x, kernel, AXES))
    ours = jax.jit(lambda x, kernel: dense_general.dot_general(x, kernel, AXES))
    np.testing.assert_array_equal(plain(x, kernel), ours(x, kernel))


@pytest.mark.parametrize("shape", [(40, 30), (8, 5, 30), (30,)])
def test_bfloat16_is_summed_up_in_float32(operands, shape):
    x, kernel, _ = operands
    x = x.reshape(-1)[: int(np.prod(shape))].reshape(shape).astype(jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16)
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    product = dense_general.dot_general(x, kernel, axes)
    assert product.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(product, exact, atol=1e-5)


def test_gradients_of_bfloat16_are_those_of_its_values(operands):
    x, kernel, weight = operands
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def total(x, kernel):
        return jnp.sum(dense_general.dot_general(x, kernel, AXES) * weight)

    of_x, of_kernel = jax.jit(jax.grad(total, argnums=(0, 1)))(x, kernel)
    assert of_x.dtype == of_kernel.dtype == jnp.bfloat16
    rounded = np.asarray(weight.astype(jnp.bfloat16), np.float64)
    wide = [np.asarray(a, np.float64) for a in (x, kernel)]
    # Half a unit in the last of 8 places, relative.
    np.testing.assert_allclose(np.asarray(of_x, float), rounded @ wide[1].T, rtol=4e-3, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(of_kernel, float), wide[0].T @ rounded, rtol=4e-3, atol=1e-5
    )


def test_members_go_through_vmap(operands):
    x, kernel, _ = (a.astype(jnp.bfloat16) for a in operands)

    def total(kernel):
        return jnp.sum(dense_general.dot_general(x, kernel, AXES) ** 2)

    kernels = jnp.stack([kernel, 2 * kernel])
    together = jax.vmap(jax.grad(total))(kernels)
    for one, of_one in zip(kernels, together, strict=True):
        np.testing.assert_array_equal(
            np.asarray(of_one, np.float32), np.asarray(jax.grad(total)(one), np.float32)
        )
