"""Models that receive only the mean frame of each modality.

They are dense networks, a cosine classifier, and nearest neighbours.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.core import fusion
from vidjax.core.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models.base import Identifier, Share, Size
from vidjax.models.layers import (
    Classifier,
    CosineClassifier,
    DenseLayer,
    ResidualBlock,
    check_head,
    choose_kept_modalities,
    real_frames,
    unit_vectors,
)
from vidjax.utils.errors import UserError

# (width, activation, batch_norm, dropout_rate)
Layer = tuple[Size, str, bool, Share]
# Backbone -> the attributes that only this backbone reads.
_OPTIONS = {
    "mlp": ("layers",),
    "residual": ("width", "num_layers", "activation", "dropout_rate", "shortcut"),
    "block": ("dropout_rate",),
}


class DenseIdentifier(Identifier):
    """A fully connected network and a classifier. It sees the mean frame of each modality.

    Attributes:
      backbone: mlp | residual (see ResidualDenseNet) | block (see ResidualBlock).
      layers: for `mlp`, (width, activation, batch_norm, dropout_rate) of each layer; () means no
        layers.
      width: for `residual`, width of each layer.
      num_layers: for `residual`, number of layers.
      activation: for `residual`, linear | relu | sigmoid | swish | prelu.
      shortcut: for `residual`, add | none.
      dropout_rate: for `residual`, dropout rate of every layer; for `block`, of its first layer.
      head: linear | cosine.
      logit_scale: factor on the cosines, for the cosine head.

    Source: four systems of the iQIYI challenges. We added several modalities and modality dropout.

        mlp:                                   "quality fusion" (4th place 2019), faces
        residual:                              "Residual Dense Net" (2nd place 2019), faces
        mlp of one linear layer, cosine head:  "noise classes" (5th place 2018), faces
        block, cosine head:                    "DeepMEF" (3rd place 2019), scene
    """

    modalities: Mapping[str, int]
    num_classes: int
    backbone: Literal["block", "mlp", "residual"] = "mlp"
    layers: tuple[Layer, ...] = ((1024, "swish", False, 0.5), (1024, "swish", False, 0.5))
    width: Size = 4096
    num_layers: Size = 3
    activation: str = "relu"
    dropout_rate: Share = 0.5
    shortcut: Literal["add", "none"] = "add"
    head: Literal["cosine", "linear"] = "linear"
    logit_scale: float = 1.0
    feature_scale: float = 1.0
    modality_dropout_rate: Share = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head(self.head, self.logit_scale)
        # A changed value would have no effect, but would look like an experiment.
        unused = {option for options in _OPTIONS.values() for option in options}
        unused -= set(_OPTIONS[self.backbone])
        for field in dataclasses.fields(self):
            if field.name in unused and getattr(self, field.name) != field.default:
                raise UserError(
                    f"model 'dense': backbone {self.backbone!r} has no option {field.name}\n"
                    f"leave {field.name} out, or choose another backbone"
                )

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits of a single branch, [B, 1, num_classes], see `ModelOutput`."""
        frames, present = real_frames(frames, self.modalities, clips.mask)
        # Clips without frames must not change the batch statistics.
        has_frames = jnp.any(present, axis=1)
        present = choose_kept_modalities(self, present, self.modality_dropout_rate, train=train)
        means = [
            fusion.mean_frame(real).features[:, 0] * present[:, i, None]
            for i, real in enumerate(frames.values())
        ]
        x = jnp.concatenate(means, axis=-1) * self.feature_scale  # [B, sum of D]
        if self.backbone == "mlp":
            backbone = MLP(self.layers, self.dtype, name="backbone")
        elif self.backbone == "block":
            backbone = ResidualBlock(0, self.dropout_rate, self.dtype, name="backbone")
        else:
            backbone = ResidualDenseNet(
                self.width,
                self.num_layers,
                self.activation,
                self.dropout_rate,
                self.shortcut,
                self.dtype,
                name="backbone",
            )
        x = backbone(x, has_frames, train=train)
        if self.head == "cosine":
            logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        else:
            init = nn.initializers.xavier_uniform()
            logits = Classifier(
                self.num_classes, dtype=self.dtype, kernel_init=init, name="classifier"
            )(x, train=train)
        return ModelOutput(logits[:, None], embedding=x)


