"""Features whose covariance over the training frames is made round."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array

MOMENTUM = 0.99  # of the running sums: they remember about a hundred batches
LEAST = 1e-5  # share of the mean square below which a variance is rounding


class Whitening(nn.Module):
    """Subtracts the mean and multiplies by the inverse of a triangular root of the covariance.

    For a share of 1 the covariance of the result is the mean variance of the input times the
    identity. Training and evaluation use the same running sums; no gradient passes through them.
    Until they hold two different vectors, all vectors stay as they are.

    Attributes:
      share: share of the covariance; the rest is the identity times the mean variance. Above 0, at
        most 1.

    Source: decorrelated batch normalisation (Huang et al. 2018, equation 5). Ours: a Cholesky
    factor in place of eigenvectors; running sums in training, too, since a batch has fewer vectors
    than dimensions; the share.
    """

    share: float

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the whitened vectors, [..., D] at least float32.

        Args:
          x: [..., D] float.
          mask: [...] bool, False for vectors that do not count; they are whitened like others.
          train: True to add the vectors to the running sums in `batch_stats`.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        width = x.shape[-1]
        weight = self.variable("batch_stats", "weight", jnp.zeros, (), x.dtype)
        total = self.variable("batch_stats", "total", jnp.zeros, (width,), x.dtype)
        scatter = self.variable("batch_stats", "scatter", jnp.zeros, (width, width), x.dtype)
        if train and not self.is_initializing():
            rows = jnp.where(mask[..., None], x, 0.0).reshape(-1, width)
            rows = jax.lax.stop_gradient(rows)
            for running, more in (
                (weight, jnp.sum(mask, dtype=x.dtype)),
                (total, jnp.sum(rows, axis=0)),
                (scatter, rows.T @ rows),
            ):
                running.value = MOMENTUM * running.value + (1 - MOMENTUM) * more
        count = jnp.maximum(weight.value, 1e-6)
        mean = total.value / count
        second = scatter.value / count
        covariance = second - jnp.outer(mean, mean)
        variance, square = jnp.trace(covariance) / width, jnp.trace(second) / width
        known = variance > LEAST * square
        variance = jnp.where(known, variance, 1.0)
        identity = jnp.eye(width, dtype=x.dtype)
        rest = 1 - self.share + LEAST * square / variance  # of rounding, for few vectors
        root = jnp.linalg.cholesky(self.share * covariance / variance + rest * identity)
        flat = (x - mean).reshape(-1, width)
        whitened = jax.scipy.linalg.solve_triangular(
            jnp.where(known, root, identity), flat.T, lower=True
        )
        return jnp.where(known, whitened.T.reshape(x.shape), x)
