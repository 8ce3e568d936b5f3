"""The structures of a batch of clips, and the conventions for axes and class columns.

In shapes, B counts the clips of a batch, N the clips of a dataset, T frames, D features, C
identities, and E members (nets) of an ensemble. Three letters depend on the module: K counts class
columns or clusters, M counts modalities (such as face and voice) or vectors inside a model, and G
counts the branches (sets of logits) of a model or the examples of a clip, see `ClipInfo`.

Class columns are the columns of logits and scores, [B, 1 + C]. Column 0 is "other": distractors,
which show none of the identities. Columns 1..C are the identities in the order of
`identities.json`. Noise classes add further columns, see `NoiseClassLayout`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

import numpy as np

if TYPE_CHECKING:
    import jax

# Code on the host fills these structures with numpy arrays, so that it does not wait for JAX.
Array: TypeAlias = Union["jax.Array", np.ndarray]


class NoiseClassLayout(NamedTuple):
    """The columns of the logits if distractors (clips of no identity) are split into noise classes.

    The setting is `config.data.distractors=noise`. C is `num_identities`, and K is `num_clusters`.

    - Column 0: "other". No clip has this class.
    - Columns 1 to C: the identities.
    - Columns C + 1 to C + K: K clusters of distractors that look alike.
    - Columns C + K + 1 to 2 C + K: the mirrors. The mirror of an identity is a class of distractors
      that the model mistakes for this identity.

    Source: noise classes (5th place 2018). The paper has no column 0, so all its columns are lower
    by 1.
    """

    num_identities: int
    num_clusters: int

    @property
    def num_columns(self) -> int:
        """The number of class columns: 1 + 2 x `num_identities` + `num_clusters`."""
        return 1 + 2 * self.num_identities + self.num_clusters

    @property
    def mirror_shift(self) -> int:
        """The number of an identity's mirror column minus the number of the identity's column."""
        return self.num_identities + self.num_clusters

    def is_identity(self, columns: Array) -> Array:
        """Returns [...] bool: whether each class column in `columns` [...] int is an identity."""
        return (columns >= 1) & (columns <= self.num_identities)

    def is_mirror(self, columns: Array) -> Array:
        """Returns [...] bool: whether each class column in `columns` [...] int is a mirror.

        The mirror of an identity is a class of distractors that the model mistakes for it.
        """
        return (columns > self.mirror_shift) & (columns < self.num_columns)


class LazyFeatures(NamedTuple):
    """The features of B clips of T frames, stored as row numbers of a large array.

    `fusion.read` gathers the rows into an array [B, T, D].

    Attributes:
      values: [F, D], features of all F frames of the dataset, in the stored dtype.
      index: [B, T] int32, the row of `values` for each frame, arbitrary for padded frames. A
        function that selects frames changes only this field.
    """

    values: Array
    index: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the gathered features, [B, T, D]."""
        return (*self.index.shape, self.values.shape[-1])


class Frames(NamedTuple):
    """The frames of a modality of B clips, padded to T frames.

    Attributes:
      features: [B, T, D] in the stored dtype, float16 for iQIYI-VID. Before fusion it may be
        LazyFeatures, although its type says Array.
      quality: [B, T] float32, quality score of the face detector, usually 0 to 150, sometimes
        negative; 0 for modalities without a quality.
      detection: [B, T] float32, detection score from 0 to 1; 1 for modalities without a score.
      number: [B, T] int32, frame number within the clip, non-decreasing.
      mask: [B, T] bool, True for real frames; all False for clips that lack the modality.
    """

    features: Array
    quality: Array
    detection: Array
    number: Array
    mask: Array


# The fields that Frames, Packed and the records in the cache have in common.
BATCHED = tuple(name for name in Frames._fields if name != "mask")


class Batch(NamedTuple):
    """The clips of a training step, or some clips of an evaluation."""

    frames: Mapping[str, Frames]  # modality -> Frames [B, T]; modalities may differ in T
    clip_index: Array  # [B] int32, row of each clip in arrays such as the labels; 0 on padded rows
    batch_mask: Array  # [B] bool, True for real clips


class ClipInfo(NamedTuple):
    """What a model receives about B examples, in addition to their frames.

    An example is a clip or, if `config.after_fusion` is `examples`, one of a clip's fused frames.

    Attributes:
      index: [B] int32, row of the example's clip among the training clips; 0 on padded rows.
      mask: [B] bool, True for real examples. Padded rows must not affect the batch statistics.
      labels: [B] int32, column of the correct class in the logits; None in evaluation.
      measure: [B] float32, quality of the clip by `Identifier.measure_clips`; None in training.
    """

    index: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)
    mask: Array
    labels: Array | None = None
    measure: Array | None = None


class ModelOutput(NamedTuple):
    """Output of a model for B clips.

    A branch is a set of logits. Most models have a single branch, G = 1. If a weight is None, it is
    1 for all branches and clips.

    Attributes:
      logits: [B, G, 1 + C] float32. Column 0 means no identity. Then follow the C classes.
      embedding: [B, D] float32, input of the classifier.
      loss_weight: [B, G] float32, weight of each branch in the loss; 0 if the branch does not
        learn from the clip.
      score_weight: [B, G] float32, weight of each branch in evaluation. It multiplies
        probabilities, not logits. Smaller weights rank the clip lower.
      attention: [B, M, M] weights between M vectors, such as one per modality. Entry [b, i, j] is
        the weight of vector i in the output for vector j. None without attention.
      logit_scale: [G] float32, learned factor on the cosines in the logits of each branch, or None.
    """

    logits: Array
    embedding: Array
    loss_weight: Array | None = None
    score_weight: Array | None = None
    attention: Array | None = None
    logit_scale: Array | None = None


class Packed(NamedTuple):
    """All F frames of N clips in a modality, clip after clip, in arrays without padding."""

    features: Array  # [F, D] in the stored dtype
    quality: Array  # [F] float32, see Frames
    detection: Array  # [F] float32, see Frames
    number: Array  # [F] int32, frame number within the clip
    start: Array  # [N] int32 (int64 in memory of the host), row of the first frame of each clip
    length: Array  # [N] int32, number of frames of each clip
