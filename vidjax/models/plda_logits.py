"""PLDA on the device: unit vectors, log-likelihood ratios and logits of clips.

What these are computed from is fitted on the host, see `two_covariance`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import fusion
from vidjax.batch import Array, Frames
from vidjax.models.layers import unit_vectors
from vidjax.models.two_covariance import Enrolled, Settings, Space, stranger_logit


def unit_mean(frames: Frames) -> Array:
    """Returns the mean frame of every clip [B, D], scaled to length 1; 0 for clips without one."""
    return unit_vectors(fusion.mean_frame(frames).features[:, 0])


def as_arrays(space: Space, enrolled: Enrolled, dtype: jnp.dtype) -> tuple[Space, Enrolled]:
    """Returns both on the device, with floats of a dtype."""

    def cast(x: Array) -> jax.Array:
        floats = np.issubdtype(np.asarray(x).dtype, np.floating)
        return jnp.asarray(x, dtype if floats else None)

    return Space(*map(cast, space)), Enrolled(*map(cast, enrolled))


def log_ratios(space: Space, enrolled: Enrolled, vectors: Array) -> Array:
    """Returns log(p(x | clip of the class) / p(x | clip of somebody new)), [B, K].

    `vectors` are the x, [B, D] float. Columns of classes without a clip are 0, up to rounding.
    """
    z = (vectors - space.mean) @ space.transform
    squares = (z * z) @ enrolled.curve.T  # [B, U]
    return jnp.take(squares, enrolled.kind, axis=1) + z @ enrolled.linear.T + enrolled.constant


def combine(ratios: Array, known: Array, present: Array, settings: Settings) -> Array:
    """Returns the logits of clips, from their log-likelihood ratios in each modality.

    The logit of an identity is a sum over the modalities of the clip: of scale x ratio, or of
    `unenrolled` where no clip of the identity has the modality. The logit of somebody new is
    `stranger_logit`: chance likeness grows with the number of people.

    Args:
      ratios: [M, B, K] float.
      known: [M, K] bool, False for classes without a clip that has the modality.
      present: [M, B] bool, False for clips that lack the modality.
      settings: `scale`, `unenrolled` and `stranger` are read.

    Returns:
      [B, K] float, somebody new in column 0; -inf for identities that are known in no modality.
    """
    filled = jnp.where(known[:, None, :], settings.scale * ratios, settings.unenrolled)
    logits = jnp.sum(jnp.where(present[:, :, None], filled, 0.0), axis=0)
    anywhere = jnp.any(known, axis=0)
    logits = jnp.where(anywhere, logits, -jnp.inf)
    stranger = stranger_logit(settings, jnp.sum(anywhere), jnp)
    return jnp.where(jnp.arange(logits.shape[1]) == 0, stranger, logits)
