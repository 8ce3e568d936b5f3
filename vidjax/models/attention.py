"""Multimodal attention of the iQIYI-VID paper: a Gram matrix over modalities."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array


class MultimodalAttention(nn.Module):
    """Adds to every vector of the feature map the others, weighted by their correlation.

    The paper writes the feature map as X in R^{D x M}, a vector a column. Here it is [B, M, D], a
    vector a row, so its X is ours transposed; Y[b, i, j] has the paper's i and j.

    Attributes:
      dim: width of the space in which correlation is taken (the paper's D~).
      gamma: strength of the attention.
      train_gamma: True to learn gamma, from `gamma` on (ours).
      dtype: of the matrix products; the softmax is in float32 at least, as the parameters.

    Source: iQIYI-VID paper, equations 1-3. Ours: masks. With nothing missing it is the paper's.
    """

    dim: int = 64
    gamma: float = 0.05
    train_gamma: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Returns O = X + gamma X Y; sows Y [B, M, M] as `attention` in `intermediates`.

        Args:
          x: [B, M, D] float, 0 where the vector is missing.
          mask: [B, M] bool, True for vectors that exist. Y is a softmax over those i alone, so its
            columns j sum to 1, and to 0 where j is missing.

        Returns:
          [B, M, D] in the dtype of the matrix products; 0 where the vector is missing.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(self.dtype)
        f = nn.Dense(
            self.dim, use_bias=False, dtype=self.dtype, param_dtype=param_dtype, name="w_f"
        )(x)  # [B, M, D~]
        z = jnp.einsum("bid,bjd->bij", f, f, preferred_element_type=param_dtype)  # [B, M, M]
        pairs = mask[:, :, None] & mask[:, None, :]
        # A softmax over nothing is NaN in the gradient too; a masked score far below the others
        # gives the same zeros without.
        z = jnp.where(pairs, z, jnp.finfo(z.dtype).min)
        y = jnp.where(pairs, jax.nn.softmax(z, axis=1), 0.0)
        self.sow("intermediates", "attention", y)
        gamma = self.gamma
        if self.train_gamma:
            gamma = self.param("gamma", nn.initializers.constant(gamma), (), param_dtype)
        mixed = jnp.einsum(
            "bij,bid->bjd", y.astype(self.dtype), x, preferred_element_type=param_dtype
        )
        return (x + gamma * mixed).astype(self.dtype)
