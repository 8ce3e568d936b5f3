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
      netvlad_reduce, netvlad_norms: the attributes `reduce` and `norms` of `NetVLAD`.
      embed_dim: width of the vectors of the feature map, D.
      num_face_vectors: number of vectors of `face`, each computed by a separate linear map.
      attention: False to leave out the attention (table 3 of the paper).
      gram_dim: width in which the attention computes correlations, D~ in the paper.
      gram_scale: factor on the Gram matrix of the attention (1 in the paper).
      gamma: strength of the attention.
      train_gamma: True to learn gamma (not in the paper).
      attention_form: `gram` (as published) or `two` projections, see `MultimodalAttention`.
      fill_missing: if True, as published, attention fills the vectors of a missing modality with
        gamma times a mean of the other vectors. If False (not in the paper), they stay 0.
      joined: `concat`, as published, to classify all vectors of the feature map side by side;
        `mean` to classify the mean of the vectors that a clip has.
      gate: True to multiply every vector of the feature map by a learned sigmoid gate.
      unit_length: True to scale frames before NetVLAD, and the vector of each modality before its
        map, to length 1 (not in the paper). Then only the direction of features counts.
      map_norm: True for LayerNorm after the maps, so that the norm of features does not count.
      modality_dropout_rate: see `Identifier`. The remaining vectors are not rescaled.
      head: linear | cosine.
      logit_scale: factor on the cosines, for the cosine head.
      dropout_rate: dropout rate of the input of the classifier; with `cosine`, of its unit vectors.

    Source: iQIYI-VID paper, section 5 and figure 3. The paper leaves some choices open. Our choices
    are: three maps for the three face vectors, K, the linear classifier, no activation after the
    maps, the feature scale. We added masks, LayerNorm after the maps, modality dropout, the cosine
    head, and the gate, which the second-place article of 2019 names as future work.
    """

    modalities: Mapping[str, int]
    num_classes: int
    netvlad: tuple[str, ...] = ("face",)
    num_clusters: Size = 8
    netvlad_reduce: Literal["mean", "sum"] = "sum"
    netvlad_norms: tuple[str, ...] = ("batch",)
    embed_dim: Size = 512
    num_face_vectors: Size = 3
    attention: bool = True
    gram_dim: Size = 64
    gram_scale: float = 1.0
    gamma: float = 0.05
    train_gamma: bool = False
    attention_form: Literal["gram", "two"] = "gram"
    fill_missing: bool = False
    joined: Literal["concat", "mean"] = "concat"
    gate: bool = False
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
        """The names of the vectors of the feature map: face 1, face 2, face 3, head, ..."""
        names = []
        for name in self.modalities:
            count = self.num_face_vectors if name == "face" else 1
            names += [f"{name} {i + 1}" for i in range(count)] if count > 1 else [name]
        return tuple(names)

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes logits [B, 1, 1 + C] and the attention. The embedding is the feature map."""
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
        if self.gate:
            x = SigmoidGate(self.dtype, name="gate_map")(x)
        if self.attention:
            x, attention = MultimodalAttention(
                self.gram_dim,
                self.gram_scale,
                self.gamma,
                self.train_gamma,
                self.attention_form,
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
        """Pools the frames of a modality to a vector, [B, K D] with NetVLAD, otherwise [B, D]."""
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        if name in self.netvlad:
            features = real.features.astype(param_dtype)
            if self.unit_length:
                features = unit_vectors(features)
            video = NetVLAD(
                self.num_clusters,
                self.netvlad_reduce,
                self.netvlad_norms,
                self.dtype,
                name=f"{name}_netvlad",
            )(features * self.feature_scale, real.mask, train=train)
        else:
            video = fusion.mean_frame(real).features * self.feature_scale
        video = video.reshape(video.shape[0], -1)
        return unit_vectors(video) if self.unit_length else video


class MultimodalAttention(nn.Module):
    """Adds to each vector of the feature map a mean of all vectors, weighted by correlation.

    The feature map is [B, M, D], a vector per row. In the paper, the feature map X of a clip is the
    transpose, [D, M]. Y[b, i, j] is the weight of vector i in the new vector j, as in the paper.

    Attributes:
      dim: width of the space in which correlations are computed, D~ in the paper.
      scale: factor on the Gram matrix (1 in the paper). Vectors of equal length, as after
        LayerNorm, correlate most with themselves. Then Y is nearly the identity, unless `scale` is
        small.
      gamma: strength of the attention.
      train_gamma: True to learn gamma, starting from `gamma` (not in the paper).
      form: `gram`, the paper's Z = F^T F with F = W_F X; or `two`, Z = F^T G with another
        projection G = W_G X, as in SAGAN, which the paper compares.
      fill_missing: if True, as in the paper, the output of a missing vector is gamma times a mean
        of the vectors that exist. If False (not in the paper), it is 0.

    Source: iQIYI-VID paper, equations 1-3. Here a missing vector is 0 and has no weight in the
    softmax. The equations would give it exp(0). Without missing vectors, the results are equal.
    SAGAN also projects the vectors that are summed; the form `two` does not.
    """

    dim: int = 64
    scale: float = 1.0
    gamma: float = 0.05
    train_gamma: bool = False
    form: Literal["gram", "two"] = "gram"
    fill_missing: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
        """Computes the vectors O = X + gamma X Y, and the attention Y.

        Args:
          x: [B, M, D] float, 0 for missing vectors.
          mask: [B, M] bool, True for vectors that exist.

        Returns:
          O, [B, M, D] in `dtype`; and Y, [B, M, M] float32, a softmax over the existing vectors i.
            If `fill_missing` is False, column j of Y and vector j of O are 0 for each missing
            vector j. If a clip has no vector, its Y and O are 0.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(self.dtype)
        project = functools.partial(Linear, self.dim, dtype=self.dtype, use_bias=False)
        f = project(name="w_f")(x)  # [B, M, D~]
        g = project(name="w_g")(x) if self.form == "two" else f
        product = functools.partial(jnp.einsum, preferred_element_type=param_dtype)
        z = product("bid,bjd->bij", f, g) * self.scale  # [B, M, M]
        pairs = mask[:, :, None] & (True if self.fill_missing else mask[:, None, :])
        # A softmax over an empty set has NaN gradients. A very low score for masked pairs gives
        # the same zeros without NaN.
        z = jnp.where(pairs, z, jnp.finfo(z.dtype).min)
        y = jnp.where(pairs, jax.nn.softmax(z, axis=1), 0.0)
        gamma = self.gamma
        if self.train_gamma:
            gamma = self.param("gamma", nn.initializers.constant(gamma), (), param_dtype)
        mixed = product("bij,bid->bjd", y.astype(self.dtype), x)
        return (x + gamma * mixed).astype(self.dtype), y


class SigmoidGate(nn.Module):
    """Multiplies each vector of the feature map by a gate from 0 to 1, computed from the vector.

    The weights start at 0, so all gates start at 0.5.

    Source: the second-place article of 2019 names gates by a sigmoid as future work. The formula is
    our choice.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Multiplies each vector x_m of x [B, M, D] by sigmoid(w_m . x_m + b_m)."""
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.param("kernel", nn.initializers.zeros, x.shape[1:], param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:2], param_dtype)
        x = x.astype(self.dtype)
        scores = jnp.einsum(
            "bmd,md->bm", x, kernel.astype(self.dtype), preferred_element_type=param_dtype
        )
        gate = jax.nn.sigmoid(scores + bias)  # [B, M]
        return (x * gate[..., None]).astype(self.dtype)
