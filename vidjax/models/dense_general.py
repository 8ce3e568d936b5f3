"""The matrix product of dense layers in less than float32, with float32 sums."""

import jax
import jax.numpy as jnp
from jax import lax

from vidjax.batch import Array


def dot_general(
    x: Array,
    kernel: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Returns x @ kernel in at least float32, as the `dot_general` of a linen Dense layer.

    Forward and backward pass multiply operands in the dtype of x and add them in float32. Autodiff
    alone would multiply float32 gradients. On processors with avx512_bf16, XLA is fast only for
    bfloat16 products with float32 sums.

    Args:
      x: [..., D] float.
      kernel: [D, K], same dtype.
      dimension_numbers: those of x @ kernel, which linen passes.
      precision: as in `jax.lax.dot_general`; less than float32 ignores it.
    """
    if jnp.finfo(x.dtype).bits >= 32:
        return lax.dot_general(x, kernel, dimension_numbers, precision)
    return _narrow_product(x, kernel)


def _product(
    left: Array, right: Array, left_axes: tuple[int, ...], right_axes: tuple[int, ...]
) -> Array:
    axes = ((left_axes, right_axes), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _narrow_product(x: Array, kernel: Array) -> Array:
    return _product(x, kernel, (x.ndim - 1,), (0,))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_product(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    x_gradient = _product(gradient, kernel, (x.ndim - 1,), (1,))
    # XLA for CPUs refuses the other order of operands for members that share x.
    kernel_gradient = _product(gradient, x, rows, rows).T
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


_narrow_product.defvjp(_forward, _backward)
