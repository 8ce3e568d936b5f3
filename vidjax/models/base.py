"""The contract between a model and the steps that train and evaluate it."""

from collections.abc import Mapping
from typing import Any, Protocol

from vidjax.batch import ClipInfo, Frames, ModelOutput


class Identifier(Protocol):
    """A linen module that maps the fused frames of clips to logits and embeddings.

    Attributes:
      logit_scale: factor on the cosines in the logits (the s of ArcFace), which margins need; 1
        where the logits are no cosines.
      vector_names: [M] names of the vectors that `ModelOutput.attention` weighs against each other,
        for the report; () for a model without attention.
    """

    @property
    def logit_scale(self) -> float: ...

    @property
    def vector_names(self) -> tuple[str, ...]: ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns logits, embedding and what else the model says about B clips.

        Args:
          frames: modality -> Frames [B, T], each modality with a T of its own.
          clips: B clips; a row outside `clips.mask` must change nothing, statistics included.
          train: True for dropout (rngs `dropout`, `modality_dropout`) and batch statistics (the
            model's own collections are then mutable).
        """
        ...
