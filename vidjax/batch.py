"""What a batch is: the axis legend, Frames and Batch.

Axis letters, the same in the whole code: B clips, T frames, M modalities, D features, K clusters,
C identities, E ensemble members.

Class columns, the same in the whole code: column 0 is "other" (distractors), columns 1..C are the
identities in the order of `identities.json`. Logits and scores are therefore [B, 1 + C]. Where
columns for noise follow behind, a model counts them too: its `num_classes` is how many there are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Array = Any  # a numpy or a jax array: the same structures serve the host and the device


class LazyFeatures(NamedTuple):
    """Features [B, T, D] that stay where they lie until it is known which of them are wanted.

    Attributes:
      values: [F, D], all frames of a dataset, in the stored dtype.
      index: [B, T] int32, where each frame lies; any valid place on padding.
    """

    values: Array
    index: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features that this stands for."""
        return (*self.index.shape, self.values.shape[-1])


class Frames(NamedTuple):
    """The frames of one modality of B clips, padded to T.

    Attributes:
      features: [B, T, D], in the stored dtype (float16 for official files) until the device; or
        LazyFeatures of that shape, which `vidjax.selection` passes on and `vidjax.fusion` reads.
      quality: [B, T] float32, the quality score; 0 where the modality has none.
      detection: [B, T] float32, the detection score; 1 where the modality has none.
      number: [B, T] int32, the frame number within the clip, non-decreasing.
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
      clip_index: [B] int32, the row of the clip in every table (labels, weights); 0 on padded rows.
      batch_mask: [B] bool, True for real clips.
    """

    frames: Mapping[str, Frames]
    clip_index: Array
    batch_mask: Array


class Branches(NamedTuple):
    """Logits of a model whose branches answer for different clips.

    Attributes:
      logits: [B, G, 1 + C] float32, of G branches.
      train_weight: [B, G] float32, weight of a branch's loss on a clip; 0 where the branch is not
        trained on it.
      eval_weight: [B, G] float32, with which the scores (probabilities, not logits) of the branches
        are summed in evaluation. They need not sum to 1: clips are ranked against each other.
    """

    logits: Array
    train_weight: Array
    eval_weight: Array


class Packed(NamedTuple):
    """The frames of one modality of N clips without padding, each clip's in a row.

    Attributes:
      features: [F, D], in the stored dtype.
      quality: [F] float32, as in Frames, and so are the next two.
      detection: [F] float32.
      number: [F] int32.
      start: [N] int32, where a clip's frames begin.
      length: [N] int32, how many they are.
    """

    features: Array
    quality: Array
    detection: Array
    number: Array
    start: Array
    length: Array
