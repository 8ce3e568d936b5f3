"""From one vector a clip to a score for every class column."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array

# Below every cosine, and finite so that a loss or a log-softmax of it is finite too.
_NO_NEIGHBOUR = -2.0


class Classifier(nn.Module):
    """Dropout and one linear layer.

    Attributes:
      num_classes: 1 + C.
      dropout_rate: of the input.
      dtype: of the matrix product; parameters and logits are float32 at least.
    """

    num_classes: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

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
            dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=param_dtype),
            name="logits",
        )(x).astype(param_dtype)


class NearestNeighbours(nn.Module):
    """Scores a clip by its nearest training clip of every identity; nothing is learned.

    The training clips lie in the collection `memory`: `vectors` [N, D] float32, unit length, and
    `labels` [N] int32. A row that was never written, or whose vector is 0, is nobody's neighbour.

    Attributes:
      num_clips: N, the rows of the memory.
      num_classes: 1 + C.

    Source: the k-nearest-neighbour baseline of the noise-classes system (5th place 2018); ours: the
    single best clip of an identity counts.
    """

    num_clips: int
    num_classes: int

    @nn.compact
    def __call__(
        self, x: Array, *, clip_index: Array, labels: Array, batch_mask: Array, train: bool
    ) -> Array:
        """Returns the largest cosine to a training clip of every class.

        Args:
          x: [B, D] float; a vector of 0 is a clip that cannot be seen.
          clip_index: [B] int32, the rows that training writes.
          labels: [B] int32, class columns; read in training only.
          batch_mask: [B] bool; padded rows write nothing.
          train: True to write the memory (which must be mutable).

        Returns:
          [B, 1 + C] float32: cosines in [-1, 1], or -2 where there is no training clip or the clip
          cannot be seen; zeros in training.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        vectors = self.variable(
            "memory", "vectors", jnp.zeros, (self.num_clips, x.shape[-1]), x.dtype
        )
        owners = self.variable(
            "memory", "labels", jnp.full, (self.num_clips,), self.num_classes, jnp.int32
        )
        squares = jnp.sum(x * x, axis=-1, keepdims=True)
        seen = squares[:, 0] > 0
        unit = x * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(x.dtype).tiny))
        if train:
            if not self.is_initializing():
                rows = jnp.where(batch_mask, clip_index, self.num_clips)
                owner = jnp.where(seen, labels, self.num_classes)
                vectors.value = vectors.value.at[rows].set(unit, mode="drop")
                owners.value = owners.value.at[rows].set(owner, mode="drop")
            return jnp.zeros((x.shape[0], self.num_classes), x.dtype)
        cosines = vectors.value @ unit.T  # [N, B]
        best = jax.ops.segment_max(cosines, owners.value, num_segments=self.num_classes)
        best = jnp.where(seen, best, -jnp.inf)  # [1 + C, B]
        return jnp.maximum(best, _NO_NEIGHBOUR).T
