"""Two models, the second for clips that the first cannot judge: no face, or a poor one."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vidjax.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models import inputs
from vidjax.models.heads import unit_vectors


class FallbackIdentifier(nn.Module):
    """A main model, and another one that answers where the main one's modality is missing or poor.

    Both are trained side by side, each on the clips that have what it looks at. In evaluation the
    scores of the two are summed with these weights (main, other):

        a clip without `modality`:                          (0, missing_scale)
        its frames of `modality` measure below `threshold`: (main_share, other_share)
        any other, and all that the other cannot see:       (1, 0)

    Attributes:
      modalities: name -> feature width.
      num_classes: 1 + C.
      main: the main model.
      other: the model of the fallback.
      other_modalities: what the other looks at; not `modality`.
      main_modalities: what the main model looks at; () for all.
      modality: the one that decides who answers.
      missing_scale: weight of the other's score where the clip lacks `modality`: below 1, as these
        clips are ranked against all others and are less certain.
      measure: norm (mean length of the clip's vectors, as they reach the model) | quality (mean).
      threshold: of the measure; a norm is never below the default of 0.
      main_share: weight of the main model below the threshold.
      other_share: weight of the other below the threshold.

    Source: DeepMEF (3rd place 2019): scenes alone, times .95, where there is no face; .2 x face and
    scene + .8 x scene for the 1 % of least norm (below 8.867 on its features). Residual Dense Net
    (2nd place 2019): the body alone where there is no face. Ours: one run trains both.
    """

    modalities: Mapping[str, int]
    num_classes: int
    main: Any
    other: Any
    other_modalities: tuple[str, ...]
    main_modalities: tuple[str, ...] = ()
    modality: str = "face"
    missing_scale: float = 0.95
    measure: str = "norm"
    threshold: float = 0.0
    main_share: float = 0.2
    other_share: float = 0.8
    # Fields that are models -> the field that names their modalities.
    parts: ClassVar[Mapping[str, str]] = {"main": "main_modalities", "other": "other_modalities"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in ("norm", "quality"):
            raise ValueError(f"unknown measure {self.measure!r}; known are norm, quality")
        if self.modality not in (self.main_modalities or self.modalities):
            raise ValueError(f"the main model of a fallback must see {self.modality!r}")
        if not self.other_modalities or self.modality in self.other_modalities:
            raise ValueError(
                f"a fallback for clips without {self.modality!r} needs other_modalities without "
                f"it, got {', '.join(self.other_modalities) or 'none'}"
            )
        if self.main.logit_scale != self.other.logit_scale:
            raise ValueError(
                f"logit_scale of main and other must be equal, got {self.main.logit_scale} and "
                f"{self.other.logit_scale}"
            )

    @property
    def logit_scale(self) -> float:
        """Factor on the cosines in the logits of both models; 1 for linear classifiers."""
        return self.main.logit_scale

    @property
    def vector_names(self) -> tuple[str, ...]:
        """Names of the vectors that attend to each other, of whichever model has them."""
        return self.main.vector_names or self.other.vector_names

    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns the logits of both models, with weights that say which one answers for a clip.

        Args:
          frames: modality -> Frames [B, T], each with a T of its own.
          clips: what the two models read.
          train: True for training; each model then sees only the clips that it learns from.

        Returns:
          ModelOutput with two branches: main, other. The embedding is the unit vectors of the two
          side by side, 0 where a model has no say.

        Raises:
          ValueError: a configured modality is missing or has another width, or one of the two
            models has branches itself.
        """
        real, present = inputs.real_frames(frames, self.modalities, clips.mask)
        has = dict(zip(real, present.T, strict=True))  # modality -> [B]
        main_sees = has[self.modality]
        other_sees = jnp.any(jnp.stack([has[name] for name in self.other_modalities]), axis=0)

        outputs = []
        for part, sees in ((self.main, main_sees), (self.other, other_sees)):
            rows = clips.mask & sees if train else clips.mask
            output = part(frames, clips._replace(mask=rows), train=train)
            if output.logits.shape[1] > 1:
                raise ValueError("the models of a fallback cannot have branches themselves")
            outputs.append(output)

        poor = main_sees & (_mean_measure(real[self.modality], self.measure) < self.threshold)
        main_weight = jnp.where(main_sees, jnp.where(poor, self.main_share, 1.0), 0.0)
        other_weight = jnp.where(poor, self.other_share, 0.0)
        other_weight = jnp.where(main_sees, other_weight, self.missing_scale)
        answers = jnp.stack([main_weight, other_weight], axis=1)  # [B, 2]
        alone = jnp.array([1.0, 0.0])
        eval_weight = jnp.where(other_sees[:, None], answers, alone).astype(jnp.float32)
        vectors = [
            unit_vectors(output.embedding) * (eval_weight[:, i, None] > 0)
            for i, output in enumerate(outputs)
        ]
        return ModelOutput(
            logits=jnp.concatenate([output.logits for output in outputs], axis=1),  # [B, 2, 1 + C]
            embedding=jnp.concatenate(vectors, axis=1),
            train_weight=jnp.stack([main_sees, other_sees], axis=1).astype(jnp.float32),
            eval_weight=eval_weight,
            attention={**(outputs[1].attention or {}), **(outputs[0].attention or {})},
        )


def _mean_measure(frames: Frames, measure: str) -> Array:
    """Returns [B] float32, the mean over real frames of their quality or of their norm."""
    if measure == "quality":
        values = jnp.where(jnp.isfinite(frames.quality), frames.quality, 0.0)
    else:
        values = jnp.linalg.norm(frames.features.astype(jnp.float32), axis=-1)
    total = jnp.sum(values, axis=1, where=frames.mask)
    return total / jnp.maximum(jnp.sum(frames.mask, axis=1), 1)
