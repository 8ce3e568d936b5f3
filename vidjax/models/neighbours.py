"""The baseline: nearest neighbours among the training clips."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn

from vidjax import fusion
from vidjax.batch import ClipInfo, Frames, ModelOutput
from vidjax.errors import UserError
from vidjax.models import inputs
from vidjax.models.heads import NearestNeighbours


class NeighbourIdentifier(nn.Module):
    """The baseline: cosines between the mean frames of clips, for one modality.

    Attributes:
      modalities: name -> feature width.
      num_classes: number of class columns, 1 + C.
      num_clips: number of training clips, N.
      modality: modality whose mean frames are compared.
      logit_scale: factor on the cosines, for a softmax over identities.
    """

    modalities: Mapping[str, int]
    num_classes: int
    num_clips: int
    modality: str = "face"
    logit_scale: float = 1.0
    vector_names: ClassVar[tuple[str, ...]] = ()
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
        """Returns logits [B, 1, 1 + C] and the mean frame as embedding.

        Arguments are those of `models.base.Identifier`. Training stores the clips in the collection
        `memory` and returns logits of 0; see NearestNeighbours.

        Raises:
          ValueError: A modality of the model is missing or has another width.
        """
        inputs.check_frames(frames, self.modalities)
        mean = fusion.mean_frame(frames[self.modality]).features[:, 0]  # [B, D]
        logits = NearestNeighbours(
            self.num_clips, self.num_classes, self.logit_scale, name="neighbours"
        )(mean, clips, train=train)
        return ModelOutput(logits[:, None], embedding=mean)
