"""Builds examples, the inputs of a model: one per clip, or one per fused frame of a clip."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vidjax import selection
from vidjax.batch import Array, Frames
from vidjax.system import FuseFn, System


def fuse(
    system: System,
    fuse_fns: Mapping[str, FuseFn],
    rng: Array | None,
    frames: Mapping[str, Frames],
    view: Array,
) -> dict[str, Frames]:
    """Fuses the frames of every modality and selects the features that one member sees.

    Args:
      system: the system.
      fuse_fns: modality -> fusion, for training or for evaluation.
      rng: PRNG key; the position of a modality is folded into it. None for evaluation.
      frames: modality -> Frames [B, T].
      view: [] int32, chunk of the features that the member does not see; -1 for none.

    Returns:
      modality -> Frames [B, T'].
    """
    fused = {}
    for i, (modality, fuse_fn) in enumerate(fuse_fns.items()):
        key = None if rng is None else jax.random.fold_in(rng, i)
        result = fuse_fn(key, frames[modality])
        features = system.select_features(selection.read(result.features), view)
        fused[modality] = result._replace(features=features)
    return fused


def spread(values: Array, exists: Array) -> Array:
    """Repeats the values [B] of clips for their examples `exists` [B, T']; returns [B T']."""
    return jnp.repeat(values, exists.shape[1])


def mean_over_examples(values: Array, exists: Array) -> Array:
    """Averages the values of the examples of each clip.

    Args:
      values: [B T'] float.
      exists: [B, T'] bool, True for examples that exist.

    Returns:
      [B] float; 0 for clips without an example.
    """
    values = jnp.where(exists, values.reshape(exists.shape), 0.0)
    return jnp.sum(values, axis=1) / jnp.maximum(jnp.sum(exists, axis=1), 1)


def is_best(scores: Array, column: Array) -> Array:
    """Returns `argmax(scores, axis=1) == column`, 9 times faster than argmax on a CPU.

    Args:
      scores: [B, K] float.
      column: [B] int32.

    Returns:
      [B] bool, True if `column` is the first one with the highest score.
    """
    value = jnp.take_along_axis(scores, column[:, None], axis=-1)
    is_earlier = jnp.arange(scores.shape[-1]) < column[:, None]
    # Of comparisons with NaN, none is true.
    is_below = (scores < value) | ((scores == value) & ~is_earlier)
    return jnp.all(is_below, axis=-1)
