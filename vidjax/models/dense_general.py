"""The matrix product of dense layers, of numbers of less than float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vidjax.batch import Array


def dot_general(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
    """Returns x @ kernel, float32 at least, for the `dot_general` of a linen Dense layer.

    Sums are float32 at least in both directions, and the products of the backward pass have
    operands of the dtype of x, too: left to itself it would multiply float32 gradients. On
    processors with avx512_bf16 XLA is fast only where bfloat16 is summed up to float32.

    Args:
      x: [..., D] float.
      kernel: [D, K] of the same dtype.
      args, kwargs: what else `jax.lax.dot_general` takes.
    """
    if jnp.finfo(x.dtype).bits >= 32:
        return lax.dot_general(x, kernel, *args, **kwargs)
    return _narrow_product(x, kernel)


def _product(left: Array, right: Array, left_axes: Any, right_axes: Any) -> Array:
    axes = ((left_axes, right_axes), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _narrow_product(x: Array, kernel: Array) -> Array:
    return _product(x, kernel, (x.ndim - 1,), (0,))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_product(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    of_x = _product(gradient, kernel, (x.ndim - 1,), (1,))
    # In this order: XLA for CPUs refuses the other one where members share x.
    of_kernel = _product(gradient, x, rows, rows).T
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_narrow_product.defvjp(_forward, _backward)
