"""Unit vectors of all modalities, weighted and joined, and a cosine classifier with a margin."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from vidjax import fusion
from vidjax.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models.base import Identifier
from vidjax.models.layers import CosineClassifier, drop_modalities, real_frames, unit_vectors
from vidjax.models.mlp import DenseLayer


class CosineIdentifier(Identifier):
    """One unit vector per modality, their weighted concatenation, and a cosine classifier.

    With the mean frame x_m of modality m and learned weights a_m:

        e_m = unit(BatchNorm(Linear(feature_scale x_m))), 0 for a clip without m
        z = unit([a_1 e_1; a_2 e_2; ...])
        logits = s dropout(z) . unit(W)^T with a learned s

    The margin of training belongs to the loss, as `config.loss.margin_type=cosine`.

    Attributes:
      modalities: name -> feature width, from the strongest to the weakest: the weights start at 1,
        1/2, 1/4 and so on.
      embed_dim: width of each e_m.
      feature_scale: factor on the raw features.
      modality_dropout_rate: probability that training drops a modality; every clip keeps one.
      dropout_rate: dropout rate of z.
      logit_scale: first value of s.
      dtype: dtype of the linear maps; parameters and everything else are at least float32.

    Source: ours, of known parts. The scaled cosine is that of CosFace (Wang et al.), the linear map
    with BatchNorm before the unit vector that of ArcFace (Deng et al., section 3.1). New are one
    unit vector per modality, their weights, masks, and a learned s.
    """

    modalities: Mapping[str, int]
    num_classes: int
    embed_dim: int = 512
    feature_scale: float = 0.1
    modality_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    logit_scale: float = 16.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns logits [B, 1, 1 + C], z as embedding, and s.

        Without dropout the logits lie in [-s, s]; they are 0 for clips without frames.
        """
        frames, present = real_frames(frames, self.modalities, clips.mask)
        kept = present
        if train and self.modality_dropout_rate > 0:
            rng = self.make_rng("modality_dropout")
            kept = drop_modalities(rng, present, self.modality_dropout_rate)
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        first = 0.5 ** jnp.arange(len(self.modalities), dtype=param_dtype)
        weights = self.param("weights", lambda _: first)
        share = weights * kept  # [B, M]
        parts = [
            share[:, i, None] * self._vector(name, real, present[:, i], train=train)
            for i, (name, real) in enumerate(frames.items())
        ]
        z = unit_vectors(jnp.concatenate(parts, axis=-1))  # [B, M embed_dim]
        cosines = CosineClassifier(self.num_classes, 1.0, self.dropout_rate, name="classifier")(
            z, train=train
        )
        scale = self.param("scale", nn.initializers.constant(self.logit_scale), (), param_dtype)
        return ModelOutput(scale * cosines[:, None], embedding=z, logit_scale=scale[None])

    def _vector(self, name: str, real: Frames, exists: Array, *, train: bool) -> Array:
        """Returns the unit vector of a modality, [B, embed_dim]; arbitrary without frames."""
        x = fusion.mean_frame(real).features[:, 0] * self.feature_scale
        layer = DenseLayer(self.embed_dim, "linear", True, dtype=self.dtype, name=f"{name}_map")
        # Statistics are of all clips that have the modality, dropped or not.
        return unit_vectors(layer(x, exists, train=train))
