"""What a batch is: the axis legend, class columns, Frames, Batch, and the contract of a model.

Axis letters, the same in the whole code: B clips, T frames, M modalities, D features, K clusters,
C identities, E ensemble members, G branches of a model.

Class columns, the same in the whole code: column 0 is "other" (distractors), columns 1..C are the
identities in the order of `identities.json`. Logits and scores are therefore [B, 1 + C]. Columns
for noise classes follow (`NoiseLayout`); a model's `num_classes` counts them too.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

# The same structures serve the host and the devices.
Array: TypeAlias = jax.Array | np.ndarray


class NoiseLayout(NamedTuple):
    """Meaning of the class columns with noise: 0 other, 1..C identities, K clusters, C mirrors.

    Attributes:
      num_identities: C.
      num_clusters: K.

    Source: noise classes (5th place 2018). Ours: column 0 is "other", as everywhere here, so the
    published `l < C` is `1 <= l <= C`; the shift of C + K is the same.
    """

    num_identities: int
    num_clusters: int

    @property
    def num_columns(self) -> int:
        """Number of class columns, 1 + 2C + K."""
        return 1 + 2 * self.num_identities + self.num_clusters

    @property
    def mirror_shift(self) -> int:
        """Distance from the column of an identity to the column of its mirror, C + K."""
        return self.num_identities + self.num_clusters

    def is_identity(self, columns: Array) -> Array:
        """Marks columns 1..C; `columns` is an integer array of any shape, numpy or jax."""
        return (columns >= 1) & (columns <= self.num_identities)

    def is_cluster(self, columns: Array) -> Array:
        """Marks columns C+1..C+K; `columns` is an integer array of any shape, numpy or jax."""
        return (columns > self.num_identities) & (columns <= self.mirror_shift)

    def is_mirror(self, columns: Array) -> Array:
        """Marks columns C+K+1..2C+K; `columns` is an integer array of any shape, numpy or jax."""
        return (columns > self.mirror_shift) & (columns < self.num_columns)


class LazyFeatures(NamedTuple):
    """Features [B, T, D] that have not been gathered yet.

    They are all frames of the dataset, and the indices of the frames in this batch. A selection of
    frames changes the indices alone; `vidjax.selection.read` gathers, as late as possible.

    Attributes:
      values: [F, D], all frames of a dataset, in the stored dtype.
      index: [B, T] int32, row of `values` for each frame; any valid row on padding.
    """

    values: Array
    index: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [B, T, D] that the gathered features would have."""
        return (*self.index.shape, self.values.shape[-1])


class Frames(NamedTuple):
    """The frames of one modality of B clips, padded to T.

    Attributes:
      features: [B, T, D], in the stored dtype (float16 for official files) until the device; or
        LazyFeatures of that shape.
      quality: [B, T] float32, quality score of the face detector, usually 0 to 150, at times
        negative; 0 where the modality has none.
      detection: [B, T] float32, detection score from 0 to 1; 1 where the modality has none.
      number: [B, T] int32, frame number within the clip, non-decreasing.
      mask: [B, T] bool, True for real frames. A clip that lacks the modality has no True.
    """

    features: Array
    quality: Array
    detection: Array
    number: Array
    mask: Array


class Batch(NamedTuple):
    """Clips of one step.

    Attributes:
      frames: modality -> Frames.
      clip_index: [B] int32, row of the clip in every table (labels, weights); 0 on padded rows.
      batch_mask: [B] bool, True for real clips.
    """

    frames: Mapping[str, Frames]
    clip_index: Array
    batch_mask: Array


class ClipInfo(NamedTuple):
    """What a model may know of a clip beside its frames.

    Attributes:
      index: [B] int32, row of the clip among the training clips; 0 on padded rows.
      mask: [B] bool, True for real clips. A padded row must change nothing, statistics included.
      labels: [B] int32, class columns, in training; None in evaluation.
    """

    index: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)
    mask: Array
    labels: Array | None = None


class ModelOutput(NamedTuple):
    """What a model says about B clips.

    Most models have one branch, G = 1. A model with several branches lets each answer for the clips
    that it can see, and says so by the two weights.

    Attributes:
      logits: [B, G, 1 + C] float32.
      embedding: [B, D] float32, the vector of the clip before the classifier.
      train_weight: [B, G] float32, weight of a branch's loss on a clip: 0 for clips that the branch
        does not learn from; None for 1 throughout.
      eval_weight: [B, G] float32, weight with which evaluation sums the scores of the branches
        (probabilities, not logits); None for 1 throughout. The weights of a clip need not sum to 1:
        clips are ranked against each other.
      attention: what the report draws. `attention` is [B, M, M], the weight that vector i gives to
        vector j; `assignment/MODALITY` is [B, T, K], the share of cluster k in frame t.
        None where there is nothing to draw.
    """

    logits: Array
    embedding: Array
    train_weight: Array | None = None
    eval_weight: Array | None = None
    attention: Mapping[str, Array] | None = None


class Packed(NamedTuple):
    """The frames of one modality of N clips without padding, the frames of a clip in a row.

    Attributes:
      features: [F, D], in the stored dtype.
      quality: [F] float32, as in Frames, and so are the next two.
      detection: [F] float32.
      number: [F] int32.
      start: [N] int32, row of a clip's first frame.
      length: [N] int32, number of a clip's frames.
    """

    features: Array
    quality: Array
    detection: Array
    number: Array
    start: Array
    length: Array
