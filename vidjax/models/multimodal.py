"""The model of the iQIYI-VID paper: a vector per modality, and attention between the vectors."""

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
    Classifier,
    CosineClassifier,
    Linear,
    NetVLAD,
    check_head,
    choose_kept_modalities,
    real_frames,
    unit_vectors,
)


class MultimodalIdentifier(Identifier):
    """The model of the iQIYI-VID paper: pooling, feature map, attention, classifier.

    The feature map of a clip is a matrix with one or more vectors for each modality. The vectors of
    a missing modality are set to 0.

    Attributes:
      modalities: name -> feature width, in the order of the feature map.
      netvlad: modalities that NetVLAD pools; other modalities use the mean frame. Names that are
        not in `modalities` are ignored.
      num_clusters: number of clusters of NetVLAD, K.
      netvlad_reduce, netvlad_batch_norm: the attributes `reduce` and `batch_norm` of `NetVLAD`.
      embed_dim: width of the vectors of the feature map, D.
      num_face_vectors: number of vectors of `face`. A separate linear map computes each vector.
      attention: False to leave out the attention (table 3 of the paper).
      gram_dim: width in which the attention computes correlations, D~ in the paper.
      gram_scale: factor on the Gram matrix of the attention (1 in the paper).
      gamma: strength of the attention.
      fill_missing: if True, as published, attention fills the vectors of a missing modality with
        gamma times a mean of the other vectors. If False (not in the paper), they stay 0.
      joined: input of the classifier: `concat` (all vectors of the feature map side by side, as
        published) or `mean` (the mean of the vectors that a clip has).
      feature_scale: factor on the features, before NetVLAD and the maps.
      unit_length: True to scale frames before NetVLAD, and the vector of each modality before its
        map, to length 1 (not in the paper). Then only the direction of features counts.
      map_norm: True for LayerNorm after the maps, so that the length of features does not count.
      modality_dropout_rate: see `Identifier`. The remaining vectors are not rescaled.
      head: linear | cosine.
      logit_scale: factor on the cosines, for the cosine head.
      dropout_rate: dropout rate of the input of the classifier. The cosine head scales its input to
        length 1 before dropout.

    Source: iQIYI-VID paper, section 5 and figure 3. The paper does not define the
    maps of the three face vectors, K, the classifier (ours is linear), an activation after the maps
    (ours have none), and `feature_scale`. We added masks of missing modalities, LayerNorm, modality
    dropout, and the cosine head.
    """

    modalities: Mapping[str, int]
    num_classes: int
    netvlad: tuple[str, ...] = ("face",)
    num_clusters: Size = 8
    netvlad_reduce: Literal["mean", "sum"] = "sum"
    netvlad_batch_norm: bool = True
    embed_dim: Size = 512
    num_face_vectors: Size = 3
    attention: bool = True
    gram_dim: Size = 64
    gram_scale: float = 1.0
    gamma: float = 0.05
    fill_missing: bool = False
    joined: Literal["concat", "mean"] = "concat"
    feature_scale: float = 0.1
    unit_length: bool = False
    map_norm: bool = False
    modality_dropout_rate: Share = 0.0
    head: Literal["cosine", "linear"] = "linear"
    logit_scale: float = 1.0
    dropout_rate: Share = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head(self.head, self.logit_scale)

    @property
    def vector_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The names of the vectors of a clip, such as face 1, face 2, face 3, head."""
        names = []
        for name in self.modalities:
            count = self.num_face_vectors if name == "face" else 1
            names += [f"{name} {i + 1}" for i in range(count)] if count > 1 else [name]
        return tuple(names)

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits, the embedding and the attention of B clips, see `ModelOutput`.

        The logits are [B, 1, num_classes]. The embedding is the input of the classifier. If
        `attention` is True, the attention between M vectors of the feature map is [B, M, M].
        """
        frames, present = real_frames(frames, self.modalities, clips.mask)
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        present = choose_kept_modalities(self, present, self.modality_dropout_rate, train=train)

        vectors, vector_mask, attention = [], [], None
        for position, name in enumerate(self.modalities):
            video = self._pool(name, frames[name], train=train)  # [B, K D] or [B, D]
            exists = present[:, position, None]
            count = self.num_face_vectors if name == "face" else 1
            mapped = Linear(count * self.embed_dim, dtype=self.dtype, name=f"{name}_map")(video)
            mapped = mapped.reshape(-1, count, self.embed_dim)
            if self.map_norm:
                norm = nn.LayerNorm(
                    dtype=self.dtype, param_dtype=param_dtype, name=f"{name}_map_norm"
                )
                mapped = norm(mapped)
            vectors.append(mapped * exists[..., None])
            vector_mask.append(jnp.repeat(exists, count, axis=1))
        x = jnp.concatenate(vectors, axis=1)  # [B, M, embed_dim]
        exists = jnp.concatenate(vector_mask, axis=1)
        if self.attention:
            x, attention = MultimodalAttention(
                self.gram_dim,
                self.gram_scale,
                self.gamma,
                self.fill_missing,
                self.dtype,
                name="attention_map",
            )(x, exists)
        if self.joined == "mean":
            x = x.sum(axis=1) / jnp.maximum(exists.sum(axis=1, keepdims=True), 1).astype(x.dtype)
        x = x.reshape(x.shape[0], -1)
        if self.head == "cosine":
            head = CosineClassifier(
                self.num_classes, self.logit_scale, self.dropout_rate, name="classifier"
            )
        else:
            head = Classifier(self.num_classes, self.dropout_rate, self.dtype, name="classifier")
        logits = head(x, train=train)
        return ModelOutput(logits[:, None], embedding=x.astype(param_dtype), attention=attention)

    def _pool(self, name: str, real: Frames, *, train: bool) -> Array:
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        if name in self.netvlad:
            features = real.features.astype(param_dtype)
            if self.unit_length:
                features = unit_vectors(features)
            video = NetVLAD(
                self.num_clusters,
                self.netvlad_reduce,
                self.netvlad_batch_norm,
                self.dtype,
                name=f"{name}_netvlad",
            )(features * self.feature_scale, real.mask, train=train)
        else:
            video = fusion.mean_frame(real).features * self.feature_scale
        video = video.reshape(video.shape[0], -1)
        return unit_vectors(video) if self.unit_length else video


