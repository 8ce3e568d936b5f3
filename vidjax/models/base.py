"""The contract between a model and the steps that train and evaluate it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import flax.linen as nn
import numpy as np

from vidjax.core.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.utils.errors import UserError, check_choice

# Nested dicts of arrays, as linen makes them.
Params = Mapping[str, Any]  # the collection `params`, all that the optimiser changes
ModelState = Mapping[str, Any]  # name -> collection, for all other collections


class TrainingClips(NamedTuple):
    """The N training clips as `Identifier.prepare` sees them.

    `values(modality, value_of, wanted)` returns [n, ...], a value of each of the n clips that are
    True in `wanted` [N] bool. `value_of` maps all frames of B clips, Frames [B, T], to [B, ...].
    """

    labels: np.ndarray  # [N] int, class columns; 0 for distractors
    used: np.ndarray  # [E, N] bool, the clips that each member is trained on
    present: Mapping[str, np.ndarray]  # modality -> [N] bool, True for clips that have frames of it
    fusions: Mapping[str, Callable[[None, Frames], Frames]]  # of evaluation, [B, T] -> [B, T']
    values: Callable[[str, Callable[[Frames], Array], np.ndarray], np.ndarray]
    seed: int
    tell: Callable[[str], None]  # tells the user a message


class Identifier(nn.Module):
    """A linen module that maps the fused frames of clips to logits and embeddings.

    A plain net needs only the fields below and `__call__`. A field of type Literal refuses other
    values, and a field `modality` the name of no modality.

    Attributes:
      modalities: name -> feature width, of fused frames.
      num_classes: number of class columns in the logits, K: 1 + C, and more with noise classes.
      logit_scale: factor on the cosines in the logits, the s of ArcFace, which margin losses need;
        1 if the logits are not cosines. If the factor is learned, this is its first value, and
        `ModelOutput.logit_scale` its current one.
      vector_names: [M] names of the vectors in `ModelOutput.attention`, for the report; () for a
        model without attention.
      exact_inputs: True if training adds up or stores the clips and optimises nothing: no option
        may then change or repeat clips.
      knows_unknown: True if the logit of column 0 needs no training clips of column 0.
      min_epochs: passes over the training clips that the model needs.
      parts: field that holds a model -> field that names its modalities.
    """

    vector_names: ClassVar[tuple[str, ...]] = ()
    exact_inputs: ClassVar[bool] = False
    knows_unknown: ClassVar[bool] = False
    min_epochs: ClassVar[float] = 0.0
    parts: ClassVar[Mapping[str, str]] = {}

    if TYPE_CHECKING:  # every model has these, as a field or a constant
        modalities: Mapping[str, int]
        num_classes: int
        logit_scale: float

        def init(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, rngs: Array, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
        ) -> Mapping[str, Any]: ...

        def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
            self,
            variables: Mapping[str, Any],
            frames: Mapping[str, Frames],
            clips: ClipInfo,
            *,
            train: bool,
            rngs: Mapping[str, Array] | None = None,
            mutable: Sequence[str] | bool = False,
        ) -> Any: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if get_origin(field.type) is Literal:
                check_choice(field.name, getattr(self, field.name), get_args(field.type))
        modality = getattr(self, "modality", None)
        if modality is not None and modality not in self.modalities:
            raise UserError(
                f"config.model.modality={modality!r} is not in config.modalities="
                f"{','.join(self.modalities)}\n"
                "add it, or choose one of these for config.model.modality"
            )

    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns the logits and the embedding of B clips.

        Args:
          frames: modality -> Frames [B, T]; modalities may differ in T.
          clips: index, mask and labels of the clips. Rows outside `clips.mask` must not affect the
            other rows or the batch statistics.
          train: True to apply dropout (rngs `dropout` and `modality_dropout`) and to update the
            batch statistics; all collections of the model except `params` are then mutable.

        Raises:
          ValueError: A modality of the model is missing or has another width.
        """
        raise NotImplementedError

    def prepare(self, clips: TrainingClips) -> Mapping[str, Any]:
        """Fits attributes before training; returns name -> value, which checkpoints keep.

        Values are numbers, tuples of one number of each member, or None.
        """
        return {}

    @classmethod
    def with_prepared(cls, spec: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns `spec` with the values that `prepare` found, unless `spec` sets them itself."""
        return {**spec, **{name: x for name, x in found.items() if spec.get(name) is None}}

    def solve(self, params: Params, model_state: ModelState) -> ModelState:
        """Returns the collections that evaluation reads, given those after training, [E, ...]."""
        return model_state

    def measure_clips(self, frames: Mapping[str, Frames]) -> Array | None:
        """Returns `ClipInfo.measure`, [B] float32, of the raw frames; None if it treats all alike.

        The frames, modality -> Frames [B, T], are those before fusion, with all features.
        """
        return None

    def gallery_settings(self) -> Any | None:
        """Returns the `two_covariance.Settings` that galleries compare by; None for cosines."""
        return None
