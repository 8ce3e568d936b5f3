"""The whole of a system after fusion: frames of every modality to class logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from vidjax import fusion
from vidjax.batch import Array, Frames
from vidjax.models.attention import MultimodalAttention
from vidjax.models.heads import Classifier, NearestNeighbours
from vidjax.models.netvlad import NetVLAD


class MultimodalIdentifier(nn.Module):
    """The iQIYI-VID paper's system: pooling, feature map, attention, classifier.

    Attributes:
      modalities: name -> feature width, in the order of the feature map.
      num_classes: 1 + C.
      netvlad: modalities pooled by NetVLAD, where configured; the others take the mean frame.
      num_clusters: K of NetVLAD.
      netvlad_reduce: `sum` (as published) or `mean`.
      embed_dim: D, the width that every modality is mapped to.
      num_face_vectors: vectors of the feature map that come from `face`, each by a map of its own.
      attention: False to concatenate the feature map without attention (the paper's table 3).
      gram_dim: D~ of the attention.
      gamma: strength of the attention.
      train_gamma: True to learn gamma.
      map_norm: True for LayerNorm after the maps: a vector's weight in the classifier then says
        nothing of the norm of its features, by which the modalities differ.
      feature_scale: factor on raw features.
      modality_dropout_rate: training only: probability that a clip goes without a modality which
        it has; it always keeps one. Nothing is rescaled: this is what a missing one looks like.
      dropout_rate: of the classifier's input.
      dtype: of the matrix products; parameters and logits are float32 at least.

    Source: iQIYI-VID paper, section 5 and figure 3. Open there, and ours: three maps for the three
    face vectors, K, a linear classifier, no activation after the maps, feature scale. Ours: masks,
    LayerNorm after the maps, modality dropout. The vectors of a missing modality are exactly 0
    after the maps, bias included.
    """

    modalities: Mapping[str, int]
    num_classes: int
    netvlad: tuple[str, ...] = ("face",)
    num_clusters: int = 8
    netvlad_reduce: str = "sum"
    embed_dim: int = 512
    num_face_vectors: int = 3
    attention: bool = True
    gram_dim: int = 64
    gamma: float = 0.05
    train_gamma: bool = False
    feature_scale: float = 0.1
    map_norm: bool = False
    modality_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        frames: Mapping[str, Frames],
        *,
        clip_index: Array,
        labels: Array,
        batch_mask: Array,
        train: bool,
    ) -> Array:
        """Returns logits.

        Args:
          frames: modality -> Frames [B, T], each with a T of its own.
          clip_index: [B] int32, unused.
          labels: [B] int32, unused.
          batch_mask: [B] bool; padded rows change nothing, statistics included.
          train: True for dropout (rngs `dropout`, `modality_dropout`) and batch statistics (the
            collection `batch_stats` must be mutable).

        Returns:
          [B, 1 + C] float32.

        Raises:
          ValueError: where a configured modality is missing or has another width.
        """
        del clip_index, labels
        _check_frames(frames, self.modalities)
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        masks = {name: frames[name].mask & batch_mask[:, None] for name in self.modalities}
        present = jnp.stack([masks[name].any(axis=1) for name in self.modalities], axis=1)  # [B, M]
        if train and self.modality_dropout_rate > 0:
            rng = self.make_rng("modality_dropout")
            present = drop_modalities(rng, present, self.modality_dropout_rate)

        vectors, vector_mask = [], []
        for position, name in enumerate(self.modalities):
            real = frames[name]._replace(mask=masks[name])
            if name in self.netvlad:
                video = NetVLAD(
                    self.num_clusters, self.netvlad_reduce, self.dtype, name=f"{name}_netvlad"
                )(real.features.astype(param_dtype) * self.feature_scale, real.mask, train=train)
            else:
                video = fusion.mean_frame(real).features * self.feature_scale
            video = video.reshape(video.shape[0], -1)  # [B, K D] or [B, D]
            count = self.num_face_vectors if name == "face" else 1
            mapped = nn.Dense(
                count * self.embed_dim,
                dtype=self.dtype,
                param_dtype=param_dtype,
                name=f"{name}_map",
            )(video)
            exists = present[:, position, None]
            mapped = mapped.reshape(-1, count, self.embed_dim)
            if self.map_norm:
                mapped = nn.LayerNorm(
                    dtype=self.dtype, param_dtype=param_dtype, name=f"{name}_map_norm"
                )(mapped)
            vectors.append(mapped * exists[..., None])
            vector_mask.append(jnp.repeat(exists, count, axis=1))
        x = jnp.concatenate(vectors, axis=1)  # [B, M', embed_dim]
        if self.attention:
            x = MultimodalAttention(
                self.gram_dim, self.gamma, self.train_gamma, self.dtype, name="attention_map"
            )(x, jnp.concatenate(vector_mask, axis=1))
        x = x.reshape(x.shape[0], -1)
        return Classifier(self.num_classes, self.dropout_rate, self.dtype, name="classifier")(
            x, train=train
        )


class NeighbourIdentifier(nn.Module):
    """The baseline: the mean frame of one modality, by cosine to the training clips.

    Attributes:
      modalities: name -> feature width.
      num_classes: 1 + C.
      num_clips: training clips.
      modality: the one that is compared.
    """

    modalities: Mapping[str, int]
    num_classes: int
    num_clips: int
    modality: str = "face"

    @nn.compact
    def __call__(
        self,
        frames: Mapping[str, Frames],
        *,
        clip_index: Array,
        labels: Array,
        batch_mask: Array,
        train: bool,
    ) -> Array:
        """Returns cosines as logits; in training zeros, while it fills `memory`.

        Args:
          frames: modality -> Frames [B, T].
          clip_index: [B] int32, rows of the memory.
          labels: [B] int32, class columns.
          batch_mask: [B] bool.
          train: True to fill the collection `memory`, which must be mutable.

        Returns:
          [B, 1 + C] float32, as NearestNeighbours.

        Raises:
          ValueError: where the modality is missing or has another width.
        """
        _check_frames(frames, self.modalities)
        mean = fusion.mean_frame(frames[self.modality]).features[:, 0]  # [B, D]
        return NearestNeighbours(self.num_clips, self.num_classes, name="neighbours")(
            mean, clip_index=clip_index, labels=labels, batch_mask=batch_mask, train=train
        )


def drop_modalities(rng: Array, present: Array, rate: float) -> Array:
    """Returns which modalities a clip keeps: each goes with probability `rate`, never all.

    Args:
      rng: key.
      present: [B, M] bool, the modalities that the clip has.
      rate: probability of losing one. Where all would go, one of them, by chance, stays.

    Returns:
      [B, M] bool.
    """
    uniforms = jnp.where(present, jax.random.uniform(rng, present.shape, jnp.float32), -1.0)
    last = uniforms == jnp.max(uniforms, axis=1, keepdims=True)
    return present & ((uniforms >= rate) | last)


def make_identifier(
    spec: Mapping,
    *,
    modalities: Mapping[str, int],
    num_classes: int,
    num_clips: int,
    dtype: Any = "float32",
) -> nn.Module:
    """Returns the model that a plain dict names.

    Args:
      spec: `name`, `mma` or `knn`, and attributes of MultimodalIdentifier or NeighbourIdentifier.
      modalities: name -> feature width.
      num_classes: 1 + C.
      num_clips: training clips, for models that remember them.
      dtype: of the matrix products.

    Returns:
      A hashable module called as (frames, *, clip_index, labels, batch_mask, train) that gives
      logits [B, 1 + C].

    Raises:
      ValueError: for an unknown name, attribute, modality or dtype.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"unknown dtype {dtype!r}") from error
    given: dict[str, dict[str, Any]] = {
        "mma": {"dtype": dtype},
        "knn": {"num_clips": num_clips},
    }
    classes = {"mma": MultimodalIdentifier, "knn": NeighbourIdentifier}
    options = dict(spec)
    name = options.pop("name", None)
    if name not in classes:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(sorted(classes))}")
    fixed = {"modalities": FrozenDict(modalities), "num_classes": num_classes, **given[name]}
    known = {field.name for field in dataclasses.fields(classes[name])}
    known -= {"parent", "name", *fixed}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"model {name!r} has no option {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    if not modalities:
        raise ValueError(f"model {name!r} needs at least one modality")
    model = classes[name](**options, **fixed)
    if name == "knn" and model.modality not in modalities:
        raise ValueError(
            f"model 'knn' compares {model.modality!r}; configured are {', '.join(modalities)}"
        )
    return model


def _check_frames(frames: Mapping[str, Frames], modalities: Mapping[str, int]) -> None:
    """Raises where frames do not fit: linen would leave a missing modality out in silence."""
    if missing := sorted(set(modalities) - set(frames)):
        raise ValueError(f"batch lacks modality {', '.join(missing)}; it has {', '.join(frames)}")
    for name, dim in modalities.items():
        if (width := frames[name].features.shape[-1]) != dim:
            raise ValueError(f"modality {name}: features are {width} wide, the model wants {dim}")
