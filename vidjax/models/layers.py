"""A linear layer that multiplies in one dtype and adds in a wider one; dropout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from vidjax.batch import Array


class Linear(nn.Module):
    """x @ kernel + bias, with parameters, sums and gradients of at least float32."""

    features: int
    dtype: jnp.dtype = jnp.float32  # of the numbers that are multiplied
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [..., K], at least float32, for x [..., D] float."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), wide)
        # Training has random numbers. Elsewhere somebody may want forward-mode derivatives.
        product = trained_matmul if self.has_rng("dropout") else matmul
        y: Array = product(x.reshape(-1, x.shape[-1]).astype(wide), kernel, self.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), wide)
        return y.reshape(*x.shape[:-1], self.features)


def matmul(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """Returns x [B, D] @ kernel [D, K], multiplied in `dtype` and added in that of the operands.

    Operands are float32 or wider, and `dtype` is at most as wide.
    """
    return _product(x.astype(dtype), kernel.astype(dtype), 0, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def trained_matmul(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """Returns `matmul(x, kernel, dtype)`; its backward pass multiplies in `dtype`, too.

    Autodiff would multiply gradients in the wider dtype, and slower on CPUs. JAX has no
    forward-mode derivative of a function with a custom VJP.
    """
    return matmul(x, kernel, dtype)


def _forward(x: Array, kernel: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel, dtype), (x.astype(dtype), kernel.astype(dtype))


def _backward(
    dtype: jnp.dtype, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    wide, gradient = gradient.dtype, gradient.astype(dtype)
    of_x = _product(gradient, kernel, 1, wide)
    return of_x, _product(transposed(x), gradient, 0, wide)


trained_matmul.defvjp(_forward, _backward)


def _product(left: Array, right: Array, axis: int, dtype: jnp.dtype) -> Array:
    """Contracts axis 1 of the matrix `left` with `axis` of the matrix `right`; adds in `dtype`."""
    # With right.T, XLA for CPUs would multiply bfloat16 numbers as float32.
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=dtype)


def transposed(x: Array) -> Array:
    """Returns x.T; on CPUs, transposed in memory.

    XLA for CPUs has no fast product that sums over the first axis of both operands, see
    `tests/benchmarks/products.py`.
    """
    if jax.default_backend() != "cpu":
        return x.T
    return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))


class Dropout(nn.Module):
    """Sets numbers to 0 at random, and scales up the others.

    `flax.linen.Dropout` draws 32 bits a number, which takes up to a tenth of a training step on a
    CPU. This one draws 8 bits if the rate is a multiple of 1/256. Otherwise it draws 16 and rounds
    the rate to a multiple of 2**-16.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        """Returns x [..., D] float after dropout (rng `dropout`); x itself if `deterministic`."""
        if deterministic or not self.rate:
            return x
        bits = 8 if (self.rate * 256).is_integer() else 16
        dropped = round(self.rate * 2**bits)  # of the 2**bits values
        kept = 1 - dropped / 2**bits
        if not kept:
            return jnp.zeros_like(x)
        is_kept = _draw(self.make_rng("dropout"), x.shape, bits) >= dropped
        return jnp.where(is_kept, x / kept, 0)


def _draw(rng: Array, shape: tuple[int, ...], bits: int) -> Array:
    """Returns uniform random integers of a shape, uint8 for 8 bits or uint16 for 16."""
    share = 32 // bits  # numbers of a word
    words = jax.random.bits(rng, (*shape[:-1], -(-shape[-1] // share)), jnp.uint32)
    narrow = jnp.uint8 if bits == 8 else jnp.uint16
    numbers = jax.lax.bitcast_convert_type(words, narrow)  # [..., D / share, share]
    return numbers.reshape(*shape[:-1], -1)[..., : shape[-1]]
