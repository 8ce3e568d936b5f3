"""A main model, with a fallback model for clips without a face or with poor faces."""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from vidjax.core import fusion
from vidjax.core.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models.base import Identifier, Share, TrainingClips
from vidjax.models.layers import real_frames, unit_vectors
from vidjax.utils.errors import UserError


class FallbackIdentifier(Identifier):
    """A main model, and a fallback model for clips whose main modality is missing or poor.

    One run trains both models: the model `main` on clips that have the main modality `modality`,
    and the fallback model `other` on clips that have at least 1 of `other_modalities`. Evaluation
    adds their scores with the weights (main, other). The first row that applies counts:

        the clip has none of `other_modalities`:            (1, 0)
        the clip lacks `modality`:                          (0, missing_scale)
        frames of `modality` are poor, see `threshold`:     (main_share, other_share)
        any other clip:                                     (1, 0)

    Attributes:
      other_modalities: modalities of the fallback model. `modality` must not be one of them.
      main_modalities: modalities of the main model; () means all.
      modality: main modality, such as face.
      missing_scale: weight of the fallback model for clips without `modality`.
      measure: norm (mean length of the feature vectors) | quality (mean quality), over all frames
        of the clip in `modality`, before fusion.
      threshold: `measure` below which both models score a clip; 0 means never.
      threshold_share: share in [0, 1) of the training clips with `modality` that lie below the
        threshold. `prepare` computes the threshold. With 0, `threshold` is used as given.
      main_share, other_share: weights of the two models below the threshold.

    Source: DeepMEF (3rd place 2019), with a main model of face and scene, and a fallback model of
    the scene. The article uses the fallback model for clips without a face, and both models for the
    1 % of clips of the lowest quality. In the code of DeepMEF, `missing_scale` is 0.95, and below a
    norm of 8.867, the shares are 0.2 and 0.8. This norm is the 1 % quantile of the face features in
    the iQIYI challenge. Residual Dense Net (2nd place 2019) uses only the body for clips without a
    face. The training of both models in one run, and the fit of the threshold, are ours.
    """

    modalities: Mapping[str, int]
    num_classes: int
    main: Identifier
    other: Identifier
    other_modalities: tuple[str, ...]
    main_modalities: tuple[str, ...] = ()
    modality: str = "face"
    missing_scale: Share = 0.95
    measure: Literal["norm", "quality"] = "norm"
    threshold: float = 0.0
    threshold_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    main_share: Share = 0.2
    other_share: Share = 0.8
    parts: ClassVar[Mapping[str, str]] = {"main": "main_modalities", "other": "other_modalities"}

    def __post_init__(self) -> None:
        super().__post_init__()
        main = self.main_modalities or self.modalities
        if self.modality not in main:
            raise UserError(
                f"model 'fallback': modality={self.modality!r} is not among the main modalities "
                f"({', '.join(main)})\nadd it to main_modalities, or choose another modality"
            )
        if not self.other_modalities or self.modality in self.other_modalities:
            raise UserError(
                f"model 'fallback': other_modalities must name one or more modalities other than "
                f"{self.modality!r}, not {', '.join(self.other_modalities) or 'none'}"
            )
        for part in (self.main, self.other):
            if part.min_epochs:
                raise UserError(
                    f"model 'fallback': main and other cannot be a {type(part).__name__}\n"
                    "choose networks, or train two runs and blend them: vidjax evaluate --runs"
                )
        if self.main.logit_scale != self.other.logit_scale:
            raise UserError(
                "model 'fallback': logit_scale of main and logit_scale of other must be equal, "
                f"not {self.main.logit_scale} and {self.other.logit_scale}"
            )

    @property
    def logit_scale(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The factor on the cosines in the logits, equal for both models, `main` and `other`."""
        return self.main.logit_scale

    @property
    def vector_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The `vector_names` of `main`, or of `other` if `main` has none."""
        return self.main.vector_names or self.other.vector_names

    def prepare(self, clips: TrainingClips) -> Mapping[str, float]:
        """Returns {"threshold": t}. The share `threshold_share` of the training clips is below t.

        t limits the mean norm or quality, see `measure_clips`. Clips without `self.modality` do not
        count, but distractors do. Returns {} if `threshold_share` is 0.
        """
        if not self.threshold_share:
            return {}
        if self.threshold:
            raise UserError(
                f"config.model.threshold={self.threshold} and config.model.threshold_share="
                f"{self.threshold_share} exclude each other\nset one of them to 0"
            )
        exists = clips.present[self.modality]
        if not exists.any():
            return {"threshold": 0.0}
        mean = jax.jit(functools.partial(fusion.mean_measure, measure=self.measure))
        values = clips.values(self.modality, mean, exists)
        # In floating point 0.29 x 100 is slightly less than 29.
        num_below = int(self.threshold_share * len(values) * (1 + 1e-12))
        return {"threshold": float(np.sort(values)[num_below])}

    @classmethod
    def with_prepared(
        cls, spec: Mapping[str, Any], prepared: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Returns the attributes `spec` of the model with the threshold that `prepare` computed.

        `prepared` is the result of `prepare`, and is used only if `spec` has a `threshold_share`
        and no `threshold`.
        """
        if not spec.get("threshold_share") or spec.get("threshold"):
            return spec
        return {**spec, **prepared}

    def measure_clips(self, frames: Mapping[str, Frames]) -> Array | None:
        """Returns the mean norm or quality of the frames of B clips, [B] float32, see `measure`.

        `frames` is modality -> Frames [B, T]. Only `self.modality` is measured. Returns None if
        `threshold` is 0, because then the measure has no effect.
        """
        return fusion.mean_measure(frames[self.modality], self.measure) if self.threshold else None

    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits of `main` and `other`, [B, 2, num_classes], with weights [B, 2].

        The table of the class has the weights in evaluation. They depend on `clips.measure`, the
        result of `measure_clips`. The embedding concatenates the unit vectors of both models. The
        vector of a model with weight 0 is 0.
        """
        real, present = real_frames(frames, self.modalities, clips.mask)
        has = dict(zip(real, present.T, strict=True))  # modality -> [B]
        main_sees = has[self.modality]
        other_sees = jnp.any(jnp.stack([has[name] for name in self.other_modalities]), axis=0)

        outputs = []
        for part, sees in ((self.main, main_sees), (self.other, other_sees)):
            rows = clips.mask & sees if train else clips.mask
            output = part(frames, clips._replace(mask=rows), train=train)
            if output.logits.shape[1] > 1:
                raise UserError(
                    "model 'fallback': the models 'main' and 'other' must have one branch (set of "
                    f"logits) each\n{type(part).__name__} has several: choose another model"
                )
            outputs.append(output)

        poor = jnp.zeros_like(main_sees)
        if clips.measure is not None:
            poor = main_sees & (clips.measure < self.threshold)
        # The rows of the table in the docstring of the class.
        cases = [~other_sees[:, None], ~main_sees[:, None], poor[:, None]]
        main_only, other_only = (1.0, 0.0), (0.0, self.missing_scale)
        pairs = main_only, other_only, (self.main_share, self.other_share), main_only
        *weights, default = [jnp.array(pair, jnp.float32) for pair in pairs]
        score_weight = jnp.select(cases, weights, default)  # [B, 2]
        vectors = [
            unit_vectors(output.embedding) * (score_weight[:, i, None] > 0)
            for i, output in enumerate(outputs)
        ]
        return ModelOutput(
            logits=jnp.concatenate([output.logits for output in outputs], axis=1),  # [B, 2, 1 + C]
            embedding=jnp.concatenate(vectors, axis=1),
            loss_weight=jnp.stack([main_sees, other_sees], axis=1).astype(jnp.float32),
            score_weight=score_weight,
            attention=outputs[0 if self.main.vector_names else 1].attention,
            logit_scale=self._learned_scales(outputs),
        )

    def _learned_scales(self, outputs: Sequence[ModelOutput]) -> Array | None:
        """Returns `logit_scale` of `main` and `other`, [2], or None if no model learns it."""
        if all(output.logit_scale is None for output in outputs):
            return None
        fixed = jnp.full(1, self.logit_scale, jnp.float32)
        scales = [fixed if x.logit_scale is None else x.logit_scale for x in outputs]
        return jnp.concatenate(scales)
