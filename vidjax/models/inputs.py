"""What every system does with its frames first: checks, masks, modality dropout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vidjax.batch import Array, Frames


def real_frames(
    frames: Mapping[str, Frames], modalities: Mapping[str, int], batch_mask: Array
) -> tuple[dict[str, Frames], Array]:
    """Returns the frames that a model looks at, and which modalities a clip has.

    Args:
      frames: modality -> Frames [B, T], each with a T of its own.
      modalities: name -> feature width, those of the model.
      batch_mask: [B] bool; a padded row loses its frames.

    Returns:
      modality -> Frames [B, T] in the order of `modalities`, and [B, M] bool, True where the clip
      has a frame of the modality.

    Raises:
      ValueError: where a modality is missing or has another width.
    """
    check_frames(frames, modalities)
    real = {
        name: frames[name]._replace(mask=frames[name].mask & batch_mask[:, None])
        for name in modalities
    }
    return real, jnp.stack([real[name].mask.any(axis=1) for name in modalities], axis=1)


def check_frames(frames: Mapping[str, Frames], modalities: Mapping[str, int]) -> None:
    """Raises where frames do not fit: linen would leave a missing modality out in silence.

    Args:
      frames: modality -> Frames [B, T].
      modalities: name -> feature width, those of the model.

    Raises:
      ValueError: where a modality is missing or has another width.
    """
    if missing := sorted(set(modalities) - set(frames)):
        raise ValueError(f"batch lacks modality {', '.join(missing)}; it has {', '.join(frames)}")
    for name, dim in modalities.items():
        if (width := frames[name].features.shape[-1]) != dim:
            raise ValueError(f"modality {name}: features are {width} wide, the model wants {dim}")


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
