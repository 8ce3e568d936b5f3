"""Attention between modalities, attention between frames, and pooling of frames by attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.errors import UserError
from vidjax.models.layers import Linear

CHANNEL_ATTENTIONS = ("channels", "danet", "features")


class MultimodalAttention(nn.Module):
    """Adds to each vector of the feature map all vectors, weighted by their correlation with it.

    The feature map is [B, M, D], one vector per row. The paper's X in R^{D x M} is its transpose;
    the indices of Y[b, i, j] are the paper's i and j.

    Attributes:
      dim: width of the space in which the correlations are computed, the paper's D~.
      scale: factor on the Gram matrix (ours; 1 in the paper). Vectors of equal length, as after
        LayerNorm, correlate most with themselves: unless `scale` is small, Y is nearly the
        identity.
      gamma: strength of the attention.
      train_gamma: True to learn gamma, starting from `gamma` (ours).
      form: `gram`, the paper's Z = F^T F with F = W_F X; or `two`, Z = F^T G with another
        projection, G = W_G X, as in SAGAN, with which the paper compares it.
      fill_missing: True, as in the paper, to set the output of a missing vector to gamma times a
        mean of the vectors that exist. False (ours) leaves it 0.
      dtype: dtype of the matrix products; parameters and softmax are at least float32.

    Source: iQIYI-VID paper, equations 1-3. Ours: a missing vector is 0 and has no weight in the
    softmax, where the equations would give it exp(0). Without missing vectors the result is that of
    the paper. SAGAN also projects the vectors that are summed; the form `two` does not.
    """

    dim: int = 64
    scale: float = 1.0
    gamma: float = 0.05
    train_gamma: bool = False
    form: str = "gram"
    fill_missing: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
        """Returns the vectors O = X + gamma X Y, and the attention Y.

        Args:
          x: [B, M, D] float, 0 for missing vectors.
          mask: [B, M] bool, True for vectors that exist.

        Returns:
          O, [B, M, D] in `dtype`; and Y, [B, M, M] float32, a softmax over the existing vectors i.
          Column j of Y sums to 1. It is 0, and so is vector j of O, in clips without any vector
          and, unless `fill_missing`, where vector j is missing.
        """
        if self.form not in ("gram", "two"):
            raise UserError(f"unknown attention_form {self.form!r}; choose from gram, two")
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(self.dtype)
        project = functools.partial(Linear, self.dim, dtype=self.dtype, use_bias=False)
        f = project(name="w_f")(x)  # [B, M, D~]
        g = project(name="w_g")(x) if self.form == "two" else f
        z = jnp.einsum("bid,bjd->bij", f, g, preferred_element_type=param_dtype)  # [B, M, M]
        z = z * self.scale
        pairs = mask[:, :, None] & (True if self.fill_missing else mask[:, None, :])
        # A softmax over an empty set has NaN gradients. A very low score for masked pairs gives
        # the same zeros without NaN.
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
    """Multiplies each vector of the feature map by a gate between 0 and 1, computed from it.

    The weights start at 0, so all gates start at 0.5.

    Source: the second-place article of 2019 names gates by a sigmoid as future work. Ours: the
    formula.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the vectors x_m sigmoid(w_m . x_m + b_m), [B, M, D] in `dtype`."""
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
    """Adds to each frame of a clip a mixture of all its frames, which damps outliers.

    Notation: x [T, D] are the frames of a clip; theta, phi, g and out are linear maps with a bias.
    The map out and gamma start at 0, so the block starts as the identity.

    Form `features` (ours): the maps act on the features, D -> D/2. With the attention
    A_ts = softmax over real frames s of theta(x_t) . phi(x_s) / sqrt(D/2), [T, T], the output is
    y_t = x_t + out(sum_s A_ts g(x_s)). It works for any number of frames, in any order.

    Form `channels` (DeepMEF's code): the maps act on the frames, T -> T/2, and treat all features
    alike. With A_ij = softmax over j of sum_d theta(x)_id phi(x)_jd, [T/2, T/2], the output is
    y = x + out(A g(x)).

    Form `danet` (DANet's code, with frames for its channels): no maps. With the energies
    E_ts = x_t . x_s and A_ts = softmax over real frames s of max_s(E_ts) - E_ts, [T, T], the output
    is y_t = x_t + gamma sum_s A_ts x_s. So each frame gets most of those least like it.

    Attributes:
      form: features | channels | danet.
      num_frames: T that the form `channels` is built for.
      dtype: dtype of the matrix products; parameters and softmax are at least float32.

    Source: channel attention of DANet (Fu et al., CVPR 2019, whose article has the softmax of E
    itself); DeepMEF (3rd place 2019) names it and builds `channels`. DeepMEF's code initialises
    theta and phi with 0, so that the gradients of both stay 0; here neither starts at 0. It has
    BatchNorm after theta, phi and out in place of biases. Ours: masks, and the form `features` with
    its scaled products.
    """

    form: str = "features"
    num_frames: int = 40
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Returns the frames after attention, [B, T, D] float32, 0 on padding.

        The form `channels` needs T = `num_frames`, and reads padded frames as 0.
        """
        if self.form not in CHANNEL_ATTENTIONS:
            raise UserError(
                f"unknown channel attention {self.form!r}; choose from "
                f"{', '.join(CHANNEL_ATTENTIONS)}"
            )
        if self.form == "channels" and x.shape[1] != self.num_frames:
            raise UserError(
                f"channel attention needs {self.num_frames} frames, got {x.shape[1]}: let the "
                f"fusion sample {self.num_frames}, or use the form 'features'"
            )
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = jnp.where(mask[..., None], x.astype(param_dtype), 0.0)
        if self.form == "danet":
            gamma = self.param("gamma", nn.initializers.zeros, (), param_dtype)
            added = gamma * self._mixed_by_energy(x, mask)
        elif self.form == "channels":
            columns = jnp.swapaxes(x, 1, 2)  # [B, D, T]
            added = jnp.swapaxes(self._mixed_by_maps(columns, None), 1, 2)
        else:
            added = self._mixed_by_maps(x, mask)
        return jnp.where(mask[..., None], x + added, 0.0)

    def _mixed_by_energy(self, x: Array, mask: Array) -> Array:
        """Returns sum_s A_ts x_s of the form `danet`, [B, T, D]."""
        product = functools.partial(jnp.einsum, preferred_element_type=x.dtype)
        frames = x.astype(self.dtype)
        energy = product("btd,bsd->bts", frames, frames)
        # The largest energy of a row is the same for all s, and cancels in the softmax.
        scores = jnp.where(mask[:, None, :], -energy, jnp.finfo(energy.dtype).min)
        return product("bts,bsd->btd", jax.nn.softmax(scores, axis=-1).astype(self.dtype), frames)

    def _mixed_by_maps(self, rows: Array, mask: Array | None) -> Array:
        """Returns out(A g(x)) of the other forms; `channels` has rows [B, D, T] and no mask."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=rows.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=rows.dtype)
        width = max(rows.shape[-1] // 2, 1)
        theta, phi, g = (dense(width, name=name)(rows) for name in ("theta", "phi", "g"))
        if mask is None:
            affinity = jax.nn.softmax(product("bdi,bdj->bij", theta, phi), axis=-1)
            mixed = product("bij,bdj->bdi", affinity.astype(self.dtype), g)  # [B, D, T/2]
        else:
            scores = product("bti,bsi->bts", theta, phi) * width**-0.5
            scores = jnp.where(mask[:, None, :], scores, jnp.finfo(scores.dtype).min)
            affinity = jax.nn.softmax(scores, axis=-1)  # [B, T, T]
            mixed = product("bts,bsi->bti", affinity.astype(self.dtype), g)  # [B, T, D/2]
        return dense(rows.shape[-1], kernel_init=nn.initializers.zeros, name="out")(mixed)


class AttentionAggregation(nn.Module):
    """Pools the frames of a clip by attention with a learned query vector.

    The query starts at 0, which gives the mean frame.

    Source: DeepMEF (3rd place 2019), one block of the neural aggregation network. Ours: masks.
    """

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Returns sum_t a_t x_t, [B, D] float32, with a_t = softmax over real frames t of q . x_t.

        Frames x are [B, T, D] with a mask [B, T] bool. Clips without frames get 0.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        query = self.param("query", nn.initializers.zeros, x.shape[-1:], x.dtype)
        scores = jnp.where(mask, x @ query, jnp.finfo(x.dtype).min)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)  # [B, T]
        return jnp.einsum("bt,btd->bd", weights, jnp.where(mask[..., None], x, 0.0))
