"""DeepMEF, 3rd place in the iQIYI challenge 2019: attention over frames, features of the scene."""

import functools
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.core import fusion
from vidjax.core.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models.base import Identifier, Share, Size
from vidjax.models.layers import (
    KAIMING,
    CosineClassifier,
    DenseLayer,
    Linear,
    ResidualBlock,
    batch_norm,
    choose_kept_modalities,
    real_frames,
    unit_vectors,
)
from vidjax.utils.errors import UserError

TORCH_DEFAULT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class DeepMEF(Identifier):
    """Attention over the frames of a modality, a residual layer, and a cosine classifier.

    1. The features of every frame of `modality` are joined with quality / 100 and the detection
       score. ChannelAttention and AttentionAggregation turn the frames into a vector.
    2. The mean frame of each other modality passes through separate dense layers.
    3. The concatenated vectors x [D] become x + f(x), where f has two layers.
    4. A cosine classifier computes the logits.

    Attributes:
      modality: modality with attention over its frames.
      channel_attention: features | channels | danet, a form of ChannelAttention; or none.
      channel_norm: see `norm` of ChannelAttention; only for `channels`.
      num_frames: number of frames T of every clip; only for `channels`.
      aggregation: attention | mean | quality (mean weighted by quality x detection).
      rms_norm: True to scale every frame of `modality` to a root mean square of 1.
      feature_scale: factor on the features, after `rms_norm`.
      branch_dims: widths of the dense layers of each other modality.
      hidden_dim: width of the first layer of f. The second layer has the width D.
      layer_form: form of the layers of f and of the other modalities.
        published: Linear, BatchNorm, PReLU, dropout. No dropout follows the last layer of f or of
          another modality. Weights start as in Kaiming (He et al. 2015).
        ours: Linear, PReLU, BatchNorm, dropout. The last layer of f is a linear map that starts at
          0.
      dropout_rate: dropout rate of all layers with dropout.
      modality_dropout_rate: see `Identifier`.
      logit_scale: factor on the cosines.

    Source: DeepMEF (3rd place in the iQIYI challenge 2019), with the modalities face and scene.

    - From the code: the factor 30 in training, a `hidden_dim` of twice the width of the aggregated
      face, and `branch_dims` of 1/4 and 1/16 of the 1920 features of the scene that a net sees.
    - Different in the article: features are normalised, and `branch_dims` ends with 128, not 120.
    - Ours: masks of padding, modality dropout, zeros for a missing modality, `rms_norm`.
    """

    modalities: Mapping[str, int]
    num_classes: int
    modality: str = "face"
    channel_attention: Literal["channels", "danet", "features", "none"] = "features"
    channel_norm: bool = False
    num_frames: Size = 40
    aggregation: Literal["attention", "mean", "quality"] = "attention"
    rms_norm: bool = True
    feature_scale: float = 1.0
    branch_dims: tuple[Size, ...] = (480, 120)
    hidden_dim: Size = 964
    layer_form: Literal["ours", "published"] = "ours"
    dropout_rate: Share = 0.5
    modality_dropout_rate: Share = 0.0
    logit_scale: float = 30.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits of a single branch, [B, 1, num_classes], see `ModelOutput`."""
        frames, present = real_frames(frames, self.modalities, clips.mask)
        has_frames = jnp.any(present, axis=1)
        present = choose_kept_modalities(self, present, self.modality_dropout_rate, train=train)

        published = self.layer_form == "published"
        vectors = []
        for position, (name, real) in enumerate(frames.items()):
            exists = present[:, position]
            if name == self.modality:
                vector = self._aggregate(real, train=train)
            else:
                vector = fusion.mean_frame(real).features[:, 0] * self.feature_scale
                options = {"norm_first": True, "kernel_init": KAIMING} if published else {}
                for i, width in enumerate(self.branch_dims):
                    last = published and i == len(self.branch_dims) - 1
                    rate = 0.0 if last else self.dropout_rate
                    vector = DenseLayer(
                        width, "prelu", True, rate, dtype=self.dtype, name=f"{name}_{i}", **options
                    )(vector, exists, train=train)
            vectors.append(vector * exists[:, None])
        x = jnp.concatenate(vectors, axis=-1)  # [B, D + 2 + 120 for each other modality]

        # Without the mask, the biases would give a direction to clips without frames.
        x = self._apply_block(x, has_frames, train=train) * has_frames[:, None]
        logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        return ModelOutput(logits[:, None], embedding=x)

    def _apply_block(self, x: Array, has_frames: Array, *, train: bool) -> Array:
        if self.layer_form == "published":
            block = ResidualBlock(self.hidden_dim, self.dropout_rate, self.dtype, name="block")
            return block(x, has_frames, train=train)
        hidden = DenseLayer(
            self.hidden_dim, "prelu", True, self.dropout_rate, dtype=self.dtype, name="hidden"
        )(x, has_frames, train=train)
        zeros = nn.initializers.zeros
        return x + Linear(x.shape[-1], self.dtype, kernel_init=zeros, name="back")(hidden)

    def _aggregate(self, real: Frames, *, train: bool) -> Array:
        """Pools the frames of `self.modality`, [B, T, D], by `self.aggregation` to [B, D + 2].

        Quality / 100 and the detection score are appended to the D features before pooling. A clip
        without frames becomes 0. `train` matters only for BatchNorm in ChannelAttention.
        """
        x = real.features.astype(jnp.promote_types(self.dtype, jnp.float32))
        if self.rms_norm:
            x = unit_vectors(x) * x.shape[-1] ** 0.5
        scores = jnp.stack([real.quality / 100, real.detection], axis=-1)
        scores = jnp.where(jnp.isfinite(scores), scores, 0.0).astype(x.dtype)
        x = jnp.concatenate([x * self.feature_scale, scores], axis=-1)  # [B, T, D + 2]
        if self.channel_attention != "none":
            form = (self.channel_attention, self.num_frames, self.dtype, self.channel_norm)
            x = ChannelAttention(*form, name="channel_attention")(x, real.mask, train=train)
        if self.aggregation == "attention":
            return AttentionAggregation(name="aggregation")(x, real.mask)
        weighting = "quality" if self.aggregation == "quality" else "uniform"
        weights = fusion.frame_weights(real, weighting)
        share = weights / jnp.where(real.mask.any(axis=1), jnp.sum(weights, axis=1), 1.0)[:, None]
        return jnp.einsum("bt,btd->bd", share.astype(x.dtype), x)


class ChannelAttention(nn.Module):
    """Adds to each frame of a clip a mixture of all frames of the clip. `form` chooses the formula.

    x [T, D] are the frames of a clip, y are the new frames, and A is the attention. theta, phi, g
    and out are linear maps with a bias. The map out and the factor gamma start at 0, so at first y
    equals x.

    Form `features` (ours): the maps act on the features, D -> D/2.

        A_ts = softmax over real frames s of theta(x_t) . phi(x_s) / sqrt(D/2)    [T, T]
        y_t = x_t + out(sum_s A_ts g(x_s))

    Form `channels` (of DeepMEF): theta, phi and g map T = `num_frames` frames to T/2, out to T.

        A_ij = softmax over j of sum_d theta(x)_id phi(x)_jd    [T/2, T/2]
        y = x + out(A g(x))

    Form `danet` (of DANet, for frames instead of channels): frames unlike x_t weigh most.

        E_ts = x_t . x_s
        A_ts = softmax over real frames s of max_s(E_ts) - E_ts    [T, T]
        y_t = x_t + gamma sum_s A_ts x_s

    Attributes:
      norm: only for `channels`, True in DeepMEF. If True, maps have no bias, BatchNorm follows
        theta, phi and out, and theta and phi stay 0: all entries of A are equal.

    Source: the code of DANet (Fu et al., CVPR 2019, whose article takes the softmax of E), and
    channel_attention_layer.py of DeepMEF (3rd place in the iQIYI challenge 2019). Masks of padding
    are ours.
    """

    form: Literal["channels", "danet", "features"] = "features"
    num_frames: Size = 40
    dtype: jnp.dtype = jnp.float32
    norm: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool = False) -> Array:
        """Computes new frames [B, T, D] float32 from frames x. They are 0 where `mask` is False."""
        if self.norm and self.form != "channels":
            raise UserError(
                f"config.model.channel_norm=True has no effect with channel_attention={self.form!r}"
                "\nset --config.model.channel_attention=channels, or leave channel_norm out"
            )
        if self.form == "channels" and x.shape[1] != self.num_frames:
            raise UserError(
                f"config.model.channel_attention=channels needs {self.num_frames} frames, not "
                f"{x.shape[1]}\nlet config.fusion sample {self.num_frames} frames, or "
                "set --config.model.channel_attention=features"
            )
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = jnp.where(mask[..., None], x.astype(param_dtype), 0.0)
        if self.form == "danet":
            gamma = self.param("gamma", nn.initializers.zeros, (), param_dtype)
            added = gamma * self._mix_by_energy(x, mask)
        elif self.form == "channels":
            columns = jnp.swapaxes(x, 1, 2)  # [B, D, T]
            added = jnp.swapaxes(self._mix_by_maps(columns, mask, train=train), 1, 2)
        else:
            added = self._mix_by_maps(x, mask, train=train)
        return jnp.where(mask[..., None], x + added, 0.0)

    def _mix_by_energy(self, x: Array, mask: Array) -> Array:
        """Returns, for each frame, a weighted mean of all frames of its clip, [B, T, D].

        The weights of the frames s for the frame t are a softmax over -x_t . x_s.
        """
        product = functools.partial(jnp.einsum, preferred_element_type=x.dtype)
        frames = x.astype(self.dtype)
        energy = product("btd,bsd->bts", frames, frames)
        # The largest energy of a row is the same for all s, so it cancels in the softmax.
        scores = jnp.where(mask[:, None, :], -energy, jnp.finfo(energy.dtype).min)
        return product("bts,bsd->btd", jax.nn.softmax(scores, axis=-1).astype(self.dtype), frames)

    def _mix_by_maps(self, rows: Array, mask: Array, *, train: bool) -> Array:
        """Mixes the frames of each clip by the linear maps theta, phi, g and out (see the class).

        `rows` and the result are [B, T, D], or [B, D, T] if `self.form` is `channels`. `mask` is
        [B, T], True for real frames.
        """
        product = functools.partial(jnp.einsum, preferred_element_type=rows.dtype)
        width, zeros = max(rows.shape[-1] // 2, 1), nn.initializers.zeros
        default = TORCH_DEFAULT if self.norm else nn.linear.default_kernel_init

        def mapped(name: str, x: Array, to: int, init: nn.initializers.Initializer) -> Array:
            x = nn.Dense(to, not self.norm, self.dtype, rows.dtype, kernel_init=init, name=name)(x)
            if not self.norm or name == "g":
                return x
            return batch_norm(x, jnp.any(mask, axis=1), train=train, name=f"{name}_norm")

        # With `norm`, theta and phi stay 0, as the gradient of each is a product with the other.
        first = zeros if self.norm else default
        theta, phi = (mapped(name, rows, width, first) for name in ("theta", "phi"))
        g = mapped("g", rows, width, default)
        if self.form == "channels":
            affinity = jax.nn.softmax(product("bdi,bdj->bij", theta, phi), axis=-1)
            mixed = product("bij,bdj->bdi", affinity.astype(self.dtype), g)  # [B, D, T/2]
        else:
            scores = product("bti,bsi->bts", theta, phi) * width**-0.5
            scores = jnp.where(mask[:, None, :], scores, jnp.finfo(scores.dtype).min)
            affinity = jax.nn.softmax(scores, axis=-1)  # [B, T, T]
            mixed = product("bts,bsi->bti", affinity.astype(self.dtype), g)  # [B, T, D/2]
        return mapped("out", mixed, rows.shape[-1], zeros)


class AttentionAggregation(nn.Module):
    """Pools the frames of a clip by attention with a learned query vector.

    The query starts at 0, so the pooled vector starts as the mean frame.

    Source: DeepMEF (3rd place 2019), a block of the neural aggregation network. We added the input
    `mask`, which excludes padding.
    """

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Computes the sum of frames x [B, T, D], weighted by softmax_t(q . x_t): [B, D] float32.

        `mask` [B, T] bool is True for real frames. If a clip has none, its sum is 0. q is learned.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        query = self.param("query", nn.initializers.zeros, x.shape[-1:], x.dtype)
        scores = jnp.where(mask, x @ query, jnp.finfo(x.dtype).min)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)  # [B, T]
        return jnp.einsum("bt,btd->bd", weights, jnp.where(mask[..., None], x, 0.0))
