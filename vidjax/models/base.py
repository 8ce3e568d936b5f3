"""The interface between a model and the steps that train and evaluate it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import numpy as np
from msgspec import Meta

from vidjax.core.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.utils.errors import UserError

# Types of options of models. `build_system.make_identifier` checks their ranges.
Size = Annotated[int, Meta(ge=1)]  # of a layer, or a number of layers or frames
Share = Annotated[float, Meta(ge=0, le=1)]

# Nested dicts of arrays, as linen makes them.
Params = Mapping[str, Any]  # the collection `params`; the optimiser changes nothing else
ModelState = Mapping[str, Any]  # name -> collection, for all other collections


class TrainingClips(NamedTuple):
    """The N training clips of a run, the argument of `Identifier.prepare`."""

    labels: np.ndarray  # [N] int, class columns; 0 for distractors
    used: np.ndarray  # [E, N] bool, True for the clips that each member is trained on
    present: Mapping[str, np.ndarray]  # modality -> [N] bool, True for clips that have the modality
    fusions: Mapping[str, Callable[[None, Frames], Frames]]  # for evaluation, [B, T] -> [B, T']
    # (modality, value_of, wanted [N] bool) -> values [n, ...] of the n clips that `wanted` selects.
    # `value_of` computes values [B, ...] from all frames of B clips, Frames [B, T].
    values: Callable[[str, Callable[[Frames], Array], np.ndarray], np.ndarray]
    seed: int
    print_message: Callable[[str], None]  # prints a message to the user


class Identifier(nn.Module):
    """A linen module that maps the frames of clips to logits and embeddings.

    A plain network needs only the fields below and `__call__`. The value of a field is checked if
    its type is a Literal, Size (1 or more) or Share (0 to 1). The value of a field `modality` must
    be one of `modalities`. Many models have the fields `feature_scale`, a factor on the raw
    features, and `modality_dropout_rate`, the probability that training drops a modality of a clip.
    At least one modality of each clip stays.

    Attributes:
      modalities: name -> feature width of the fused frames.
      num_classes: number of class columns in the logits, K. Column 0 is "other", columns 1 to C are
        identities, and noise classes (classes of distractors) may follow.
      logit_scale: factor on the cosines in the logits, the s of ArcFace. Losses with a margin need
        it. It is 1 if the logits are not cosines. If the factor is learned, this is its initial
        value, and `ModelOutput.logit_scale` is its current value.
      vector_names: names of the M vectors between which the model has attention, for the report;
        () for a model without attention.
      is_closed_form: True if training only sums or stores vectors of clips, without a loss and an
        optimiser. Then the options that change or repeat training clips must be off.
      scores_unknown: True if the model computes the logit of column 0, "other", even if no training
        clip is labelled "other".
      min_epochs: number of passes over the training clips that the model needs.
      parts: the models in this model. {"main": "main_modalities"}, for example, means that the
        field `main` is a model for the modalities in the field `main_modalities`.
    """

    vector_names: ClassVar[tuple[str, ...]] = ()
    is_closed_form: ClassVar[bool] = False
    scores_unknown: ClassVar[bool] = False
    min_epochs: ClassVar[float] = 0.0
    parts: ClassVar[Mapping[str, str]] = {}

    if TYPE_CHECKING:  # every model defines these, as a field or a constant
        modalities: Mapping[str, int]
        num_classes: int
        logit_scale: float
        apply: Callable[..., Any]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        modality = getattr(self, "modality", None)
        if modality is not None and modality not in self.modalities:
            raise UserError(
                f"config.model.modality={modality!r} is not in config.modalities="
                f"{','.join(self.modalities)}\n"
                "add it to config.modalities, or choose one of these for config.model.modality"
            )

    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits and the embeddings of B clips.

        Args:
          frames: modality -> Frames [B, T]; modalities may differ in T.
          clips: index, mask and labels of the clips. Rows where `clips.mask` is False must not
            affect other rows or the batch statistics.
          train: True to apply dropout (rngs `dropout` and `modality_dropout`) and update the batch
            statistics. If True, all collections of the model except `params` are mutable.
        """
        raise NotImplementedError

    def prepare(self, clips: TrainingClips) -> Mapping[str, Any]:
        """Computes attributes of the model from the training clips, before the first step.

        Returns attribute -> value. A value is a number, None, or a tuple with a number for each
        member of an ensemble. Checkpoints store the values.
        """
        return {}

    @classmethod
    def with_prepared(
        cls, spec: Mapping[str, Any], prepared: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Returns the attributes `spec` of a model, completed by the result of `prepare`.

        `spec` and `prepared` are attribute -> value. A value in `spec` that is None or missing is
        taken from `prepared`.
        """
        return {**spec, **{name: x for name, x in prepared.items() if spec.get(name) is None}}

    def finalise_state(self, params: Params, model_state: ModelState) -> ModelState:
        """Returns the variables for evaluation that replace `model_state` after the training.

        `params` are the trained parameters. `model_state` are all other collections of variables.
        All arrays are [E, ...] for E nets. For example, PLDA computes coefficients from sums.
        """
        return model_state

    def measure_clips(self, frames: Mapping[str, Frames]) -> Array | None:
        """Measures the quality of B clips for the evaluation, [B] float32.

        `frames` is modality -> Frames [B, T], the input of `System.fuse`. The model receives the
        result as `ClipInfo.measure`. Returns None if the model needs no quality.
        """
        return None

    def gallery_settings(self) -> Any | None:
        """Returns the PLDA settings with which a gallery of enrolled people compares embeddings.

        Returns None if the gallery compares embeddings by cosines.
        """
        return None


def check_output(model: Identifier, output: object, num_clips: int) -> None:
    """Raises UserError if the output of a model is not a ModelOutput of the right shapes.

    `num_clips` is B in the shapes, the number of clips that the model received.
    """
    name = type(model).__name__
    if not isinstance(output, ModelOutput):
        raise UserError(
            f"model {name} returns {'an array' if hasattr(output, 'dtype') else type(output)}\n"
            "return ModelOutput(logits, embedding) of vidjax.core.batch"
        )
    shapes = {field: getattr(x, "shape", None) for field, x in output._asdict().items()}
    branches = (shapes["logits"] or ())[1:2]
    wanted = {
        "logits": ((num_clips, *branches, model.num_classes), "[B, G, K]"),
        "embedding": ((num_clips, *(shapes["embedding"] or ())[-1:]), "[B, D]"),
        "loss_weight": ((num_clips, *branches), "[B, G]"),
        "score_weight": ((num_clips, *branches), "[B, G]"),
        "logit_scale": (branches, "[G]"),
    }
    for field, (shape, letters) in wanted.items():
        is_optional = field not in ("logits", "embedding")
        if shapes[field] != shape and not (is_optional and getattr(output, field) is None):
            raise UserError(
                f"model {name}: {field} has the shape {shapes[field]}, but must have the shape "
                f"{letters}\nhere B is {num_clips} clips, G is the number of branches, "
                f"usually 1, and K is {model.num_classes} classes"
            )