class MultimodalAttention(nn.Module):
    """Adds to each vector of a clip a mean of all vectors of the clip, weighted by correlation.

    A clip has M vectors, one or more for each modality. The vector x_j becomes
    x_j + gamma sum_i Y[i, j] x_i. Y [M, M] is the attention.

    Attributes:
      dim: width of the space in which correlations are computed, D~ in the paper.
      scale: factor on the Gram matrix (1 in the paper). Vectors of equal length, as after
        LayerNorm, correlate most with themselves. Then Y is nearly the identity matrix, unless
        `scale` is small.
      gamma: strength of the attention.
      fill_missing: if True, as in the paper, the vector of a modality that the clip lacks becomes
        gamma times a mean of the vectors that exist. If False (not in the paper), it stays 0.

    Source: iQIYI-VID paper, equations 1-3. There, the vectors of modalities that the clip lacks
    have weights above 0 in Y. Here, they have the weight 0.
    """

    dim: int = 64
    scale: float = 1.0
    gamma: float = 0.05
    fill_missing: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
        """Computes new vectors of B clips, and the attention Y between the vectors of a clip.

        Args:
          x: [B, M, D] float, M vectors of each clip; 0 for missing vectors.
          mask: [B, M] bool, True for vectors that exist.

        Returns:
          The new vectors, [B, M, D] in `dtype`; and Y, [B, M, M] float32. Each column Y[b, :, j] is
            a softmax over the existing vectors. If `fill_missing` is False, and vector j is
            missing, column j and the new vector j are 0. If a clip has no vector, all are 0.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(self.dtype)
        f = Linear(self.dim, self.dtype, use_bias=False, name="w_f")(x)  # [B, M, D~]
        product = functools.partial(jnp.einsum, preferred_element_type=param_dtype)
        z = product("bid,bjd->bij", f, f) * self.scale  # [B, M, M]
        pairs = mask[:, :, None] & (True if self.fill_missing else mask[:, None, :])
        # A softmax over an empty set has NaN gradients. A very low score for masked pairs gives
        # the same zeros without NaN.
        z = jnp.where(pairs, z, jnp.finfo(z.dtype).min)
        y = jnp.where(pairs, jax.nn.softmax(z, axis=1), 0.0)
        mixed = product("bij,bid->bjd", y.astype(self.dtype), x)
        return (x + self.gamma * mixed).astype(self.dtype), y
