"""The baseline: nearest neighbours among the training clips."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn

from vidjax import fusion
from vidjax.batch import ClipInfo, Frames, ModelOutput
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
    vector_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality not in self.modalities:
            raise ValueError(
                f"model 'knn' compares {self.modality!r}; configured are "
                f"{', '.join(self.modalities)}"
            )

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns scaled cosines as logits; in training zeros, while it fills `memory`.

        Args:
          frames: modality -> Frames [B, T].
          clips: training writes row `index` of the memory, with the label.
          train: True to fill the collection `memory`, which must be mutable.

        Returns:
          ModelOutput with one branch; logits [B, 1, 1 + C] as NearestNeighbours gives them.

        Raises:
          ValueError: where the modality is missing or has another width.
        """
        inputs.check_frames(frames, self.modalities)
        mean = fusion.mean_frame(frames[self.modality]).features[:, 0]  # [B, D]
        logits = NearestNeighbours(
            self.num_clips, self.num_classes, self.logit_scale, name="neighbours"
        )(mean, clips, train=train)
        return ModelOutput(logits[:, None], embedding=mean)
