"""The contract between a model and the steps that train and evaluate it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from vidjax.batch import Array, ClipInfo, Frames, ModelOutput

# Nested dicts of arrays, as linen makes them.
Params: TypeAlias = Mapping[str, Any]  # the collection `params`, all that the optimiser changes
ModelState: TypeAlias = Mapping[str, Any]  # name -> collection, for all other collections
Variables: TypeAlias = Mapping[str, Any]  # name -> collection


class Identifier(Protocol):
    """A linen module that maps the fused frames of clips to logits and embeddings.

    Attributes:
      num_classes: number of class columns in the logits, K.
      logit_scale: factor on the cosines in the logits, the s of ArcFace; 1 if the logits are not
        cosines. The margin losses need it. If it is learned, its first value; the output then
        holds the present one.
      vector_names: [M] names of the vectors in `ModelOutput.attention`, for the report; () for a
        model without attention.
    """

    @property
    def num_classes(self) -> int: ...

    @property
    def logit_scale(self) -> float: ...

    @property
    def vector_names(self) -> tuple[str, ...]: ...

    def init(
        self, rngs: Array, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> Variables: ...

    def apply(
        self,
        variables: Variables,
        frames: Mapping[str, Frames],
        clips: ClipInfo,
        *,
        train: bool,
        rngs: Mapping[str, Array] | None = None,
        mutable: Sequence[str] | bool = False,
    ) -> Any: ...

    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns the logits and the embedding of B clips.

        Args:
          frames: modality -> Frames [B, T]; modalities may differ in T.
          clips: index, mask and labels of the clips. Rows outside `clips.mask` must not affect
            the other rows or the batch statistics.
          train: True to apply dropout (rngs `dropout` and `modality_dropout`) and to update the
            batch statistics; all collections of the model except `params` are then mutable.
        """
        ...


def has_exact_inputs(model: type) -> bool:
    """Returns whether training a model is adding up or storing its clips, each once as it is.

    Nothing is optimised then, and clips may neither be changed nor count more than once. Such a
    model has the class attribute `exact_inputs`.
    """
    return getattr(model, "exact_inputs", False)
