"""A fully connected net on the mean frame of every modality."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from vidjax import fusion
from vidjax.batch import ClipInfo, Frames, ModelOutput
from vidjax.errors import UserError
from vidjax.models.base import Identifier
from vidjax.models.layers import (
    Classifier,
    CosineClassifier,
    check_head,
    drop_modalities,
    real_frames,
)
from vidjax.models.mlp import MLP, Layer, ResidualBlock, ResidualDenseNet

# Backbone -> the attributes that it alone reads.
_OPTIONS = {
    "mlp": ("layers",),
    "residual": ("width", "num_layers", "activation", "dropout_rate", "shortcut", "gate"),
    "block": ("dropout_rate",),
}


class DenseIdentifier(Identifier):
    """A fully connected net and a classifier on the concatenated mean frames of all modalities.

    Attributes:
      modalities: name -> feature width, in the order of the concatenation.
      backbone: mlp | residual | block (ResidualBlock, of twice the width of its input).
      layers: for `mlp`, (width, activation, batch_norm, dropout_rate) of each layer; () for none.
      width: for `residual`, width of every layer.
      num_layers: for `residual`, number of layers.
      activation: for `residual`, activation of every layer, as in DenseLayer.
      dropout_rate: for `residual` and `block`, dropout rate of every layer but the last of a block.
      shortcut: for `residual`, add | concat | none.
      gate: for `residual`, True for a sigmoid gate after every layer.
      head: linear | cosine.
      logit_scale: for the cosine head, factor on the cosines.
      feature_scale: factor on the raw features.
      modality_dropout_rate: probability that training drops a modality; every clip keeps one.
      dtype: dtype of the matrix products; parameters, logits and cosine head are at least float32.

    Source: quality fusion (4th place 2019: `mlp`), Residual Dense Net (2nd place 2019: `residual`),
    noise classes (5th place 2018: one linear layer and the cosine head), all for the face alone;
    the scene-only net of DeepMEF (3rd place 2019: `block` and the cosine head). Ours: further
    modalities, which are 0 for clips that lack them; modality dropout.
    """

    modalities: Mapping[str, int]
    num_classes: int
    backbone: Literal["block", "mlp", "residual"] = "mlp"
    layers: tuple[Layer, ...] = ((1024, "swish", False, 0.5), (1024, "swish", False, 0.5))
    width: int = 4096
    num_layers: int = 3
    activation: str = "relu"
    dropout_rate: float = 0.5
    shortcut: Literal["add", "concat", "none"] = "add"
    gate: bool = False
    head: Literal["cosine", "linear"] = "linear"
    logit_scale: float = 1.0
    feature_scale: float = 1.0
    modality_dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head(self.head, self.logit_scale)
        # A changed value without effect would look like an experiment.
        others = {option for options in _OPTIONS.values() for option in options}
        others -= set(_OPTIONS[self.backbone])
        for field in dataclasses.fields(self):
            if field.name in others and getattr(self, field.name) != field.default:
                raise UserError(f"backbone {self.backbone!r} has no option {field.name}")

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns logits [B, 1, 1 + C] and the output of the backbone as embedding."""
        frames, present = real_frames(frames, self.modalities, clips.mask)
        # Clips without frames must not move the batch statistics.
        seen = jnp.any(present, axis=1)
        if train and self.modality_dropout_rate > 0:
            rng = self.make_rng("modality_dropout")
            present = drop_modalities(rng, present, self.modality_dropout_rate)
        means = [
            fusion.mean_frame(real).features[:, 0] * present[:, i, None]
            for i, real in enumerate(frames.values())
        ]
        x = jnp.concatenate(means, axis=-1) * self.feature_scale  # [B, sum of D]
        if self.backbone == "mlp":
            net = MLP(self.layers, self.dtype, name="backbone")
        elif self.backbone == "block":
            net = ResidualBlock(0, self.dropout_rate, self.dtype, name="backbone")
        else:
            net = ResidualDenseNet(
                self.width,
                self.num_layers,
                self.activation,
                self.dropout_rate,
                self.shortcut,
                self.gate,
                self.dtype,
                name="backbone",
            )
        x = net(x, seen, train=train)
        if self.head == "cosine":
            logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        else:
            init = nn.initializers.xavier_uniform()
            logits = Classifier(
                self.num_classes, dtype=self.dtype, kernel_init=init, name="classifier"
            )(x, train=train)
        return ModelOutput(logits[:, None], embedding=x)
