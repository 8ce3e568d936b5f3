"""The baseline: nearest neighbours among the training clips."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax import fusion
from vidjax.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.errors import UserError
from vidjax.models.base import Identifier
from vidjax.models.layers import real_frames, unit_vectors


class NeighbourIdentifier(Identifier):
    """The baseline: cosine of a clip to the nearest training clip of each class, by mean frames."""

    modalities: Mapping[str, int]
    num_classes: int
    num_clips: int
    modality: str = "face"
    logit_scale: float = 1.0
    exact_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality not in self.modalities:
            raise UserError(
                f"model 'knn' needs the modality {self.modality!r}; config.modalities are "
                f"{', '.join(self.modalities)}"
            )

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns logits [B, 1, 1 + C], 0 in training, and the mean frame as embedding."""
        real, _ = real_frames(frames, self.modalities, clips.mask)
        mean = fusion.mean_frame(real[self.modality]).features[:, 0]  # [B, D]
        logits = NearestNeighbours(
            self.num_clips, self.num_classes, self.logit_scale, name="neighbours"
        )(mean, clips, train=train)
        return ModelOutput(logits[:, None], embedding=mean)


# Below every cosine, and finite, so that losses and log-softmax stay finite.
_NO_NEIGHBOUR = -2.0


class NearestNeighbours(nn.Module):
    """Scores a clip by its cosine to the nearest training clip of every class.

    Training stores the clips in the collection `memory`: `vectors` [N, D] float32 of unit length,
    and `labels` [N] int32. Rows that were never written, and vectors of 0, are never neighbours.

    Source: k-nearest-neighbour baseline of the noise-classes system (5th place 2018). Ours: k = 1
    for each class.
    """

    num_clips: int
    num_classes: int
    logit_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array, clips: ClipInfo, *, train: bool) -> Array:
        """Returns the largest cosine to a training clip of every class, times `logit_scale`.

        Args:
          x: [B, D] float, 0 for clips without frames.
          clips: B clips, in training with labels; padded rows are not stored.
          train: True to store clips at the rows `clips.index` of `memory`, which must be mutable.

        Returns:
          [B, 1 + C] float32, 0 in training. Without a training clip or a frame the cosine is -2.
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
                raise ValueError("model 'knn' needs ClipInfo.labels in training")
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
