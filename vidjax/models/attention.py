"""Attention between modalities and between frames, and the pooling of frames that it learns."""

import functools

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
      scale: of the Gram matrix (ours; 1 in the paper). Vectors of one length, as a LayerNorm makes
        them, are most like themselves: without a small scale Y is then the identity.
      gamma: strength of the attention.
      train_gamma: True to learn gamma, from `gamma` on (ours).
      dtype: of the matrix products; the softmax is in float32 at least, as the parameters.

    Source: iQIYI-VID paper, equations 1-3. Ours: masks. With nothing missing it is the paper's.
    """

    dim: int = 64
    scale: float = 1.0
    gamma: float = 0.05
    train_gamma: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
        """Returns O = X + gamma X Y, and the attention Y.

        Args:
          x: [B, M, D] float, 0 where the vector is missing.
          mask: [B, M] bool, True for vectors that exist. Y is a softmax over those i alone, so its
            columns j sum to 1, and to 0 where j is missing.

        Returns:
          [B, M, D] in the dtype of the matrix products, 0 where the vector is missing; and
          Y [B, M, M] float32.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(self.dtype)
        f = nn.Dense(
            self.dim, use_bias=False, dtype=self.dtype, param_dtype=param_dtype, name="w_f"
        )(x)  # [B, M, D~]
        z = jnp.einsum("bid,bjd->bij", f, f, preferred_element_type=param_dtype)  # [B, M, M]
        z = z * self.scale
        pairs = mask[:, :, None] & mask[:, None, :]
        # A softmax over nothing is NaN in the gradient too; a masked score far below the others
        # gives the same zeros without.
        z = jnp.where(pairs, z, jnp.finfo(z.dtype).min)
        y = jnp.where(pairs, jax.nn.softmax(z, axis=1), 0.0)
        gamma = self.gamma
        if self.train_gamma:
            gamma = self.param("gamma", nn.initializers.constant(gamma), (), param_dtype)
        mixed = jnp.einsum(
            "bij,bid->bjd", y.astype(self.dtype), x, preferred_element_type=param_dtype
        )
        return (x + gamma * mixed).astype(self.dtype), y


class SigmoidGate(nn.Module):
    """Multiplies every vector of the feature map by a number between 0 and 1 that it decides.

    Attributes:
      dtype: of the products; the sigmoid is in float32 at least, as the parameters.

    Source: named as future work ("attention modules with sigmoid-activated branches") by the
    second-place article of 2019. Ours: the rest. Weights start at 0, so every gate at one half.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns x_m sigmoid(w_m . x_m + b_m).

        Args:
          x: [B, M, D] float, 0 where the vector is missing.

        Returns:
          [B, M, D] in the dtype of the products; 0 where the vector is missing.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.param("kernel", nn.initializers.zeros, x.shape[1:], param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:2], param_dtype)
        x = x.astype(self.dtype)
        scores = jnp.einsum(
            "bmd,md->bm", x, kernel.astype(self.dtype), preferred_element_type=param_dtype
        )
        gate = jax.nn.sigmoid(scores + bias)  # [B, M]
        return (x * gate[..., None]).astype(self.dtype)


class ChannelAttention(nn.Module):
    """Adds to every frame of a clip a mixture of all, to strengthen what agrees and damp outliers.

    With x [T, D] the frames of a clip, theta, phi and g linear maps with a bias, and `out` one that
    starts at 0, so that the block starts as the identity:

    `features` (ours): the maps act on features, D to D/2. A = softmax over s of
    theta(x_t) . phi(x_s) / sqrt(D/2), [T, T] over real frames; y_t = x_t + out(sum_s A_ts g(x_s)).
    The order of frames is nothing to it, and neither is how many there are.
    `channels` (as published): the maps act on frames, T to T/2, and so on each feature alike.
    A = softmax over j of sum_d theta(x)_id phi(x)_jd, [T/2, T/2]; y = x + out(A g(x)).

    Attributes:
      form: features | channels.
      num_frames: of `channels`: the T it is made for.
      dtype: of the matrix products; the softmax is in float32 at least, as the parameters.

    Source: DANet's channel attention as DeepMEF (3rd place 2019) applies it. Theirs starts theta
    and phi at 0, where the gradients of both stay 0 for ever; here neither does. Ours: masks, and
    `features` with its scaled products.
    """

    form: str = "features"
    num_frames: int = 40
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Returns the frames, each with what it takes from the others.

        Args:
          x: [B, T, D] float.
          mask: [B, T] bool, True for real frames. `channels` knows no missing frame: it takes one
            for a vector of 0.

        Returns:
          [B, T, D] float32; 0 where the frame is not real.

        Raises:
          ValueError: for an unknown form; for `channels` with other than `num_frames` frames.
        """
        if self.form not in ("features", "channels"):
            raise ValueError(
                f"unknown channel attention {self.form!r}; known are channels, features"
            )
        if self.form == "channels" and x.shape[1] != self.num_frames:
            raise ValueError(
                f"channel attention of {self.num_frames} frames got {x.shape[1]}: let the fusion "
                f"sample {self.num_frames}, or take the form 'features'"
            )
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=param_dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=param_dtype)
        x = jnp.where(mask[..., None], x.astype(param_dtype), 0.0)
        channels = self.form == "channels"
        rows = jnp.swapaxes(x, 1, 2) if channels else x  # [B, D, T] or [B, T, D]
        width = max(rows.shape[-1] // 2, 1)
        theta, phi, g = (dense(width, name=name)(rows) for name in ("theta", "phi", "g"))
        if channels:
            affinity = jax.nn.softmax(product("bdi,bdj->bij", theta, phi), axis=-1)
            mixed = product("bij,bdj->bdi", affinity.astype(self.dtype), g)  # [B, D, T/2]
        else:
            scores = product("bti,bsi->bts", theta, phi) * width**-0.5
            scores = jnp.where(mask[:, None, :], scores, jnp.finfo(scores.dtype).min)
            affinity = jax.nn.softmax(scores, axis=-1)  # [B, T, T]
            mixed = product("bts,bsi->bti", affinity.astype(self.dtype), g)  # [B, T, D/2]
        out = dense(rows.shape[-1], kernel_init=nn.initializers.zeros, name="out")(mixed)
        out = jnp.swapaxes(out, 1, 2) if channels else out  # [B, T, D]
        return jnp.where(mask[..., None], x + out, 0.0)


class AttentionAggregation(nn.Module):
    """The frames of a clip as one vector, weighted by a softmax of their product with a query.

    Source: DeepMEF (3rd place 2019): one block of the neural aggregation network, its query
    starting at 0, where it is the mean frame. Ours: masks.
    """

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Returns sum_t a_t x_t with a = softmax over real frames of q . x_t.

        Args:
          x: [B, T, D] float.
          mask: [B, T] bool, True for real frames.

        Returns:
          [B, D] float32; 0 for a clip without frames.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        query = self.param("query", nn.initializers.zeros, x.shape[-1:], x.dtype)
        scores = jnp.where(mask, x @ query, jnp.finfo(x.dtype).min)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)  # [B, T]
        return jnp.einsum("bt,btd->bd", weights, jnp.where(mask[..., None], x, 0.0))
