"""DeepMEF, third place of 2019: channel attention over frames, scene features, a cosine head."""

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
    """Attention over the frames of one modality, a residual layer, and a cosine classifier.

    1. The features of every frame of `modality` are joined with its quality / 100 and its detection
       score. ChannelAttention and AttentionAggregation turn the frames into one vector.
    2. The mean frame of every other modality passes through dense layers of its own.
    3. The concatenated vectors x pass through x + W f(x), with f a dense layer of `hidden_dim`.
    4. A cosine classifier gives the logits.

    Attributes:
      modalities: name -> feature width: `modality` and any others (as published: `scene`).
      num_classes: number of class columns, 1 + C.
      modality: modality with attention over its frames.
      channel_attention: features | channels | none, as in ChannelAttention.
      num_frames: T that the form `channels` of the attention is built for.
      aggregation: attention | mean.
      rms_norm: True to scale every frame of `modality` to a root mean square of 1.
      feature_scale: factor on the features, after `rms_norm`.
      branch_dims: widths of the dense layers of each other modality.
      hidden_dim: width of f.
      dropout_rate: dropout rate of f and of the layers of the other modalities.
      modality_dropout_rate: probability that training drops a modality from a clip; every clip
        keeps at least one.
      logit_scale: factor on the cosines.
      dtype: dtype of the matrix products; parameters, softmax and head are at least float32.

    Source: DeepMEF (3rd place 2019), article and code: quality / 100 and detection are appended
    before aggregation; scenes pass through layers of 480 and 120; 602 -> 964 -> 602 with PReLU,
    BatchNorm, dropout 0.5 and a residual; logits are 30 times the cosine. According to the article
    the margin loss discards the magnitude of features, so quality is joined to normalised ones.
    Ours: the root mean square of 1, which gives features the order of magnitude of quality / 100;
    W starts at 0, so that the net starts as the cosine of aggregated features; masks; the vector of
    a missing modality is 0, also after its layers; modality dropout.
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
                f"config.model.modality={self.modality!r} is not in config.modalities="
                f"{','.join(self.modalities)}\n"
                "add it, or choose one of these for config.model.modality"
            )
        if self.channel_attention not in ("features", "channels", "none"):
            raise ValueError(
                f"unknown channel_attention {self.channel_attention!r}; choose from channels, "
                "features, none"
            )
        if self.aggregation not in ("attention", "mean"):
            raise ValueError(
                f"unknown aggregation {self.aggregation!r}; choose from attention, mean"
            )

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns logits [B, 1, 1 + C] and the vectors before the classifier as embedding.

        Arguments are those of `models.base.Identifier`; `clips.index` and `clips.labels` are not
        read. The logits lie in [-logit_scale, logit_scale].

        Raises:
          ValueError: A modality of the model is missing or has another width, or the number of
            frames does not fit the attention.
        """
        frames, present = inputs.real_frames(frames, self.modalities, clips.mask)
        seen = jnp.any(present, axis=1)
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
        # Without the mask, biases would give clips without frames a direction.
        x = (x + added) * seen[:, None]
        logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        return ModelOutput(logits[:, None], embedding=x)

    def _layer(self, width: int, name: str) -> DenseLayer:
        return DenseLayer(
            width, "prelu", dropout_rate=self.dropout_rate, dtype=self.dtype, name=name
        )

    def _aggregated(self, real: Frames) -> Array:
        """Returns one vector per clip, [B, D + 2]; 0 for clips without frames."""
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
