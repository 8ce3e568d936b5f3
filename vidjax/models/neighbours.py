"""The baseline: nearest neighbours among the training clips."""

from collections.abc import Mapping

import flax.linen as nn

from vidjax import fusion
from vidjax.batch import Array, Frames
from vidjax.models import inputs
from vidjax.models.heads import NearestNeighbours


class NeighbourIdentifier(nn.Module):
    """The baseline: the mean frame of one modality, by cosine to the training clips.

    Attributes:
      modalities: name -> feature width.
      num_classes: 1 + C.
      num_clips: training clips.
      modality: the one that is compared.
      logit_scale: factor on the cosines, for a softmax over identities.
    """

    modalities: Mapping[str, int]
    num_classes: int
    num_clips: int
    modality: str = "face"
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality not in self.modalities:
            raise ValueError(
                f"model 'knn' compares {self.modality!r}; configured are "
                f"{', '.join(self.modalities)}"
            )

    @nn.compact
    def __call__(
        self,
        frames: Mapping[str, Frames],
        *,
        clip_index: Array,
        labels: Array,
        batch_mask: Array,
        train: bool,
    ) -> Array:
        """Returns scaled cosines as logits; in training zeros, while it fills `memory`.

        Args:
          frames: modality -> Frames [B, T].
          clip_index: [B] int32, rows of the memory.
          labels: [B] int32, class columns.
          batch_mask: [B] bool.
          train: True to fill the collection `memory`, which must be mutable.

        Returns:
          [B, 1 + C] float32, as NearestNeighbours.

        Raises:
          ValueError: where the modality is missing or has another width.
        """
        inputs.check_frames(frames, self.modalities)
        mean = fusion.mean_frame(frames[self.modality]).features[:, 0]  # [B, D]
        return NearestNeighbours(
            self.num_clips, self.num_classes, self.logit_scale, name="neighbours"
        )(mean, clip_index=clip_index, labels=labels, batch_mask=batch_mask, train=train)
