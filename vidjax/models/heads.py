"""From one vector a clip to a score for every class column."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array, ClipInfo
from vidjax.models import dense_general

# Below every cosine, and finite so that a loss or a log-softmax of it is finite too.
_NO_NEIGHBOUR = -2.0
_SMALLEST_SQUARE = 1e-24


def unit_vectors(x: Array) -> Array:
    """Returns vectors of length 1 in float32 at least; 0 for those shorter than 1e-12.

    Args:
      x: [..., D] float.

    Returns:
      [..., D], finite in value and gradient. A vector of 0 has a gradient of 0.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    # The derivative of rsqrt overflows on squares that it itself can still take.
    usable = squares > _SMALLEST_SQUARE
    return jnp.where(usable, x * jax.lax.rsqrt(jnp.where(usable, squares, 1.0)), 0.0)


class Classifier(nn.Module):
    """Dropout and one linear layer.

    Attributes:
      num_classes: 1 + C.
      dropout_rate: of the input.
      dtype: of the matrix product; parameters and logits are float32 at least.
      kernel_init: initialiser of the weights.
    """

    num_classes: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Returns logits.

        Args:
          x: [B, D] float.
          train: True for dropout (rng `dropout`).

        Returns:
          [B, 1 + C] float32.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            param_dtype=param_dtype,
            kernel_init=self.kernel_init,
            dot_general=dense_general.dot_general,
            name="logits",
        )(x).astype(param_dtype)


class CosineClassifier(nn.Module):
    """Cosines between the input and one learned direction a class, times a scale.

    The margin of ArcFace is no part of it: the loss adds it to the label's angle, so it is off
    wherever there is no loss.

    Attributes:
      num_classes: 1 + C.
      scale: what a cosine of 1 becomes (ArcFace's s).

    Source: Deng et al., ArcFace, equation 2. All in float32 at least and at full precision, as an
    angle near 0 or pi is lost otherwise.
    """

    num_classes: int
    scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns logits.

        Args:
          x: [B, D] float.

        Returns:
          [B, 1 + C] float32 in [-scale, scale]; 0 for a vector of 0.
        """
        unit = unit_vectors(x)
        kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.num_classes), unit.dtype
        )
        directions = unit_vectors(kernel.T)  # [1 + C, D]
        return self.scale * jnp.einsum(
            "bd,cd->bc", unit, directions, precision=jax.lax.Precision.HIGHEST
        )


class NearestNeighbours(nn.Module):
    """Scores a clip by its nearest training clip of every identity; nothing is learned.

    The training clips lie in the collection `memory`: `vectors` [N, D] float32, unit length, and
    `labels` [N] int32. A row that was never written, or whose vector is 0, is nobody's neighbour.

    Attributes:
      num_clips: N, the rows of the memory.
      num_classes: 1 + C.
      logit_scale: factor on the cosines.

    Source: the k-nearest-neighbour baseline of the noise-classes system (5th place 2018); ours: the
    single best clip of an identity counts.
    """

    num_clips: int
    num_classes: int
    logit_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array, clips: ClipInfo, *, train: bool) -> Array:
        """Returns the largest cosine to a training clip of every class.

        Args:
          x: [B, D] float; a vector of 0 is a clip that cannot be seen.
          clips: training writes the rows `index`, and nothing for padded rows.
          train: True to write the memory (which must be mutable).

        Returns:
          [B, 1 + C] float32, times `logit_scale`: cosines in [-1, 1], or -2 where there is no
          training clip or the clip cannot be seen; zeros in training.
        """
        unit = unit_vectors(x)
        vectors = self.variable(
            "memory", "vectors", jnp.zeros, (self.num_clips, x.shape[-1]), unit.dtype
        )
        owners = self.variable(
            "memory", "labels", jnp.full, (self.num_clips,), self.num_classes, jnp.int32
        )
        seen = jnp.any(unit != 0, axis=-1)
        if train:
            if clips.labels is None:
                raise ValueError("the nearest-neighbour memory needs labels in training")
            if not self.is_initializing():
                rows = jnp.where(clips.mask, clips.index, self.num_clips)
                owner = jnp.where(seen, clips.labels, self.num_classes)
                vectors.value = vectors.value.at[rows].set(unit, mode="drop")
                owners.value = owners.value.at[rows].set(owner, mode="drop")
            return jnp.zeros((x.shape[0], self.num_classes), unit.dtype)
        cosines = vectors.value @ unit.T  # [N, B]
        best = jax.ops.segment_max(cosines, owners.value, num_segments=self.num_classes)
        best = jnp.where(seen, best, -jnp.inf)  # [1 + C, B]
        return self.logit_scale * jnp.maximum(best, _NO_NEIGHBOUR).T