class MLP(nn.Module):
    """A sequence of dense layers.

    Source: the system "quality fusion" (4th place in the iQIYI challenge 2019), whose five networks
    are sequences of such layers.
    """

    layers: tuple[Layer, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Computes the output of the last layer, [B, D'] float32, from x [B, D] float.

        `mask` [B] bool is True for clips that count in the statistics of BatchNorm. Without layers,
        returns `x`.
        """
        for i, layer in enumerate(self.layers):
            x = DenseLayer(*layer, dtype=self.dtype, name=f"layer_{i}")(x, mask, train=train)
        return x


_NUM_CONNECTED = 3  # the first layers, which have shortcuts


class ResidualDenseNet(nn.Module):
    """Dense layers of equal width, with shortcuts between the first three.

    For the input x and the layers f_1, f_2, ... (including their dropout), the outputs are
    h_1 = f_1(x) and h_i = f_i(h_{i-1}). With `shortcut=add`, h_1 is added to h_2, and h_2 to h_3.

    Attributes:
      num_layers: number of layers, without the classifier.
      activation: activation of every layer, as in DenseLayer.
      shortcut: add | none (a plain network of the same size).

    Source: Residual Dense Net (2nd place 2019): shortcuts between the first three layers of a deep
    fully connected network, BatchNorm, dropout. The article leaves everything else open. No
    shortcut bypasses the first layer, because input and output widths differ.
    """

    width: Size = 4096
    num_layers: Size = 3
    activation: str = "relu"
    dropout_rate: Share = 0.5
    shortcut: Literal["add", "none"] = "add"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Computes the output of the last layer, [B, width] float32, from x [B, D] float.

        `mask` [B] bool is True for clips that count in the statistics of BatchNorm.
        """
        for i in range(self.num_layers):
            connected = 0 < i < _NUM_CONNECTED and self.shortcut == "add"
            new = DenseLayer(
                self.width,
                self.activation,
                batch_norm=True,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f"layer_{i}",
            )(x, mask, train=train)
            x = x + new if connected else new
        return x


class CosineIdentifier(Identifier):
    """Concatenates a weighted unit vector of each modality, and classifies by cosines.

    x_m is `feature_scale` x the mean frame of the modality m. a_m is the learned weight of m, or 1
    if m is the only modality:

        e_m = unit(BatchNorm(Linear(x_m))), or 0 for a clip without m
        z = unit([a_1 e_1; a_2 e_2; ...])
        logits = s dropout(z) . unit(W)^T with a learned s

    The loss adds the margin: `config.loss.margin_type=cosine`.

    Attributes:
      modalities: name -> feature width, from the strongest to the weakest: the weights start at 1,
        1/2, 1/4 and so on.
      embed_dim: width of each e_m.
      dropout_rate: dropout rate of z.
      logit_scale: initial value of s.

    Source: not published, but built from published parts. The scaled cosine is from CosFace (Wang
    et al.). The linear map with BatchNorm before the unit vector is from ArcFace (Deng et al.,
    section 3.1). We added a unit vector and a weight for each modality, and a learned s.
    """

    modalities: Mapping[str, int]
    num_classes: int
    embed_dim: Size = 512
    feature_scale: float = 0.1
    modality_dropout_rate: Share = 0.0
    dropout_rate: Share = 0.0
    logit_scale: float = 16.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits [B, 1, num_classes], the embedding z, and the learned scale s.

        Without dropout the logits lie in [-s, s]. The logits of clips without frames are 0.
        """
        frames, present = real_frames(frames, self.modalities, clips.mask)
        kept = choose_kept_modalities(self, present, self.modality_dropout_rate, train=train)
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        first = 0.5 ** jnp.arange(len(self.modalities), dtype=param_dtype)
        # The weight of a single modality would change only the sign of z. The gradient would be
        # rounding errors, which Adam enlarges until the sign changes and all cosines are negated.
        weights = self.param("weights", lambda _: first) if len(frames) > 1 else first
        share = weights * kept  # [B, M]
        parts = [
            share[:, i, None] * self._embed(name, real, present[:, i], train=train)
            for i, (name, real) in enumerate(frames.items())
        ]
        z = unit_vectors(jnp.concatenate(parts, axis=-1))  # [B, M embed_dim]
        head = CosineClassifier(self.num_classes, 1.0, self.dropout_rate, name="classifier")
        cosines = head(z, train=train)
        scale = self.param("scale", nn.initializers.constant(self.logit_scale), (), param_dtype)
        return ModelOutput(scale * cosines[:, None], embedding=z, logit_scale=scale[None])

    def _embed(self, name: str, real: Frames, exists: Array, *, train: bool) -> Array:
        """Computes unit vectors [B, embed_dim] of a modality from the mean of its frames.

        `exists` [B] bool is True for clips with a frame. Other clips get arbitrary vectors.
        """
        x = fusion.mean_frame(real).features[:, 0] * self.feature_scale
        layer = DenseLayer(self.embed_dim, "linear", True, dtype=self.dtype, name=f"{name}_map")
        # The statistics include clips whose modality was dropped.
        return unit_vectors(layer(x, exists, train=train))


# Below every cosine, but finite, so that losses and log-softmax are finite.
_NO_NEIGHBOUR = -2.0


class NeighbourIdentifier(Identifier):
    """A baseline: the logit of a class is the cosine to the nearest training clip of the class.

    The vector of a clip is its mean frame in `modality`. Training stores unit vectors [N, D]
    float32 and labels [N] int32 of the N training clips in the collection `memory`. Clips without
    frames are never neighbours.

    Source: k-nearest-neighbour baseline of the noise-classes system (5th place 2018). Here k = 1
    for each class.
    """

    modalities: Mapping[str, int]
    num_classes: int
    num_clips: int
    modality: str = "face"
    logit_scale: float = 1.0
    is_closed_form: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits, [B, 1, num_classes], and the embedding, which is the mean frame.

        A logit is `logit_scale` times the cosine to the nearest training clip of the class. If the
        class has no training clip, or the clip has no frame, -2 replaces the cosine. In training,
        clips are stored in the rows `clips.index` of `memory`, and all logits are 0.
        """
        real, _ = real_frames(frames, self.modalities, clips.mask)
        mean = fusion.mean_frame(real[self.modality]).features[:, 0]  # [B, D]
        unit, no_class = unit_vectors(mean), self.num_classes
        vectors = self.variable(
            "memory", "vectors", jnp.zeros, (self.num_clips, unit.shape[1]), unit.dtype
        )
        stored_labels = self.variable(
            "memory", "labels", jnp.full, (self.num_clips,), no_class, jnp.int32
        )
        has_frames = jnp.any(unit != 0, axis=-1)
        if train:
            if clips.labels is None:
                raise ValueError("model 'knn' needs ClipInfo.labels in training")
            if not self.is_initializing():
                rows = jnp.where(clips.mask, clips.index, self.num_clips)
                new_labels = jnp.where(has_frames, clips.labels, no_class)
                vectors.value = vectors.value.at[rows].set(unit, mode="drop")
                stored_labels.value = stored_labels.value.at[rows].set(new_labels, mode="drop")
            return ModelOutput(jnp.zeros((len(unit), 1, self.num_classes), unit.dtype), mean)
        cosines = vectors.value @ unit.T  # [N, B]
        best = jax.ops.segment_max(cosines, stored_labels.value, num_segments=self.num_classes)
        best = jnp.maximum(jnp.where(has_frames, best, -jnp.inf), _NO_NEIGHBOUR).T  # [B, 1 + C]
        return ModelOutput(self.logit_scale * best[:, None], embedding=mean)
