"""The first steps of every model: checks of the frames, masks, modality dropout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vidjax.batch import Array, Frames


def real_frames(
    frames: Mapping[str, Frames], modalities: Mapping[str, int], batch_mask: Array
) -> tuple[dict[str, Frames], Array]:
    """Selects the modalities of a model, and masks the frames of padded rows.

    Returns modality -> Frames [B, T], in the order of `modalities`, and [B, M] bool, True where the
    clip has a frame of the modality. Modalities may differ in T.
    """
    check_frames(frames, modalities)
    real = {
        name: frames[name]._replace(mask=frames[name].mask & batch_mask[:, None])
        for name in modalities
    }
    return real, jnp.stack([real[name].mask.any(axis=1) for name in modalities], axis=1)


def check_frames(frames: Mapping[str, Frames], modalities: Mapping[str, int]) -> None:
    """Checks that a batch has the modalities of a model; linen itself would ignore a missing one.

    Raises:
      ValueError: A modality is missing or has another width.
    """
    if missing := sorted(set(modalities) - set(frames)):
        raise ValueError(f"batch lacks modality {', '.join(missing)}; it has {', '.join(frames)}")
    for name, dim in modalities.items():
        if (width := frames[name].features.shape[-1]) != dim:
            raise ValueError(f"modality {name}: features have width {width}, the model needs {dim}")


def drop_modalities(rng: Array, present: Array, rate: float) -> Array:
    """Drops modalities of clips at random; every clip keeps at least one of those that it has.

    Returns [B, M] bool, the modalities that stay of `present`, each dropped with probability
    `rate`. If all would be dropped, a random one stays.
    """
    uniforms = jnp.where(present, jax.random.uniform(rng, present.shape, jnp.float32), -1.0)
    last = uniforms == jnp.max(uniforms, axis=1, keepdims=True)
    return present & ((uniforms >= rate) | last)
