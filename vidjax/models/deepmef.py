"""DeepMEF, the third place of 2019: frames that attend to each other, scenes, a cosine head."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vidjax import fusion
from vidjax.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models import inputs
from vidjax.models.attention import AttentionAggregation, ChannelAttention
from vidjax.models.heads import CosineClassifier, unit_vectors
from vidjax.models.mlp import DenseLayer


class DeepMEF(nn.Module):
    """Channel attention over the frames of one modality, aggregation, fusion with the others.

    The frames of `modality`, quality / 100 and detection beside their features, go through
    ChannelAttention and AttentionAggregation to one vector. Every other modality, as its mean
    frame, goes through layers of its own to a narrower one. Side by side they are x; the net is
    x + W f(x), f a layer of `hidden_dim`, and a cosine classifier follows.

    Attributes:
      modalities: name -> feature width: `modality`, and any others (`scene`, as published).
      num_classes: 1 + C.
      modality: the one whose frames attend to each other.
      channel_attention: features | channels | none, as in ChannelAttention.
      num_frames: of `channels`: the T it is made for.
      aggregation: attention | mean.
      rms_norm: True to bring every frame of `modality` to a root mean square of 1.
      feature_scale: factor on features: raw ones, or those that `rms_norm` gives.
      branch_dims: widths of the layers of the other modalities.
      hidden_dim: width of f.
      dropout_rate: of f and of the layers of the other modalities.
      modality_dropout_rate: training only: probability that a clip goes without a modality which
        it has; it always keeps one.
      logit_scale: what a cosine of 1 becomes.
      dtype: of the matrix products; parameters, softmaxes and the head are float32 at least.

    Source: DeepMEF (3rd place 2019), article and code: quality / 100 and detection appended before
    aggregation, scenes through 480 and 120, 602 -> 964 -> 602 with PReLU, BatchNorm, dropout .5 and
    a residual, logits 30 times the cosine. The article says that the margin loss discards the
    magnitude, so quality is joined to normalised features; that an entry of these is as large as
    one of quality is ours. Ours: W starts at 0, so that the net starts as the cosine between
    aggregated features; masks; a missing modality is 0, after its layers too; modality dropout.
    """

    modalities: Mapping[str, int]
    num_classes: int
    modality: str = "face"
    channel_attention: str = "features"
    num_frames: int = 40
    aggregation: str = "attention"
    rms_norm: bool = True
    feature_scale: float = 1.0
    branch_dims: tuple[int, ...] = (480, 120)
    hidden_dim: int = 964
    dropout_rate: float = 0.5
    modality_dropout_rate: float = 0.0
    logit_scale: float = 30.0
    dtype: jnp.dtype = jnp.float32
    vector_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality not in self.modalities:
            raise ValueError(
                f"model 'deepmef' is built on {self.modality!r}; configured are "
                f"{', '.join(self.modalities)}"
            )
        if self.channel_attention not in ("features", "channels", "none"):
            raise ValueError(
                f"unknown channel_attention {self.channel_attention!r}; known are channels, "
                "features, none"
            )
        if self.aggregation not in ("attention", "mean"):
            raise ValueError(f"unknown aggregation {self.aggregation!r}; known are attention, mean")

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns the logits of the classes, and the aggregated vector of each clip.

        Args:
          frames: modality -> Frames [B, T], each with a T of its own.
          clips: `index` and `labels` are not read.
          train: True for dropout (rngs `dropout`, `modality_dropout`) and batch statistics (the
            collection `batch_stats` must be mutable).

        Returns:
          ModelOutput with one branch; logits [B, 1, 1 + C] lie in [-logit_scale, logit_scale].

        Raises:
          ValueError: where a configured modality is missing or has another width, or the number of
            frames does not fit `channels`.
        """
        frames, present = inputs.real_frames(frames, self.modalities, clips.mask)
        seen = present.any(axis=1)
        if train and self.modality_dropout_rate > 0:
            rng = self.make_rng("modality_dropout")
            present = inputs.drop_modalities(rng, present, self.modality_dropout_rate)

        vectors = []
        for position, (name, real) in enumerate(frames.items()):
            exists = present[:, position]
            if name == self.modality:
                vector = self._aggregated(real)
            else:
                vector = fusion.mean_frame(real).features[:, 0] * self.feature_scale
                for i, width in enumerate(self.branch_dims):
                    vector = self._layer(width, f"{name}_{i}")(vector, exists, train=train)
            vectors.append(vector * exists[:, None])
        x = jnp.concatenate(vectors, axis=-1)  # [B, D + 2 + 120 for every other modality]

        hidden = self._layer(self.hidden_dim, "hidden")(x, seen, train=train)
        added = nn.Dense(
            x.shape[-1],
            dtype=self.dtype,
            param_dtype=x.dtype,
            kernel_init=nn.initializers.zeros,
            name="back",
        )(hidden)
        # Its bias would give a clip that cannot be seen a direction.
        x = (x + added) * seen[:, None]
        logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        return ModelOutput(logits[:, None], embedding=x)

    def _layer(self, width: int, name: str) -> DenseLayer:
        return DenseLayer(
            width, "prelu", dropout_rate=self.dropout_rate, dtype=self.dtype, name=name
        )

    def _aggregated(self, real: Frames) -> Array:
        """Returns [B, D + 2]: a clip's vector, 0 where it has no frame."""
        x = real.features.astype(jnp.promote_types(self.dtype, jnp.float32))
        if self.rms_norm:
            x = unit_vectors(x) * x.shape[-1] ** 0.5
        beside = jnp.stack([real.quality / 100, real.detection], axis=-1)
        beside = jnp.where(jnp.isfinite(beside), beside, 0.0).astype(x.dtype)
        x = jnp.concatenate([x * self.feature_scale, beside], axis=-1)  # [B, T, D + 2]
        if self.channel_attention != "none":
            x = ChannelAttention(
                self.channel_attention, self.num_frames, self.dtype, name="channel_attention"
            )(x, real.mask)
        if self.aggregation == "mean":
            share = real.mask / jnp.maximum(jnp.sum(real.mask, axis=1, keepdims=True), 1)
            return jnp.einsum("bt,btd->bd", share.astype(x.dtype), x)
        return AttentionAggregation(name="aggregation")(x, real.mask)
